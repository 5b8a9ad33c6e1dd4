"""What a model gives back of what it was trained on, and whether it mattered where in the training that stood.

A sequence counts as memorised when the model, given its first k tokens, produces the next l greedily and exactly
(Carlini et al. 2023, def. 3.1; Biderman et al. 2023, sec. 4.2, with k = l = 32). Knows ids only, no text.

Shapes: N sequences, n bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import derive
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling

EXCHANGES, AT_ONCE = 1999, 1 << 21


def reproduced(engine: Engine, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> np.ndarray:
    """How many tokens of each continuation greedy decoding gives before the first that differs: (N,), int64.

    A row leaves the batch at its first difference, so that what is not memorised costs next to nothing.

    Args:
        engine: an engine whose `max_batch` is large, 256 say, is fastest with small models.
        prompts: at least one token each; together with its continuation a prompt fits the model's context.
        continuations: as many, at least one token each.

    Raises:
        InputError: an empty continuation, or a prompt that the engine refuses.
    """
    if any(not len(continuation) for continuation in continuations):
        raise InputError("memorisation: an empty continuation is reproduced by any model; give at least one token")
    matched = [0] * len(continuations)

    def differs(request: int, token: int) -> bool:
        same = token == int(continuations[request][matched[request]])
        matched[request] += same
        return not same

    samplings = [Sampling(max_new_tokens=len(tokens), temperature=0.0, ignore_eos=True) for tokens in continuations]
    for _ in engine.steps(prompts, samplings, differs):
        pass
    return np.array(matched, dtype=np.int64)


def memorised(engine: Engine, sequences: Tensor, *, prompt: int = 32, continuation: int = 32) -> np.ndarray:
    """Which of `sequences`, (N, at least prompt + continuation) ids, the model gives back: (N,), bool.

    Raises:
        InputError: sequences shorter than that, or longer than the model's context.
    """
    if sequences.shape[1] < prompt + continuation:
        raise InputError(f"sequences of {sequences.shape[1]} tokens; {prompt} + {continuation} are asked for")
    rows = sequences[:, : prompt + continuation].tolist()
    matched = reproduced(engine, [row[:prompt] for row in rows], [row[prompt:] for row in rows])
    return matched == continuation


@dataclass(frozen=True)
class Arrivals:
    """How evenly memorised sequences fall over the bins of an order: `counts` (n,) and what was `expected` (n,)."""

    counts: tuple[int, ...]
    expected: tuple[float, ...]  # were as many sequences memorised whatever their place
    dispersion: float  # Σ (count − expected)²/expected over n − 1: 1 for a Poisson process, more where they cluster
    p: float  # of a dispersion this large or larger, if it does not matter where in the order a sequence stands


def arrivals(
    events: np.ndarray, places: np.ndarray, *, end: int, bins: int, groups: np.ndarray | None = None, seed: int = 0
) -> Arrivals:
    """Whether memorised sequences arrive along the order as a Poisson process does (Biderman et al. 2023, sec. 4.2).

    The paper holds the counts of memorised sequences in equal stretches of the training order against a Poisson
    distribution by eye. Here their dispersion (Fisher 1925, sec. 18) is held against what it is when the same number
    of sequences is memorised whatever their place: `events` are exchanged at random among sequences (within each of
    the `groups`, where these are memorised unequally often for a reason of their own). Where few of many are memorised
    these are Poisson counts; where many are, they vary less, and the comparison stays exact.

    Args:
        events: (N,) bool, whether the sequence was memorised.
        places: (N,) or (N, m), the places from 0 to `end` where it stands in the order, one or several, −1 for none.
        end: of the order.
        bins: equal stretches of the order.
        groups: (N,) labels.
        seed: of the exchanges.

    Raises:
        InputError: nothing was memorised, so that there is nothing to test.

    >>> source = np.random.default_rng(0)
    >>> places = source.integers(0, 1000, 400)
    >>> arrivals(source.random(400) < 0.3, places, end=1000, bins=10).p > 0.05
    True
    >>> arrivals(places < 300, places, end=1000, bins=10).p
    0.0005
    """
    events, places = np.asarray(events, dtype=bool), np.asarray(places).reshape(len(events), -1)
    if not events.any():
        raise InputError("arrivals: nothing was memorised; there is no order of arrival to test")
    shown = np.zeros((len(events), bins), dtype=np.int64)  # how often each sequence stands in each bin
    rows, columns = np.nonzero(places >= 0)
    np.add.at(shown, (rows, places[rows, columns] * bins // end), 1)
    source = np.random.default_rng(derive(seed, "arrivals"))
    labels = np.zeros(len(events)) if groups is None else np.asarray(groups)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    counts = events @ shown
    expected = sum(events[some].mean() * shown[some].sum(0) for some in members)
    found, exchanged = _dispersion(counts, expected), []
    at_once = max(1, AT_ONCE // len(events))
    for size in [at_once] * (EXCHANGES // at_once) + [EXCHANGES % at_once]:
        shuffled = np.zeros((size, len(events)))
        for some in members:
            shuffled[:, some] = source.permuted(np.tile(events[some], (size, 1)), axis=1)
        exchanged.append(_dispersion(shuffled @ shown, expected))
    as_large = int((np.concatenate(exchanged) >= found * (1 - 1e-12)).sum())
    p = (1 + as_large) / (1 + EXCHANGES)
    return Arrivals(tuple(counts.tolist()), tuple(expected.tolist()), float(found), p)


def _dispersion(counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """(…, n) and (n,) -> (…)."""
    seen = expected > 0
    away = (counts - expected)[..., seen] ** 2 / expected[seen]
    return np.asarray(away.sum(-1) / max(int(seen.sum()) - 1, 1))


def auc(scores: np.ndarray, events: np.ndarray) -> float:
    """The probability that an event has a higher score than a non-event, ties counted half (Mann & Whitney 1947).

    0.5 where the score says nothing of the event, 0 or 1 where it says all.

    Raises:
        InputError: no events, or nothing else.

    >>> auc(np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True]))
    0.875
    """
    scores, events = np.asarray(scores, dtype=np.float64), np.asarray(events, dtype=bool)
    if events.all() or not events.any():
        raise InputError(f"auc: {int(events.sum())} events among {len(events)}; it takes some of both kinds")
    others = np.sort(scores[~events])
    below = np.searchsorted(others, scores[events], "left") + np.searchsorted(others, scores[events], "right")
    return float(below.mean() / 2 / len(others))
