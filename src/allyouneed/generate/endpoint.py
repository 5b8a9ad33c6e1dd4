"""One OpenAI-compatible endpoint over HTTP: requests, server-sent events, and errors of one line.

Knows URLs, statuses and JSON, and asks once. Who asks again is `caller`; what is asked for, `remote` knows.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from email.utils import mktime_tz, parsedate_tz
from math import inf
from typing import Any, TypeVar

import httpx

from allyouneed.core.errors import InputError, RemoteError
from allyouneed.generate.language_model import AccessError, LateError

Answered = TypeVar("Answered")

PASSING = {408, 409, 429}  # besides 5xx: statuses after which the same request may succeed
LONGEST_PAUSE = 120.0  # seconds; a server that asks for more is not waited for
PROBE = 5.0  # seconds that a server has to answer whether it is well


class PassingError(RemoteError):
    """A failure that may pass; the server asks for a pause of `pause` seconds."""

    pause = 0.0


class Endpoint:
    """Sends each request once.

    Args:
        url: `http(s)://host[:port][/path]`; without a path `/v1` is meant.
        api_key: sent as a bearer token and shown nowhere; None: the environment's OPENAI_API_KEY.
        concurrency: how many requests it should be given at once.
        timeout: seconds without a byte from the server.

    Raises:
        InputError: no such URL, a key that no header can hold, or no time to wait.
    """

    def __init__(self, url: str, api_key: str | None = None, *, concurrency: int = 8, timeout: float = 120.0) -> None:
        base, key = _base(url), (os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key).strip()
        if not (key.isascii() and key.isprintable()):
            raise InputError("the API key holds characters that no HTTP header may; copy it again")
        if not 0 < timeout < inf:
            raise InputError(f"timeout={timeout}; seconds above 0 are needed")
        self.name, self.concurrency, self.timeout, self._key = _shown(str(base)), concurrency, timeout, key
        self._client = httpx.Client(
            base_url=base.copy_with(userinfo=b""),  # httpx logs addresses whole
            auth=(base.username, base.password) if base.username else None,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
        )

    def models(self, timeout: float | None = None) -> list[str]:
        """The names that it lists, asked for with a time-out of its own where one is given."""
        text = self._open("GET", "models", timeout=timeout).text
        return self._read(text, lambda answer: [str(entry["id"]) for entry in answer["data"]])

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], Answered]) -> Answered:
        """What `read` takes out of the JSON that answers `body`.

        Raises:
            AccessError: the key was refused.
            LateError: the server works on, longer than the time-out.
            PassingError: a connection error, a server that is silent altogether, 408, 409, 429 or 5xx.
            RemoteError: any other failure, no JSON, or JSON that `read` makes no sense of.
        """
        return self._read(self._open("POST", path, body).text, read)

    def stream(self, path: str, body: Mapping[str, Any], read: Callable[[Any], Answered]) -> Iterator[Answered]:
        """What `read` takes out of each event that answers `body`. It is opened when this is called.

        Raises:
            AccessError, LateError: as `post`, at the opening.
            PassingError: as `post`, at the opening.
            RemoteError: as `post`; the stream broke off, or ended without the closing `[DONE]`.
        """
        return self._events(self._open("POST", path, body, stream=True), read)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _events(self, response: httpx.Response, read: Callable[[Any], Answered]) -> Iterator[Answered]:
        try:
            for data in events(response.iter_bytes()):
                if data == "[DONE]":
                    return
                yield self._read(data, read)
        except httpx.RequestError as error:
            raise RemoteError(f"{self.name}: the stream broke off: {_reason(error)}") from None
        finally:
            response.close()
        raise RemoteError(f"{self.name}: the stream ended without [DONE]; what came is not the whole text")

    def _open(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        stream: bool = False,
        timeout: float | None = None,
    ) -> httpx.Response:
        patience = self.timeout if timeout is None else timeout
        limits = httpx.Timeout(patience, connect=min(patience, 10.0))
        try:
            request = self._client.build_request(method, path, json=body, timeout=limits)
            response = self._client.send(request, stream=stream)
            if not response.is_success:
                response.read()
        except httpx.RequestError as error:
            if body is not None and isinstance(error, httpx.ReadTimeout):
                self._check_well()
                mend = "ask for fewer tokens, or wait longer (timeout)"
                raise LateError(
                    f"{self.name}: no answer within {patience:g} s, though the server is well; {mend}"
                ) from None
            raise PassingError(f"{self.name}: {_reason(error)}") from None
        if response.is_success:
            return response
        raise self._failure(response)

    def _check_well(self) -> None:
        """Refuse to blame a request for the silence of a server that answers nothing at all."""
        try:
            self.models(timeout=min(self.timeout, PROBE))
        except PassingError:
            raise
        except (InputError, RemoteError):  # it answers: whatever it refuses, it is there
            return

    def _failure(self, response: httpx.Response) -> Exception:
        status = response.status_code
        line = f"{self.name}: {status} {self._message(response.text) or response.reason_phrase}"
        if status == 401:
            return AccessError(f"{line}; set OPENAI_API_KEY, or pass api_key")
        if status not in PASSING and status < 500:
            return RemoteError(line, status)
        pause = _retry_after(response.headers.get("Retry-After", ""))
        asked = f" (asks to wait {pause:.0f} s)" if pause > LONGEST_PAUSE else ""
        failure = PassingError(line + asked, status)
        failure.pause = pause
        return failure

    def _read(self, text: str, read: Callable[[Any], Answered]) -> Answered:
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            raise RemoteError(f"{self.name}: the answer is no JSON: {self._line(text)!r}") from None
        if isinstance(answer, dict) and answer.get("error"):
            raise RemoteError(f"{self.name}: {self._message(text)}")
        try:
            return read(answer)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise RemoteError(f"{self.name}: the answer lacks what was asked for: {self._line(text)!r}") from None

    def _message(self, text: str) -> str:
        """The server's own words, in whichever of the usual places they stand."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return self._line(text)
        for name in ("error", "message", "detail"):  # OpenAI's, older vLLM's and FastAPI's shapes
            if isinstance(found, dict) and found.get(name):
                found = found[name]
        return self._line(found if isinstance(found, str) else json.dumps(found))

    def _line(self, text: str) -> str:
        shown = text.replace(self._key, "[key]") if self._key else text  # some servers repeat what they refuse
        return " ".join(shown.split())[:300]


