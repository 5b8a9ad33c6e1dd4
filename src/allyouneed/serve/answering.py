"""From generations to HTTP: events as they come, whole answers, and clients that hang up on either."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus, SendTimeoutError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from allyouneed.serve.driver import Generation
from allyouneed.serve.errors import LOG, translated

T = TypeVar("T")
IGNORED = "X-Ignored-Fields"
HUNG_UP = 499  # nginx's number for a client that did not wait; nobody reads it but the log

AppStatus.disable_automatic_graceful_drain()  # streams end as their answers do, also while the server drains


class HungUpError(Exception):
    """The client closed its connection before the answer was there."""


class EventStream(EventSourceResponse):
    """Server-sent events of one generation, which is given up when the stream ends in whatever way."""

    def __init__(
        self,
        events: AsyncIterator[Mapping[str, Any]],
        generation: Generation,
        *,
        headers: Mapping[str, str],
        send_seconds: float,
        named: bool = False,
    ) -> None:
        """`named`: each event has its `type` for a name, and none says that it was the last."""
        self.generation = generation
        super().__init__(_told(events, named), headers=headers, sep="\n", send_timeout=send_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            LOG.warning("a client took nothing of its stream any more and was left")
        finally:
            self.generation.close()


async def _told(events: AsyncIterator[Mapping[str, Any]], named: bool) -> AsyncIterator[dict[str, str]]:
    """The events as text. What goes wrong is one more of them, in the shape of any error."""
    try:
        async for event in events:
            yield ({"event": event["type"]} if named else {}) | {"data": dumped(event)}
    except Exception as error:
        body = translated(error).body()
        yield (
            {"event": "error", "data": dumped({"type": "error", **body["error"]})} if named else {"data": dumped(body)}
        )
    if not named:
        yield {"data": "[DONE]"}


async def whole(
    request: Request, generation: Generation, work: Coroutine[Any, Any, Any], headers: Mapping[str, str]
) -> Response:
    """The JSON that `work` makes of a generation, which is given up when the client does not wait for it."""
    try:
        answer = await unless_gone(request, work)
        return await asyncio.to_thread(JSONResponse, answer, headers=dict(headers))  # it may be long
    except HungUpError:
        return Response(status_code=HUNG_UP)
    finally:
        generation.close()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives.

    Raises:
        HungUpError: the client did not wait.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HungUpError
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def warned(ignored: Sequence[str]) -> dict[str, str]:
    """The header that names the fields passed over."""
    if not ignored:
        return {}
    plain = re.compile(r"[\w.\[\]-]+", re.ASCII)  # others are quoted: a header's value holds no odd or outer spaces
    shown = ", ".join(name if plain.fullmatch(name) else ascii(name) for name in ignored[:20])[:1000].strip()
    LOG.info("fields that nobody knows were ignored: %s", shown)
    return {IGNORED: shown}


def dumped(value: Any) -> str:
    """JSON in one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
