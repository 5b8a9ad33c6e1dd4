"""How sure one may be of a number. Knows numbers only, not where they come from.

Which interval when:

- `bootstrap`: any statistic over many items (questions, documents), when the question is what other items would have
  given. Items must be independent; below some thirty of them its intervals are too narrow.
- `paired_bootstrap`: the difference of two arms that saw the same items. What makes an item hard for both cancels, so
  that much smaller differences show than by comparing two intervals.
- `wilson`: a share of items that are right or wrong, any number of them, also near 0 and 1, where the bootstrap
  of a perfect score would have no width.
- `student_t`: the mean of a few runs with different seeds, when the question is what another seed would have given. It
  says nothing of other items.
- `median`: timings, of which some are disturbed; assumes nothing but that they are independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import derive

Statistic = Callable[[np.ndarray], np.ndarray]

DRAWN_AT_ONCE = 1 << 20  # items


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean(samples: np.ndarray) -> np.ndarray:
    """The mean of each sample: (R, n) -> (R,)."""
    return samples.mean(1)


def ratio(samples: np.ndarray) -> np.ndarray:
    """The sum of the first over the sum of the second numbers: (R, n, 2) -> (R,). Bits per byte, loss per token."""
    sums = samples.sum(1)
    return sums[:, 0] / sums[:, 1]


def bootstrap(
    items: Sequence[float] | np.ndarray,
    statistic: Statistic = mean,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """A percentile bootstrap interval (Efron 1979; Efron & Tibshirani 1993, sec. 13.3).

    Args:
        items: (n,) numbers, or (n, ...) where an item is several.
        statistic: (R, n, ...) -> (R,), of R samples at once.

    Raises:
        InputError: no items.

    >>> bootstrap([0.0, 1.0] * 50).estimate
    0.5
    """
    data = np.asarray(items, dtype=np.float64)
    if len(data) == 0:
        raise InputError("bootstrap: there are no items to judge by")
    source = np.random.default_rng(derive(seed, "bootstrap"))
    at_once = max(1, DRAWN_AT_ONCE // data.size)
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    found = np.concatenate([statistic(data[source.integers(len(data), size=(size, len(data)))]) for size in sizes])
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(statistic(data[None])[0]), float(low), float(high))


def paired_bootstrap(
    treatment: Sequence[float] | np.ndarray,
    control: Sequence[float] | np.ndarray,
    statistic: Statistic = mean,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The treatment's statistic less the control's, over the same items in the same order, with its interval.

    >>> str(paired_bootstrap([1.5, 2.5, 4.5], [1.0, 2.0, 4.0]))
    '0.5 [0.5, 0.5]'
    """
    assert len(treatment) == len(control), "paired arms have the same items"
    both = np.stack((np.asarray(treatment, dtype=np.float64), np.asarray(control, dtype=np.float64)), axis=1)
    return bootstrap(
        both,
        lambda samples: statistic(samples[:, :, 0]) - statistic(samples[:, :, 1]),
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927; Newcombe 1998, method 3).

    Raises:
        InputError: no trials.

    >>> str(wilson(81, 263))
    '0.308 [0.2553, 0.3662]'
    """
    if trials == 0:
        raise InputError("wilson: there are no trials to judge by")
    assert 0 <= successes <= trials, "no more successes than trials"
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), successes / trials
    centre = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    return Interval(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def student_t(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The mean of a few independent runs, with Student's interval (Student 1908).

    Raises:
        InputError: a single value has no spread.

    >>> str(student_t([1.0, 2.0, 3.0]))
    '2 [-0.4841, 4.484]'
    """
    if len(values) < 2:
        raise InputError(f"student_t: {len(values)} values show no spread; run at least 2 seeds")
    data = np.asarray(values, dtype=np.float64)
    half = t_quantile((1 + confidence) / 2, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data))
    return Interval(float(data.mean()), float(data.mean() - half), float(data.mean() + half))


def median(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The median and two of the values that enclose the true one with at least that confidence, by the binomial law of
    how many lie below it (Conover 1999, sec. 3.2).

    >>> median(range(21))
    Interval(estimate=10.0, low=5.0, high=15.0)

    Raises:
        InputError: too few values for that confidence (95 % takes six).
    """
    ordered, n = sorted(map(float, values)), len(values)
    below, rank = 0.0, -1  # the chance that at most `rank` values lie below the true median
    while rank < n and (below + math.comb(n, rank + 1) / 2**n) <= (1 - confidence) / 2:
        rank += 1
        below += math.comb(n, rank) / 2**n
    if rank < 0:
        raise InputError(f"median: {n} values are too few for a confidence of {confidence:g}")
    return Interval(float(np.median(ordered)), ordered[rank], ordered[n - 1 - rank])


def t_quantile(p: float, freedom: int) -> float:
    """The value that Student's t with `freedom` degrees stays below with probability `p`.

    The distribution's closed form for whole degrees (Abramowitz & Stegun 1964, 26.7.3-4), inverted by bisection over
    the angle theta = atan(t / sqrt(freedom)), in which it rises from -pi/2 to pi/2.

    >>> round(t_quantile(0.975, 4), 3)
    2.776
    """
    if p < 0.5:
        return -t_quantile(1 - p, freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 2 * p - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(theta: float, freedom: int) -> float:
    """The probability that |t| < sqrt(freedom) tan(theta)."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(odd, freedom, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
