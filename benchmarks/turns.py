"""Two sides take turns in one run, so that what else the machine does falls on both."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

Case = Callable[[], object]


class Seconds(NamedTuple):
    """Of the clock, and of the processor, which other work on the machine disturbs less."""

    clock: float
    processor: float


def seconds(case: Case) -> Seconds:
    started, busy = time.perf_counter(), time.process_time()
    case()
    return Seconds(time.perf_counter() - started, time.process_time() - busy)


def turns(theirs: Case, ours: Case, *, rounds: int, warmup: int = 0) -> list[tuple[Seconds, Seconds]]:
    """What theirs and ours took, round by round; they begin by turns. The first `warmup` rounds are left out."""
    found = []
    for number in range(warmup + rounds):
        if number % 2:
            mine, other = seconds(ours), seconds(theirs)
        else:
            other, mine = seconds(theirs), seconds(ours)
        found.append((other, mine))
    return found[warmup:]
