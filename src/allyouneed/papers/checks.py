"""Checks and the verdict: how numbers with their spread become `holds`, `fails` or `inconclusive`.

The bounds come from the paper's configuration and are written before the run; nothing here can be tuned afterwards.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Check:
    """One measured number against its bound.

    `interval` holds the true value with 95 % confidence; None says that nothing is known about the spread.
    The check passes when all of the interval lies within the bounds, fails when all of it lies beyond one of them,
    and else stays undecided.

    >>> Check("gain", 0.3, (0.1, 0.5), "given", above=0.0).passed
    True
    >>> print(Check("gain", 0.3, (-0.1, 0.7), "given", above=0.0).passed)
    None
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    method: str  # where the interval comes from
    above: float | None = None
    below: float | None = None

    @property
    def passed(self) -> bool | None:
        """True, False, or None where the interval does not decide."""
        if self.interval is None:
            return None
        low, high = self.interval
        if (self.above is not None and high <= self.above) or (self.below is not None and low >= self.below):
            return False
        return True if self._clears(low, high) else None

    def _clears(self, low: float, high: float) -> bool:
        return (self.above is None or low > self.above) and (self.below is None or high < self.below)

    def to_json(self) -> dict[str, Any]:
        """The check as it stands in a report."""
        return {
            "name": self.name,
            "value": self.value,
            "interval": list(self.interval) if self.interval else None,
            "method": self.method,
            "bound": {"above": self.above, "below": self.below},
            "passed": self.passed,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Check:
        """The check that `to_json` wrote."""
        interval = data["interval"] and (data["interval"][0], data["interval"][1])
        return Check(data["name"], data["value"], interval, data["method"], **data["bound"])


def measured(
    name: str,
    value: float | None = None,
    *,
    values: Sequence[float] | None = None,
    spread: float | None = None,
    interval: tuple[float, float] | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Check:
    """A check from one of: `values`, one per seed; a `value` with its `spread` or `interval`; an exact `value`.

    `spread` is half the width of a 95 % interval, `interval` a 95 % interval computed elsewhere (a bootstrap's).
    """
    assert (value is None) != (values is None), f"check {name!r}: give either value or values"
    assert above is not None or below is not None, f"check {name!r}: without a bound nothing is checked"
    given = [*(values or ()), *(interval or ()), *(x for x in (value, spread) if x is not None)]
    assert all(map(math.isfinite, given)), f"check {name!r}: not a number among {given}"
    if values is not None:
        return Check(name, *_over_seeds(values), above, below)
    assert value is not None
    if spread is not None:
        interval = (value - spread, value + spread)
    low, high = interval or (value, value)
    return Check(name, float(value), (float(low), float(high)), "95 % interval" if interval else "exact", above, below)


def verdict(checks: Iterable[Check]) -> str:
    """`holds` when every check passed, `fails` when one clearly failed, else `inconclusive`."""
    outcomes = [check.passed for check in checks]
    if any(outcome is False for outcome in outcomes):
        return "fails"
    return "holds" if outcomes and all(outcomes) else "inconclusive"


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of at least two independent values, by Student's t.

    >>> low, high = student_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    mean, n = statistics.fmean(values), len(values)
    half = student_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def student_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t for which |T| <= t with probability `confidence`, T of Student's distribution.

    >>> [round(student_quantile(freedom), 3) for freedom in (1, 2, 4, 30)]
    [12.706, 4.303, 2.776, 2.042]
    """
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(freedom)), in which the probability is smooth
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= t) at angle = atan(t / sqrt(freedom)): the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def _over_seeds(values: Sequence[float]) -> tuple[float, tuple[float, float] | None, str]:
    values = list(map(float, values))
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None, "one seed: spread unknown"
    return mean, student_interval(values), f"95 % interval, Student's t over {len(values)} seeds"
