"""The best size for each budget, read off runs: the first two approaches of Hoffmann et al. 2022.

The third, a fit of the whole surface, is `fits.hoffmann`, whose `frontier` says the same. C FLOPs, N parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allyouneed.core.errors import InputError
from allyouneed.evaluate.fits import Column, columns, different, power_law
from allyouneed.evaluate.laws import PowerLaw

POINTS = 1500  # budgets at which the envelope is read (sec. 3.1)


@dataclass(frozen=True)
class Curve:
    """The loss of one run along its training: `compute` (n,), rising, and `losses` (n,)."""

    parameters: float
    compute: Column
    losses: Column


@dataclass(frozen=True)
class Envelope:
    """The size whose curve is lowest at each budget: `compute` (n,) and `parameters` (n,)."""

    compute: np.ndarray
    parameters: np.ndarray

    @property
    def frontier(self) -> PowerLaw:
        """N_opt(C)."""
        return power_law(self.compute, self.parameters)


@dataclass(frozen=True)
class Profile:
    """One budget's parabola, L = L_min + curvature · (ln N − ln N_opt)²; `inside`: N_opt lies among the sizes tried."""

    compute: float
    parameters: float  # N_opt
    loss: float  # L_min
    curvature: float
    inside: bool

    def __call__(self, parameters: float) -> float:
        """The loss of a size."""
        return float(self.loss + self.curvature * np.log(parameters / self.parameters) ** 2)


def envelope(curves: Sequence[Curve], *, least: float = 0.0, points: int = POINTS) -> Envelope:
    """Approach 1 (sec. 3.1): at budgets evenly spread in log C, the run with the least loss.

    Curves are joined by straight lines in logarithms. Where the smallest or the largest size is best, a still smaller
    or larger one might have been better, so that these budgets say nothing of N_opt and are left out, and so are those
    below `least`: where no schedule has ended yet, curves tell how fast a size begins.

    Raises:
        InputError: fewer than three sizes are ever best between these two.
    """
    if len(curves) < 3:
        raise InputError(f"envelope: {len(curves)} curves are too few; give at least 3")
    sizes = np.array([curve.parameters for curve in curves])
    known = [
        [np.log(x) for x in columns("envelope", compute=curve.compute, losses=curve.losses)] for curve in curves
    ]  # log C and log L of each
    first = max(min(c[0] for c, _ in known), np.log(max(least, 1e-300)))
    budgets = np.linspace(first, max(c[-1] for c, _ in known), points)
    losses = np.stack([np.interp(budgets, c, losses, left=np.inf, right=np.inf) for c, losses in known])
    best = sizes[losses.argmin(0)]
    inner = np.isfinite(losses.min(0)) & (best > sizes.min()) & (best < sizes.max())
    different("envelope, sizes that are best somewhere between smallest and largest", parameters=best[inner])
    return Envelope(np.exp(budgets[inner]), best[inner])


def profiles(compute: Column, parameters: Column, losses: Column) -> list[Profile]:
    """Approach 2 (sec. 3.2): for each budget a parabola through its runs' losses over ln N.

    Raises:
        InputError: fewer than three sizes for a budget, or losses that have no minimum.
    """
    C, N, L = columns("IsoFLOP profiles", compute=compute, parameters=parameters, losses=losses)
    return [profile(budget, N[budget == C], L[budget == C]) for budget in np.unique(C).tolist()]


def frontier(found: Sequence[Profile]) -> PowerLaw:
    """N_opt(C) through the minima of at least three budgets."""
    return power_law([one.compute for one in found], [one.parameters for one in found])


def profile(budget: float, parameters: Column, losses: Column) -> Profile:
    """The parabola of one budget.

    Raises:
        InputError: as of `profiles`.
    """
    what = f"IsoFLOP profile of {budget:.3g} FLOPs"
    N, L = columns(what, parameters=parameters, losses=losses)
    different(what, parameters=N)
    x = np.log(N)
    curvature, slope, level = np.polyfit(x - x.mean(), L, 2)
    if curvature <= 0:
        raise InputError(f"{what}: the losses have no minimum over size; try sizes further apart")
    least = -slope / (2 * curvature)
    return Profile(
        float(budget),
        float(np.exp(least + x.mean())),
        float(level - slope**2 / (4 * curvature)),
        float(curvature),
        bool(x.min() < least + x.mean() < x.max()),
    )