def events(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event (WHATWG HTML, sec. 9.2). Bytes are decoded line by line: a chunk may end
    within a character, and characters that Unicode counts as line breaks may stand in the data.

    >>> list(events([b"data: {}", b"\\n\\n: ping\\n\\ndata: a\\r\\ndata: b\\r\\n\\r\\n"]))
    ['{}', 'a\\nb']
    """
    rest, data = b"", []
    for chunk in itertools.chain(chunks, [b"\n\n"]):  # the last event may lack the empty line that closes it
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            text = line.removesuffix(b"\r").decode("utf-8", errors="replace")
            if text.startswith("data:"):
                data.append(text[5:].removeprefix(" "))
            elif not text and data:
                yield "\n".join(data)
                data = []


def _base(url: str) -> httpx.URL:
    try:
        base = httpx.URL(url.strip())
        base.host.encode("idna")  # as the look-up of the name will
    except (httpx.InvalidURL, UnicodeError):
        base = httpx.URL()
    if base.scheme not in ("http", "https") or not base.host or (base.port or 0) > 65535 or base.query:
        raise InputError(f"endpoint {_shown(url)!r} is no address; write http://host:port/v1")
    return base.copy_with(path="/v1") if base.path in ("", "/") else base


def _shown(url: str) -> str:
    """An address without a password or a query, which may hold keys."""
    return re.sub(r"//[^/]*@", "//", url).partition("?")[0].rstrip("/")


def _reason(error: httpx.RequestError) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _retry_after(header: str) -> float:
    """Seconds asked for: a number, or a date (RFC 9110, sec. 10.2.3); 0 where neither.

    >>> _retry_after("2.5"), _retry_after("soon")
    (2.5, 0.0)
    """
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    date = parsedate_tz(header)
    return max(0.0, mktime_tz(date) - time.time()) if date else 0.0
