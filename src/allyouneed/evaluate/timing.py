"""How long things take, compared on one machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
