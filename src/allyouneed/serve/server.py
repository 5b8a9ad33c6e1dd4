"""uvicorn around the application: slow heads are left, and a server told to stop lets answers under way end first."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from allyouneed.core.errors import InputError
from allyouneed.serve.errors import ApiError
from allyouneed.serve.service import Service
from allyouneed.serve.settings import Settings

M_ARENA_MAX = -8  # of glibc's malloc.h
BACKSTOP = 2048  # connections; beyond them uvicorn itself says 503
LAST_SECONDS = 5.0  # for streams that were given up to tell their clients


class PatientProtocol(H11Protocol):
    """HTTP with a limit on how long the head of a request may take, from the connection or its first byte on."""

    head_seconds: float
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take some bytes, which may end the head, or begin another."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head_is_there()
        elif self._head is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._head_is_there()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """From here on it is uvicorn that closes an idle connection, until a byte comes."""
        self._head_is_there()
        super().on_response_complete()

    def _wait(self) -> None:
        self._head = self.loop.call_later(self.head_seconds, self.transport.close)

    def _head_is_there(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class Server(uvicorn.Server):
    """Drains: told to stop, it takes no new connections, and gives answers under way some seconds."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.service: Service = app.state.service
        protocol = type("Protocol", (PatientProtocol,), {"head_seconds": settings.header_seconds})
        self.drain_seconds = settings.drain
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=15,
                limit_concurrency=BACKSTOP,
                timeout_graceful_shutdown=round(settings.drain + LAST_SECONDS),
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop, gracefully."""
        timer = asyncio.get_running_loop().call_later(self.drain_seconds, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        for served in self.service.models.values():
            if served.generates:
                served.driver.fail(ApiError("the server is shutting down", status=503, code="shutting_down"))


def listen(settings: Settings) -> socket.socket:
    """The socket that the server will answer on, bound before a model is loaded.

    Raises:
        InputError: the address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((settings.host, settings.port))
    except OSError as error:
        found.close()
        where = f"--host {settings.host} --port {settings.port}"
        raise InputError(f"{where}: {error.strerror or error}; choose another") from None
    return found


def run(app: FastAPI, settings: Settings, listening: socket.socket) -> None:
    """Serve until told to stop, by SIGTERM or Ctrl-C."""
    _share_arenas()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that hangs up
    Server(app, settings).run(sockets=[listening])


def _share_arenas() -> None:
    """Let threads share two of malloc's arenas. With one for each, what over-long prompts took and gave back stays in
    several: within 40 s of the soak a small model's server grew from 359 to 533 MB, and so from 361 to 368. Only glibc
    has this knob.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
