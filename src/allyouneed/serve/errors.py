"""Errors in OpenAI's own shape: `{"error": {"message", "type", "param", "code"}}`, whoever raised them.

Holds the one exception that routes raise, and how everybody else's become it: the validation's, the framework's, ours.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from typing_extensions import TypedDict

from allyouneed.core.errors import InputError

LOG = logging.getLogger("allyouneed.serve")
LONGEST_MESSAGE = 600  # characters: a message may quote what was sent


class ErrorDetail(TypedDict):
    """What went wrong; `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """The body of every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """What a client is told instead of an answer.

    >>> ApiError("n: at most 8", param="n").body()
    {'error': {'message': 'n: at most 8', 'type': 'invalid_request_error', 'param': 'n', 'code': None}}
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> ErrorAnswer:
        """The answer's JSON value."""
        message = " ".join(_encodable(str(self)).split())
        shown = message if len(message) <= LONGEST_MESSAGE else message[: LONGEST_MESSAGE - 3] + "..."
        param = None if self.param is None else _encodable(self.param)[:200]
        return {"error": {"message": shown, "type": _kind(self.status), "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def refused(param: str, error: InputError) -> ApiError:
    """What the engine, a template or a guide refuses, with the field it came from.

    >>> refused("prompt", InputError("is empty")).body()["error"]["message"]
    'prompt: is empty'
    """
    message = str(error)
    return ApiError(message if message.startswith(param) else f"{param}: {message}", param=param)


def busy(message: str) -> ApiError:
    """A request that is sent away for now."""
    return ApiError(message, status=429, code="overloaded", headers={"Retry-After": "1", "Connection": "close"})


def translated(error: BaseException) -> ApiError:
    """Whatever went wrong while an answer was made; what nobody foresaw is logged and told in general words."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(str(error))
    if isinstance(error, TimeoutError):
        return ApiError("the answer took longer than this server allows", status=504, code="timeout")
    LOG.error("an answer failed", exc_info=error)
    return ApiError("the server failed; its log says how", status=500, code="internal_error")


def install(app: FastAPI) -> None:
    """Let every error of `app` leave in this shape."""
    app.add_exception_handler(ApiError, _api)
    app.add_exception_handler(InputError, _api)
    app.add_exception_handler(TimeoutError, _api)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _api)


async def _api(request: Request, error: Exception) -> JSONResponse:
    return translated(error).response()


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    said = {404: f"no such route: {request.method} {request.url.path}", 405: f"{request.method} is not answered here"}
    message = said.get(error.status_code, str(error.detail))
    return ApiError(message, status=error.status_code, headers=error.headers).response()


async def _validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return invalid(error.errors(), error.body).response()


def invalid(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The error of a body that is not what the route takes. Of several it is one that is more than a wrong type, and
    then the one that lies deepest and farthest: for a field of several types, the type that fits best.
    """
    param, one = max(((_path(one, body), one) for one in errors[:100]), key=lambda pair: _telling(*pair))
    if one["type"] == "json_invalid":
        return ApiError(f"the body is no JSON: {one.get('ctx', {}).get('error', one['msg'])}")
    said = str(one["msg"]).removeprefix("Value error, ")
    if not param:
        return ApiError(f"the body: {said}; a JSON object with Content-Type: application/json is needed")
    return ApiError(f"{param}: {said}", param=param)


def _telling(path: str, error: Mapping[str, Any]) -> tuple[bool, int, list[int]]:
    places = [int(place) for place in re.findall(r"\[(\d+)\]", path)]
    return not error["type"].endswith("_type"), path.count(".") + len(places), places


def _path(error: Mapping[str, Any], body: Any) -> str:
    """Where in the body an error lies. The names of the types that were tried stand between, and are left out.

    >>> _path({"loc": ("body", "stop", "list[str]", 1), "type": "string_type"}, {"stop": ["a", 2]})
    'stop[1]'
    """
    path, here, (_, *steps) = "", body, error["loc"]
    for i, step in enumerate(steps):
        if isinstance(here, Mapping) and step in here:
            path, here = f"{path}.{step}", here[step]
        elif isinstance(here, Sequence) and isinstance(step, int) and step < len(here):
            path, here = f"{path}[{step}]", here[step]
        elif i == len(steps) - 1 and error["type"] == "missing":
            path = f"{path}.{step}"
    return path.removeprefix(".")


def _kind(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error"
    )


def _encodable(text: str) -> str:
    """`text` without half surrogate pairs, which JSON can bring and no answer can carry."""
    return text.encode("utf-8", errors="replace").decode()
