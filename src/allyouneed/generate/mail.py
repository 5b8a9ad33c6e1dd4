"""Who is told of what: steps and faults of requests, kept for whoever waits for them.

A request has a box of its own where one call waits for it alone; of all others the next `take` tells. So several
callers take turns on one engine, and a pass that breaks off later loses nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from allyouneed.generate.requests import RequestError, Step


class Mail:
    """Steps by the number of their request.

    >>> mail = Mail()
    >>> mail.open(1)
    >>> for number in (0, 1):
    ...     mail.tell(Step(number, token=5, logprob=-1.0, finish_reason=None))
    >>> [step.request for step in mail.take()], [step.request for step in mail.of(1)], mail.taken
    ([0], [1], True)
    """

    def __init__(self) -> None:
        self._boxes: dict[int, deque[Step]] = {}
        self._broken: dict[int, BaseException] = {}  # what broke requests that have a box
        self._steps: list[Step] = []  # of those that have none
        self._errors: list[RequestError] = []  # and what broke them

    @property
    def taken(self) -> bool:
        """Whether there is nothing to `take`."""
        return not (self._steps or self._errors)

    def open(self, number: int) -> None:
        """Give a request a box of its own."""
        self._boxes[number] = deque()

    def close(self, number: int) -> None:
        """Throw its box away, with all that is in it."""
        self._boxes.pop(number, None)
        self._broken.pop(number, None)

    def drop(self, number: int) -> None:
        """Throw away what has come for a request without a box."""
        self._steps = [step for step in self._steps if step.request != number]

    def tell(self, step: Step) -> None:
        """Keep a step."""
        self._boxes.get(step.request, self._steps).append(step)

    def fault(self, number: int, error: BaseException) -> None:
        """Keep what broke a request. Of one without a box only an `Exception` is told."""
        if number in self._boxes:
            self._broken[number] = error
        elif isinstance(error, Exception):
            self._errors.append(RequestError(number, error))

    def take(self) -> list[Step]:
        """All steps of requests without a box.

        Raises:
            RequestError: what broke one of them; what has come stays for the next call.
        """
        if self._errors:
            error = self._errors.pop(0)
            raise error from error.cause
        steps, self._steps = self._steps, []
        return steps

    def of(self, number: int) -> Iterator[Step]:
        """What is in a request's box.

        Raises:
            BaseException: what broke it, after its steps.
        """
        while self._boxes[number]:
            yield self._boxes[number].popleft()
        if number in self._broken:
            raise self._broken.pop(number)
