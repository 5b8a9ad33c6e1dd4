"""Rows that are asked for through a queue, always enough of them to keep the model busy, and told of in their order.

How a model answers is the queue's business, what becomes of the answers `job`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from allyouneed.core.errors import InputError, RemoteError
from allyouneed.generate.language_model import AccessError, Answer, Completion, LateError, Queue
from allyouneed.generate.rows import Row

AHEAD = 16  # answers kept for an earlier one that takes long, for each request under way
ROWS_FAULT = {400, 413, 422}  # statuses that speak of the request; after any other, the next row would fare no better


@dataclass(eq=False)
class Place:
    """A row, or the line that refuses it, and what came of it: None as long as nothing has."""

    row: Row | dict[str, Any]
    outcome: Completion | str | None = None  # a text: what is wrong with the row


class InOrder:
    """Answers rows.

    Args:
        queue: answers them; nobody else asks it.
        rows: and lines that refuse rows; they are taken as they are needed.
        ahead: the most that are kept at once, those under way included; None: `AHEAD` for each that may be.
    """

    def __init__(self, queue: Queue, rows: Iterator[Row | dict[str, Any]], ahead: int | None = None) -> None:
        self.queue, self.rows, self.ahead = queue, rows, ahead or AHEAD * queue.width
        self._places: deque[Place] = deque()
        self._under_way: dict[int, Place] = {}
        self._asked = 0
        self._failure: Exception | None = None

    def finished(self) -> Iterator[list[Place]]:
        """All rows in order, in pieces, each as soon as it is done.

        Raises:
            InputError: a key or a model is refused.
            RemoteError: an endpoint failed for good; rows before those it failed for have come by then.
        """
        while True:
            self._fill()
            if done := self._first():
                yield done
            elif came := self.queue.answers():
                self._hear(came)
            elif self._failure:
                raise self._failure
            else:
                return

    def _fill(self) -> None:
        """Have as many again wait as are under way, so that none that ends leaves a gap."""
        while not self._failure and len(self._under_way) < 2 * self.queue.width and len(self._places) < self.ahead:
            row = next(self.rows, None)
            if row is None:
                return
            self._places.append(Place(row))
            self._ask(self._places[-1])

    def _ask(self, place: Place) -> None:
        if isinstance(place.row, dict):
            place.outcome = ""
            return
        number, self._asked = self._asked, self._asked + 1
        try:
            self.queue.ask(number, place.row.prompt, place.row.sampling)
        except InputError as error:
            place.outcome = str(error)
        else:
            self._under_way[number] = place

    def _hear(self, came: Mapping[int, Answer]) -> None:
        for number, answer in came.items():
            place = self._under_way.pop(number)
            if isinstance(answer, Completion):
                place.outcome = answer
            elif _of_row(answer):
                place.outcome = str(answer)
            else:
                self._failure = self._failure or _final(answer)
                self.queue.stop()

    def _first(self) -> list[Place]:
        """Take those at the front that are done."""
        done = []
        while self._places and self._places[0].outcome is not None:
            done.append(self._places.popleft())
        return done


def _of_row(error: InputError | RemoteError) -> bool:
    """Whether the row is to blame, and the others may fare better."""
    if isinstance(error, RemoteError):
        return isinstance(error, LateError) or error.status in ROWS_FAULT
    return not isinstance(error, AccessError)


def _final(error: InputError | RemoteError) -> Exception:
    if not isinstance(error, RemoteError):
        return error
    return RemoteError(f"{error}; what was answered before is kept: run it again to go on", error.status)
