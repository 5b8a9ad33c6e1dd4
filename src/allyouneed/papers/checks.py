"""Checks and the verdict: how numbers with their spread become `holds`, `fails` or `inconclusive`.

The bounds come from the paper's configuration and are written before the run; nothing here can be tuned afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from allyouneed.evaluate.statistics import student_t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Check:
    """One measured number against its bound.

    `interval` holds the true value with 95 % confidence, as far as what was drawn anew tells: over seeds, the mean
    that ever more seeds would give, not what another model or corpus would. None: nothing is known about the spread.
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
    method: str = "95 % interval",
    above: float | None = None,
    below: float | None = None,
) -> Check:
    """A check from one of: `values`, one per seed; a `value` with its `spread` or `interval`; an exact `value`.

    `spread` is half the width of a 95 % interval, `interval` a 95 % interval computed elsewhere, `method` says how.
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
    return Check(name, float(value), (float(low), float(high)), method if interval else "exact", above, below)


def verdict(checks: Iterable[Check]) -> str:
    """`holds` when every check passed, `fails` when one clearly failed, else `inconclusive`."""
    outcomes = [check.passed for check in checks]
    if any(outcome is False for outcome in outcomes):
        return "fails"
    return "holds" if outcomes and all(outcomes) else "inconclusive"


def _over_seeds(values: Sequence[float]) -> tuple[float, tuple[float, float] | None, str]:
    values = list(map(float, values))
    if len(values) == 1:
        return values[0], None, "one seed: spread unknown"
    found = student_t(values, confidence=CONFIDENCE)
    return found.estimate, (found.low, found.high), f"95 % interval, Student's t over {len(values)} seeds"
