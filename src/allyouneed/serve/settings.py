"""How a server is set up: what it listens on, and what it lets clients do."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from math import inf

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """Limits in seconds, bytes and requests. `api_key` never leaves it.

    >>> Settings(host="0.0.0.0")
    Traceback (most recent call last):
    allyouneed.core.errors.InputError: --host 0.0.0.0 is open to other machines; set --api-key, or listen on 127.0.0.1
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    context: int | None = None  # the most tokens of one request, prompt and answer; None: what the model holds
    max_requests: int = 256  # under way at once, waiting ones included; more are sent away
    max_receiving: int = 1024  # whose bodies are not there yet
    max_body: int = 4 << 20  # of one body
    most_body_bytes: int = 256 << 20  # of all bodies that are being received
    body_seconds: float = 30.0  # until a body is there
    header_seconds: float = 10.0  # until a request's head is there
    timeout: float = 600.0  # until an answer is whole
    send_seconds: float = 60.0  # until a client has taken what it is sent
    drain: float = 30.0  # for answers under way when the server is told to stop

    def __post_init__(self) -> None:
        """Refuse what is unsafe or has no meaning."""
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise InputError("--api-key holds characters that no HTTP header may, or nothing at all")
        if self.api_key is None and not is_loopback(self.host):
            raise InputError(f"--host {self.host} is open to other machines; set --api-key, or listen on 127.0.0.1")
        if not 0 <= self.port < 65536:
            raise InputError(f"--port {self.port}: it must be between 0 (any free one) and 65535")
        for name in ("max_requests", "max_body", "body_seconds", "header_seconds", "timeout", "context"):
            if (value := getattr(self, name)) is not None and not 0 < value < inf:
                raise InputError(f"--{name.replace('_', '-')} {value}: it must be above 0")
        if not 0 <= self.drain < inf:
            raise InputError(f"--drain {self.drain}: it must be 0 or more")

    def __repr__(self) -> str:
        key = None if self.api_key is None else "…"
        return f"Settings(host={self.host!r}, port={self.port}, api_key={key!r})"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`.

    >>> [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "")]
    [True, True, True, False, False]
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
