"""POST /v1/embeddings: texts as vectors of unit length."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from allyouneed.core.errors import InputError
from allyouneed.serve.answering import HUNG_UP, HungUpError, unless_gone, warned
from allyouneed.serve.answers import EmbeddingAnswer, Vector
from allyouneed.serve.documents import described
from allyouneed.serve.errors import ApiError, refused
from allyouneed.serve.schemas import EmbeddingFields, ignored
from allyouneed.serve.served import Served
from allyouneed.serve.service import Here
from allyouneed.serve.strict import StrictRoute

router = APIRouter(route_class=StrictRoute)
AT_ONCE = 32  # texts between two looks at whether the client is still there


@router.post("/v1/embeddings", **described(EmbeddingAnswer))
async def embeddings(fields: EmbeddingFields, request: Request, service: Here) -> Response:
    """A vector for each text: a decoder's is the mean of its last hidden states, an encoder's as it was trained."""
    served, headers = service.find_embedder(fields.model), warned(ignored(fields))
    try:
        async with asyncio.timeout(service.settings.timeout):
            return JSONResponse(await unless_gone(request, _answer(served, fields)), headers=headers)
    except HungUpError:
        return Response(status_code=HUNG_UP)


async def _answer(served: Served, fields: EmbeddingFields) -> EmbeddingAnswer:
    rows = await _rows(served, fields)
    parts = [rows[i : i + AT_ONCE] for i in range(0, len(rows), AT_ONCE)]
    try:
        vectors = np.concatenate([await served.embed(part) for part in parts])
    except InputError as error:
        raise refused("input", error) from None
    return {
        "object": "list",
        "data": [_vector(i, row, fields) for i, row in enumerate(_cut(vectors, fields.dimensions))],
        "model": served.name,
        "usage": {"prompt_tokens": sum(map(len, rows)), "total_tokens": sum(map(len, rows))},
    }


async def _rows(served: Served, fields: EmbeddingFields) -> Sequence[Sequence[int]]:
    """The ids of each text. One with more than the model reads is refused, not cut short; ids are read as they are."""
    given: Any = fields.input
    several = isinstance(given, list) and not isinstance(given[0], int)
    asked: list[Any] = given if several else [given]
    for i, one in enumerate(asked):
        param = f"input[{i}]" if several else "input"
        if not one:
            raise ApiError(f"{param}: is empty", param=param)
        if isinstance(one, str):
            served.check_length(one, param)
        else:
            served.check_ids(one, param)
    rows = await _encoded(served, asked) if isinstance(asked[0], str) else asked
    for i, row in enumerate(rows):
        if served.context is not None and len(row) > served.context:
            said = f"input[{i}]: {len(row)} tokens; {served.name} reads at most {served.context}"
            raise ApiError(f"{said}; split the text", param="input", code="context_length_exceeded")
    return rows


async def _encoded(served: Served, texts: Sequence[str]) -> list[list[int]]:
    encode = served.tokenizer.encode_batch
    try:
        return await served.aside(lambda: encode(texts, add_special_tokens=True), sum(map(len, texts)))
    except InputError as error:
        raise refused("input", error) from None


def _cut(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first `dimensions` of each, of unit length again, as OpenAI shortens vectors."""
    if dimensions is None:
        return vectors
    if dimensions > vectors.shape[1]:
        said = f"dimensions: {dimensions} is more than the {vectors.shape[1]} there are"
        raise ApiError(said, param="dimensions")
    cut = vectors[:, :dimensions]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


def _vector(index: int, row: np.ndarray, fields: EmbeddingFields) -> Vector:
    if fields.encoding_format == "base64":
        return {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode("ascii"),
        }
    return {"object": "embedding", "index": index, "embedding": row.tolist()}
