"""Bodies as JSON that can be answered: UTF-8, whole characters, of a depth, a size and with numbers that can be held.

What is much is counted before it is looked at more closely, and long bodies are read in a thread: no body holds up the
event loop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from math import isfinite
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope

from allyouneed.serve.errors import ApiError, invalid

LONG = 1 << 15  # bytes of a body that is read aside
MOST_OBJECTS = 1 << 13  # of one body: messages, their parts, what tools' schemas are made of
MOST_KEYS = 1 << 12  # of one object
MOST_ITEMS = 300_000  # of a field that is a list, or of its lists together: OpenAI's limit of tokens to be embedded


class StrictRequest(Request):
    """A request whose body is read as a `model`, here and not by FastAPI, which would do it on the event loop."""

    def __init__(self, scope: Scope, receive: Receive, model: type[BaseModel] | None) -> None:
        super().__init__(scope, receive)
        self.model, self.refusal = model, None  # type: type[BaseModel] | None, ApiError | None

    async def json(self) -> Any:
        """The body as an instance of the model, which FastAPI takes as it is."""
        body = await self.body()
        try:
            return await asyncio.to_thread(self._read, body) if len(body) > LONG else self._read(body)
        except ApiError as error:
            self.refusal = error
            raise HTTPException(error.status) from None  # of all exceptions FastAPI lets this one through

    def _read(self, body: bytes) -> Any:
        value = _parsed(body)
        if self.model is None:
            return value
        _check_items(value)
        try:
            return self.model.model_validate(value)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=True)
            raise invalid([{**one, "loc": ("body", *one["loc"])} for one in found], value) from None


class StrictRoute(APIRoute):
    """A route for such requests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's function, handed a `StrictRequest`."""
        handle = super().get_route_handler()
        model: Any = self.body_field.field_info.annotation if self.body_field else None

        async def strict(request: Request) -> Response:
            asked = StrictRequest(request.scope, request.receive, model)
            try:
                return await handle(asked)
            except HTTPException:
                if asked.refusal is not None:
                    raise asked.refusal from None
                raise

        return strict


def _parsed(body: bytes) -> Any:
    """The JSON value of a body.

    Raises:
        ApiError: the body is no UTF-8, too much, nested too deeply, spells half a character or a number that is none.
        json.JSONDecodeError: it is no JSON.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, object_hook=_counting(), parse_float=_finite, parse_constant=_finite)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is no UTF-8: byte {error.start}") from None
    except UnicodeEncodeError:
        raise ApiError("the body spells half a surrogate pair, which is no character") from None
    except (RecursionError, ValueError):
        raise ApiError("the body is nested too deeply, or holds a number too long") from None
    return value


def _counting() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A hook that hears of all objects of a body, and refuses too many."""
    count = 0

    def counting(found: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count > MOST_OBJECTS or len(found) > MOST_KEYS:
            said = f"more than {MOST_OBJECTS} objects, or one with more than {MOST_KEYS} fields"
            raise ApiError(f"the body holds {said}; send less at once", code="body_too_large")
        return found

    return counting


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ApiError(f"the body holds {text[:40]}, which is no finite number")
    return value


def _check_items(value: Any) -> None:
    for name, field in value.items() if isinstance(value, dict) else ():
        if isinstance(field, list):
            count = sum(len(one) if isinstance(one, list) else 1 for one in field)
            if count > MOST_ITEMS:
                raise ApiError(f"{name}: {count} entries; at most {MOST_ITEMS} at once", param=name)
