"""Asking a service until it answers, and for many requests at once: pauses, retries, order.

Knows nothing of HTTP: `endpoint` and `fleet` ask once and say which failures may pass.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

from allyouneed.core.errors import RemoteError
from allyouneed.generate.endpoint import LONGEST_PAUSE, PassingError

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")
Read = Callable[[Any], Answered]

FIRST_PAUSE = 0.5  # seconds, doubled at each further try


class Service(Protocol):
    """What answers requests, each asked for once: an endpoint, or a fleet of them."""

    name: str
    concurrency: int  # how many requests it should be given at once

    def models(self) -> list[str]:
        """The names of the models that can be asked there."""

    def post(self, path: str, body: Mapping[str, Any], read: Read[Answered]) -> Answered:
        """What `read` takes out of the JSON that answers `body`; `PassingError` where another try may succeed."""

    def stream(self, path: str, body: Mapping[str, Any], read: Read[Answered]) -> Iterator[Answered]:
        """What `read` takes out of each event that answers `body`; `PassingError` only at the opening, at once."""

    def close(self) -> None:
        """Close the connections."""


class Caller:
    """Asks a service, again where it may help.

    Args:
        service: who is asked.
        retries: further tries, ever further apart, after a failure that may pass.
        sleep: how to wait between tries.
    """

    def __init__(self, service: Service, *, retries: int = 5, sleep: Callable[[float], None] = time.sleep) -> None:
        self.service, self.name, self.retries, self._sleep = service, service.name, retries, sleep
        self._jitter = random.Random(0)
        self._pool = ThreadPoolExecutor(service.concurrency, thread_name_prefix="caller")

    def models(self) -> list[str]:
        """The names of the models that can be asked."""
        return self._until_answered(self.service.models)

    def post(self, path: str, body: Mapping[str, Any], read: Read[Answered]) -> Answered:
        """What `read` takes out of the JSON that answers `body`."""
        return self._until_answered(lambda: self.service.post(path, body, read))

    def stream(self, path: str, body: Mapping[str, Any], read: Read[Answered]) -> Iterator[Answered]:
        """What `read` takes out of each event that answers `body`. Only the opening is tried again."""
        yield from self._until_answered(lambda: self.service.stream(path, body, read))

    def begin(self, ask: Callable[[Asked], Answered], request: Asked) -> Future[Answered]:
        """`ask` for a request as soon as fewer are under way than the service should be given."""
        return self._pool.submit(ask, request)

    def map(self, ask: Callable[[Asked], Answered], requests: Mapping[int, Asked]) -> dict[int, Answered]:
        """`ask` for each request, as many at once as the service should be given; the keys, the caller's indices, name
        the one that fails.

        Raises:
            RemoteError: one failed; those not yet begun are dropped, answers that came are in its `done`.
        """
        futures = {i: self.begin(ask, request) for i, request in requests.items()}
        try:
            wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:  # also on Ctrl-C
            for future in futures.values():
                future.cancel()
        begun = {i: future for i, future in futures.items() if not future.cancelled()}
        errors = {i: error for i, future in begun.items() if (error := future.exception())}
        done = {i: future.result() for i, future in begun.items() if i not in errors}
        for i, error in errors.items():
            if isinstance(error, RemoteError):
                raise RemoteError(f"request {i}: {error}", error.status, done) from None
            raise error
        return done

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(cancel_futures=True)
        self.service.close()

    def _until_answered(self, ask: Callable[[], Answered]) -> Answered:
        for attempt in range(self.retries):
            try:
                return ask()
            except PassingError as failure:
                if failure.pause > LONGEST_PAUSE:
                    raise
                backoff = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * self._jitter.uniform(0.5, 1.0)
                self._sleep(max(failure.pause, backoff))
        return ask()
