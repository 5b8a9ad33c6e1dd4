"""Bodies as JSON that can be answered: UTF-8, whole characters, of a depth and with numbers that Python holds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

LONG = 1 << 18  # bytes of a body that is parsed aside


class StrictRequest(Request):
    """A request whose body is UTF-8 and holds whole characters only, also those that JSON spells as escapes."""

    async def json(self) -> Any:
        """The value of the body."""
        body = await self.body()
        return await asyncio.to_thread(_parsed, body) if len(body) > LONG else _parsed(body)


class StrictRoute(APIRoute):
    """A route for such requests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's function, handed a `StrictRequest`."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


def _parsed(body: bytes) -> Any:
    """The JSON value of a body.

    Raises:
        HTTPException: the body is no UTF-8, or nested too deeply, or spells half a character.
        json.JSONDecodeError: it is no JSON.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is no UTF-8: byte {error.start}") from None
    except UnicodeEncodeError:
        raise HTTPException(400, "the body spells half a surrogate pair, which is no character") from None
    except (RecursionError, ValueError):
        raise HTTPException(400, "the body is nested too deeply, or holds a number too long") from None
    return value
