"""How long things take, compared on one machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

Given = TypeVar("Given")


def ratios(
    one: Callable[[Given], object],
    other: Callable[[Given], object],
    *,
    given: Iterator[Given],
    repeats: int,
    warm_up: int = 3,
) -> list[float]:
    """How long the other takes over how long the one takes, `repeats` times, each with the same next of `given`.

    They take turns, so that what else the machine does disturbs both alike; the first `warm_up` times do not count.
    """
    found = []
    for _ in range(warm_up + repeats):
        what, seconds = next(given), []
        for work in (one, other):
            began = time.perf_counter()
            work(what)
            seconds.append(time.perf_counter() - began)
        found.append(seconds[1] / seconds[0])
    return found[warm_up:]


def in_turn(
    cases: Mapping[Given, Callable[[], object]], *, rounds: int, repeats: int = 8, warm_up: int = 2
) -> dict[Given, list[float]]:
    """Seconds that each case takes, `rounds` times: of each round the fastest of `repeats` calls in a row.

    Every round has every case, in an order drawn anew, so that no case has a time of day or a neighbour of its own; the
    fastest call is the one that nothing else on the machine interrupted. What slows all calls alike (another process
    that fills caches and memory) stays, and widens the spread over rounds. The first `warm_up` rounds do not count.

    >>> sorted(len(seconds) for seconds in in_turn({"one": int, "other": list}, rounds=3).values())
    [3, 3]
    """
    found: dict[Given, list[float]] = {name: [] for name in cases}
    order, source = list(cases), random.Random(0)
    for _ in range(warm_up + rounds):
        source.shuffle(order)
        for name in order:
            found[name].append(min(_seconds(cases[name]) for _ in range(repeats)))
    return {name: seconds[warm_up:] for name, seconds in found.items()}


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
