"""Requests to a service that are answered as they come, as many under way as it should be given at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Generic, TypeVar

from allyouneed.core.errors import InputError, RemoteError
from allyouneed.generate.caller import Caller
from allyouneed.generate.language_model import Answer, Completion, Sampling, Turns

Request = TypeVar("Request")


class RemoteQueue(Generic[Request]):
    """Satisfies `Queue`.

    Args:
        caller: has requests sent.
        request: what is sent for a prompt; `InputError` where that cannot be said.
        answer: sends it, and waits for the answer.
    """

    def __init__(
        self,
        caller: Caller,
        request: Callable[[Turns, Sampling], Request],
        answer: Callable[[Request], Completion],
    ) -> None:
        self.width = caller.service.concurrency
        self._caller, self._request, self._answer = caller, request, answer
        self._numbers: dict[Future[Completion], int] = {}

    def ask(self, number: int, prompt: Turns, sampling: Sampling) -> None:
        """Send a request as soon as there is room; what is wrong with it is said before."""
        request = self._request(prompt, sampling)
        self._numbers[self._caller.begin(self._answer, request)] = number

    def answers(self) -> dict[int, Answer]:
        """Those that have come, at least one as long as any is under way."""
        done, _ = wait(self._numbers, return_when=FIRST_COMPLETED)
        return {self._numbers.pop(future): _outcome(future) for future in done}

    def stop(self) -> None:
        """Forget what was not sent; what was may still come."""
        self._numbers = {future: number for future, number in self._numbers.items() if not future.cancel()}


def _outcome(future: Future[Completion]) -> Answer:
    error = future.exception()
    return error if isinstance(error, InputError | RemoteError) else future.result()
