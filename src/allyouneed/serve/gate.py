"""What stands before all routes: the key, the size of bodies and the time they take, how many requests at once.

Plain ASGI. A body is read here, whole and within limits, before anything else is done for its request.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from allyouneed.serve.errors import ApiError, busy
from allyouneed.serve.metrics import Metrics
from allyouneed.serve.settings import Settings, is_loopback

OPEN = ("/health",)  # routes without a key and without a limit of requests
ALONE = ("/health", "/metrics")  # routes that are answered whatever else is under way


class Gate:
    """Lets requests through to `app`, or refuses them in OpenAI's shape."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.under_way = 0  # requests whose bodies are there
        self.receiving = self.received = 0  # requests whose bodies are not, and bytes of these

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the application's own start and end."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        counted = self._counting(scope, send)
        try:
            self._check_host(scope)
            self._check_key(scope)
            await self._within(scope, receive, counted)
        except ApiError as error:
            await error.response()(scope, receive, counted)

    def _check_host(self, scope: Scope) -> None:
        """Without a key, answer this machine's own names only: a page of elsewhere whose name was made to lead here
        (DNS rebinding) sends its own.
        """
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if (
            self.settings.api_key is None
            and host
            and _name(host) != self.settings.host
            and not is_loopback(_name(host))
        ):
            said = f"Host {host[:100]!r} is no name of this machine; without --api-key it answers as localhost only"
            raise ApiError(said, status=403, code="host_refused")

    def _check_key(self, scope: Scope) -> None:
        key = self.settings.api_key
        if key is None or scope["path"] in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, sent = given.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(sent.strip(), key.encode()):
            raise ApiError(
                "the API key is missing or wrong; send Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _within(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in ALONE:
            await self.app(scope, receive, send)
            return
        self._check_room()
        body = await self._body(scope, receive)
        if body is None:
            return
        self._check_room()
        self.under_way += 1
        try:
            await self.app(scope, _again(body, receive), send)
        finally:
            self.under_way -= 1

    def _check_room(self) -> None:
        """Only requests that are whole take a place of these: slow bodies have places of their own."""
        if self.under_way >= self.settings.max_requests:
            raise busy(f"{self.under_way} requests are under way, as many as this server takes; come again soon")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client hung up."""
        if self.receiving >= self.settings.max_receiving:
            raise busy(f"{self.receiving} bodies are being received, as many as this server takes; come again soon")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.settings.max_body:
            raise self._too_large()
        pieces: list[bytes] = []
        size = 0
        self.receiving += 1
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    piece = message.get("body", b"")
                    pieces.append(piece)
                    size += len(piece)
                    self.received += len(piece)
                    self._check_size(size)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            said = f"the body was not there within {self.settings.body_seconds:g} s"
            raise ApiError(said, status=408, code="timeout", headers={"Connection": "close"}) from None
        finally:
            self.received -= size
            self.receiving -= 1

    def _check_size(self, size: int) -> None:
        if size > self.settings.max_body:
            raise self._too_large()
        if self.received > self.settings.most_body_bytes:
            raise busy("too many large bodies arrive at once; come again soon")

    def _too_large(self) -> ApiError:
        said = f"the body is larger than the {self.settings.max_body} bytes that this server takes"
        return ApiError(said, status=413, code="body_too_large", headers={"Connection": "close"})

    def _counting(self, scope: Scope, send: Send) -> Send:
        """`send`, which counts the answer by its route, or by none where there is no such route."""

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self.metrics.answers.labels(route, str(message["status"])).inc()
            await send(message)

        return counting


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, once more; then whatever else comes, which is that the client hung up."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
