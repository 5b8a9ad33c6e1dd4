"""Several endpoints that serve the same model, asked as if they were one.

Each request goes to the endpoint with the fewest under way. One that fails rests, and the request goes on to the next
at once; when its rest is over it is asked for its models, beside the traffic, and is one of the fleet again when it
answers. What a request says is the same whichever endpoint answers it: seeds included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import Any, TypeVar

from allyouneed.core.errors import InputError, RemoteError
from allyouneed.generate.endpoint import PROBE, Endpoint, PassingError

Answered = TypeVar("Answered")
Read = Callable[[Any], Answered]

FIRST_REST = 1.0  # seconds, doubled at each further failure in a row
LONGEST_REST = 60.0


class Member:
    """An endpoint of a fleet: what it is doing and how it fares."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.posts = self.streams = self.turn = self.failures = 0
        self.rests_until, self.probed = 0.0, False

    @property
    def well(self) -> bool:
        """Whether its last answer was one."""
        return self.failures == 0

    @property
    def load(self) -> tuple[int, int]:
        """Requests under way; among equals, whose last turn is longest ago."""
        return self.posts + self.streams, self.turn

    @property
    def has_room(self) -> bool:
        """Whether it may be given one more request."""
        return self.posts < self.endpoint.concurrency


class Fleet:
    """Has the face of an `Endpoint` over several.

    Args:
        endpoints: at least one, each with its own `concurrency`, which holds for it also when others are down.
        clock: seconds that never go back.

    Raises:
        InputError: no endpoint, or one named twice.
    """

    def __init__(self, endpoints: Sequence[Endpoint], *, clock: Callable[[], float] = time.monotonic) -> None:
        names = [endpoint.name for endpoint in endpoints]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice or not names:
            raise InputError(f"fleet: {twice} is named twice" if twice else "fleet: no endpoint; name at least one")
        self.members = [Member(endpoint) for endpoint in endpoints]
        self.name, self.concurrency = ", ".join(names), sum(endpoint.concurrency for endpoint in endpoints)
        self._clock, self._turns, self._changed = clock, 0, Condition()
        self._pool = ThreadPoolExecutor(len(names), thread_name_prefix="fleet")

    def models(self) -> list[str]:
        """The names that every endpoint lists which can be reached.

        Raises:
            InputError: the endpoints have no model in common.
            PassingError: none can be reached.
        """
        answers = list(self._pool.map(self._models, self.members))
        listed = {m.endpoint.name: names for m, names in zip(self.members, answers, strict=True) if names is not None}
        if not listed:
            return self._first(lambda endpoint: endpoint.models())  # says why
        first, *rest = listed.values()
        common = [name for name in first if all(name in names for names in rest)]
        if not common and any(listed.values()):
            told = "; ".join(f"{name} lists {', '.join(names) or 'none'}" for name, names in listed.items())
            raise InputError(f"fleet: the endpoints serve no model in common: {told}")
        return common

    def post(self, path: str, body: Mapping[str, Any], read: Read[Answered]) -> Answered:
        """What `read` takes out of the JSON that answers `body`.

        Raises:
            PassingError: every endpoint failed that was well, or the one whose rest ends first where none was.
            RemoteError: as of an `Endpoint`; what is wrong with the request itself is not asked of another.
        """
        return self._first(lambda endpoint: endpoint.post(path, body, read))

    def stream(self, path: str, body: Mapping[str, Any], read: Read[Answered]) -> Iterator[Answered]:
        """What `read` takes out of each event that answers `body`. The opening goes from endpoint to endpoint as a
        `post` does; a stream that has begun stays where it is.
        """

        def opened(endpoint: Endpoint) -> tuple[Endpoint, Iterator[Answered]]:
            return endpoint, endpoint.stream(path, body, read)

        return self._counted(*self._first(opened))

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(cancel_futures=True)
        for member in self.members:
            member.endpoint.close()

    def _first(self, ask: Callable[[Endpoint], Answered]) -> Answered:
        """What the first endpoint that can answers."""
        failures: dict[Member, PassingError] = {}
        while member := self._take(failures):
            try:
                answer = ask(member.endpoint)
            except PassingError as failure:
                failures[member] = failure
                self._failed(member, failure.pause)
            else:
                self._answered(member)
                return answer
            finally:
                self._give_back(member)
        raise min(failures.values(), key=lambda failure: failure.pause)

    def _take(self, tried: Mapping[Member, Any]) -> Member | None:
        """The least loaded endpoint that is well and not `tried`; before any, also one that is not well."""
        with self._changed:
            self._probe_those_due()
            while well := [member for member in self.members if member.well and member not in tried]:
                if free := [member for member in well if member.has_room]:
                    return self._given(min(free, key=lambda member: member.load))
                self._changed.wait()
            if tried:
                return None
            return self._given(min(self.members, key=lambda member: member.rests_until))

    def _given(self, member: Member) -> Member:
        self._turns += 1
        member.turn = self._turns
        member.posts += 1
        return member

    def _give_back(self, member: Member) -> None:
        with self._changed:
            member.posts -= 1
            self._changed.notify_all()

    def _counted(self, endpoint: Endpoint, pieces: Iterator[Answered]) -> Iterator[Answered]:
        """`pieces`, which are work of `endpoint` as long as they come."""
        member = next(member for member in self.members if member.endpoint is endpoint)
        with self._changed:
            member.streams += 1
        try:
            yield from pieces
        finally:
            with self._changed:
                member.streams -= 1

    def _failed(self, member: Member, pause: float) -> None:
        """Let it rest; of requests that fail together the first alone makes the rest longer."""
        with self._changed:
            now = self._clock()
            if member.well or member.rests_until <= now:
                member.failures += 1
                pause = max(pause, min(LONGEST_REST, FIRST_REST * 2 ** (member.failures - 1)))
            member.rests_until = max(member.rests_until, now + pause)
            self._changed.notify_all()

    def _answered(self, member: Member) -> None:
        with self._changed:
            member.failures, member.rests_until = 0, 0.0
            self._changed.notify_all()

    def _probe_those_due(self) -> None:
        for member in self.members:
            if not member.well and not member.probed and member.rests_until <= self._clock():
                member.probed = True
                self._pool.submit(self._probe, member)

    def _probe(self, member: Member) -> None:
        try:
            self._models(member)
        except (InputError, RemoteError):  # it answers: whatever it refuses, it is there
            self._answered(member)
        finally:
            member.probed = False

    def _models(self, member: Member) -> list[str] | None:
        """The names that one endpoint lists, None where it cannot be reached."""
        try:
            names = member.endpoint.models(timeout=PROBE)
        except PassingError as failure:
            self._failed(member, failure.pause)
            return None
        self._answered(member)
        return names
