"""Load on an engine: requests that arrive when they will, served by one engine, and what each of them had to wait.

The load is open: when a request comes does not depend on how the earlier ones fare, so that an engine that is too slow
grows a queue instead of slowing its users down (Schroeder et al. 2006, sec. 2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from allyouneed.core.seeds import derive
from allyouneed.generate.engine import Engine
from allyouneed.generate.requests import Request, Step


@dataclass(frozen=True)
class Arrival:
    """A request and when it comes, in seconds after the beginning."""

    at: float
    request: Request


@dataclass(frozen=True)
class Served:
    """What became of an arrival: its tokens, when it came and when each of them did, in seconds after the beginning."""

    arrived: float
    tokens: tuple[int, ...]
    times: tuple[float, ...]

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.arrived

    @property
    def whole(self) -> float:
        """Seconds to the last token."""
        return self.times[-1] - self.arrived

    @property
    def pauses(self) -> list[float]:
        """Seconds between a token and the next; tokens told of together have none between them."""
        return [later - sooner for sooner, later in pairwise(self.times)]


Admits = Callable[[Engine, Sequence[Arrival]], Sequence[Request]]  # those of the first that wait that now may run


def poisson(requests: Sequence[Request], rate: float | None, seed: int) -> list[Arrival]:
    """The requests, in order, arriving at random with `rate` a second on average; None: all at once.

    >>> from allyouneed.generate.language_model import Sampling
    >>> [arrival.at for arrival in poisson([Request(ids=[1], sampling=Sampling())] * 2, None, seed=0)]
    [0.0, 0.0]
    """
    scale = 0.0 if rate is None else 1 / rate
    gaps = np.random.default_rng(derive(seed, "arrivals")).exponential(scale, len(requests))
    return [Arrival(float(at), request) for at, request in zip(gaps.cumsum(), requests, strict=True)]


def continuous(engine: Engine, waiting: Sequence[Arrival]) -> Sequence[Request]:
    """All that wait: the engine takes them into its batch as others leave it (Yu et al. 2022, sec. 3.1: Orca)."""
    return [arrival.request for arrival in waiting]


@dataclass(frozen=True)
class Static:
    """Batches of up to `size`, the next once the last is done; all of a batch are computed until its longest answer is
    whole, as where a batch is one call of a model (Yu et al. 2022, sec. 2).
    """

    size: int

    def __call__(self, engine: Engine, waiting: Sequence[Arrival]) -> Sequence[Request]:
        """None while any request runs."""
        batch = [arrival.request for arrival in waiting[: self.size]] if engine.idle else []
        longest = max((request.sampling.max_new_tokens for request in batch), default=0)
        return [replace(one, sampling=one.sampling.replace(max_new_tokens=longest)) for one in batch]


def serve(engine: Engine, arrivals: Sequence[Arrival], admits: Admits = continuous) -> list[Served]:
    """Let the engine answer all arrivals as they come; what each had, in order."""
    found: list[list[tuple[int, float]]] = [[] for _ in arrivals]
    for at, place, step in _steps(engine, arrivals, admits):
        if len(found[place]) < arrivals[place].request.sampling.max_new_tokens:  # the rest is for nobody
            found[place].append((step.token, at))
    told = [tuple(zip(*one, strict=True)) for one in found]
    return [Served(arrival.at, *one) for arrival, one in zip(arrivals, told, strict=True)]


def _steps(engine: Engine, arrivals: Sequence[Arrival], admits: Admits) -> Iterator[tuple[float, int, Step]]:
    """When each step was done, and whose it is."""
    began, given, arrived = time.perf_counter(), 0, 0
    places: dict[int, int] = {}
    while given < len(arrivals) or not engine.idle:
        now = time.perf_counter() - began
        while arrived < len(arrivals) and arrivals[arrived].at <= now:
            arrived += 1
        for request in admits(engine, arrivals[given:arrived]):
            places[engine.add(request)] = given
            given += 1
        if engine.idle and given < len(arrivals):
            time.sleep(max(0.0, arrivals[arrived].at - now) if arrived == given else 0.0)
            continue
        steps, now = engine.step(), time.perf_counter() - began
        yield from ((now, places[step.request], step) for step in steps)
