"""GET /v1/models, and POST /tokenize and /detokenize, as vLLM has them: what a client may want to know of a model."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.responses import JSONResponse

from allyouneed.core.errors import InputError
from allyouneed.serve.answering import warned
from allyouneed.serve.answers import ModelAnswer, ModelList, PromptAnswer, TokensAnswer
from allyouneed.serve.chat import conversation
from allyouneed.serve.documents import described
from allyouneed.serve.errors import ApiError, refused
from allyouneed.serve.schemas import DetokenizeFields, TokenizeFields, ignored
from allyouneed.serve.served import Served
from allyouneed.serve.service import Here
from allyouneed.serve.strict import StrictRoute

router = APIRouter(route_class=StrictRoute)
STARTED = int(time.time())


@router.get("/v1/models", **described(ModelList))
async def models(service: Here) -> JSONResponse:
    """The models that can be asked for."""
    found: ModelList = {"object": "list", "data": [_model(served) for served in service.models.values()]}
    return JSONResponse(found)


@router.get("/v1/models/{name:path}", **described(ModelAnswer))
async def model(name: str, service: Here) -> JSONResponse:
    """One of them."""
    return JSONResponse(_model(service.find(name)))


@router.post("/tokenize", **described(TokensAnswer))
async def tokenize(fields: TokenizeFields, service: Here) -> JSONResponse:
    """The ids of a prompt, or of messages as the model would read them."""
    served, headers = service.find(fields.model), warned(ignored(fields))
    if (fields.prompt is None) == (fields.messages is None):
        raise ApiError("prompt: either prompt or messages is needed", param="prompt")
    ids = await _ids(served, fields)
    answer: TokensAnswer = {"tokens": ids, "count": len(ids), "max_model_len": served.context}
    return JSONResponse(answer, headers=headers)


@router.post("/detokenize", **described(PromptAnswer))
async def detokenize(fields: DetokenizeFields, service: Here) -> JSONResponse:
    """The text of ids, special tokens included."""
    served, headers = service.find(fields.model), warned(ignored(fields))
    served.check_ids(fields.tokens, "tokens")
    text = await served.aside(lambda: served.tokenizer.decode(fields.tokens, skip_special_tokens=False))
    answer: PromptAnswer = {"prompt": text}
    return JSONResponse(answer, headers=headers)


async def _ids(served: Served, fields: TokenizeFields) -> list[int]:
    if fields.prompt is None:
        if fields.tools and served.form is None:
            raise ApiError(f"tools: the chat template of {served.name} takes none", param="tools")
        return await conversation(served, fields, fields.tools or [], bounded=False)
    try:
        return await served.encode(fields.prompt, add_special_tokens=fields.add_special_tokens is not False)
    except InputError as error:
        raise refused("prompt", error) from None


def _model(served: Served) -> ModelAnswer:
    return {
        "id": served.name,
        "object": "model",
        "created": STARTED,
        "owned_by": "allyouneed",
        "max_model_len": served.context,
    }
