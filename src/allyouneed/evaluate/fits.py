"""Scaling laws fitted to runs: least squares for Kaplan's forms, Huber's loss for Hoffmann's, intervals by bootstrap.

Every fit takes columns of equal length, one entry a run. Runs that are fewer than three, or of fewer than three
different sizes, and values that are not above 0 are an `InputError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import derive
from allyouneed.evaluate.laws import HoffmannLoss, KaplanLoss, KaplanSteps, PowerLaw
from allyouneed.evaluate.statistics import Interval

Column = Sequence[float] | np.ndarray
DESCENTS = 6  # starts of the grid that are followed to the end: those whose loss is least to begin with


def power_law(x: Column, y: Column) -> PowerLaw:
    """y = scale · x^exponent by least squares in logarithms: L(N), L(D), L(C) (eq. 1.1 to 1.3), B_crit(L) (eq. 1.4).

    >>> law = power_law([1, 4, 9], [2, 4, 6])
    >>> round(law.scale, 9), round(law.exponent, 9)
    (2.0, 0.5)
    """
    x, y = columns("power law", x=x, y=y)
    different("power law", x=x)
    return PowerLaw.through(x, y)


def kaplan(parameters: Column, tokens: Column, losses: Column, *, start: KaplanLoss | None = None) -> KaplanLoss:
    """L(N, D) of Kaplan et al. 2020, eq. 1.5, by least squares in log L.

    With a `start`, the fit of nearly the same runs, only that is followed.
    """
    N, D, L = columns("L(N, D)", parameters=parameters, tokens=tokens, losses=losses)
    different("L(N, D)", parameters=N, tokens=D)
    (n, d), (n0, d0) = _centred(N, D)

    def predict(t: Tensor) -> Tensor:  # log L = α_D · log(exp(u_N − α_N/α_D · n) + exp(u_D − d)), centred at n0, d0
        alpha_N, alpha_D = t[..., 0:1].exp(), t[..., 1:2].exp()
        return alpha_D * torch.logaddexp(t[..., 2:3] - alpha_N / alpha_D * n, t[..., 3:4] - d)

    level = float(np.log(L).mean())
    exponents = [0.05, 0.1, 0.2, 0.4, 0.8]
    starts = [[np.log(i), np.log(j), level / j, level / j + k] for i, j, k in product(exponents, exponents, (-2, 0, 2))]
    if start is not None:
        ratio = start.alpha_N / start.alpha_D
        middle = [ratio * (math.log(start.N_c) - n0), math.log(start.D_c) - d0]
        starts = [[math.log(start.alpha_N), math.log(start.alpha_D), *middle]]
    t = _least(predict, starts, L, delta=None)
    alpha_N, alpha_D = (math.exp(_within(x, -7, 7, "L(N, D)")) for x in t[:2])
    N_c, D_c = _exp(t[2] * alpha_D / alpha_N + n0, t[3] + d0, what="L(N, D)")
    return KaplanLoss(N_c, D_c, alpha_N, alpha_D)


def kaplan_steps(parameters: Column, steps: Column, losses: Column) -> KaplanSteps:
    """L(N, S_min) of Kaplan et al. 2020, eq. 1.6, by least squares in log L."""
    a, b, alpha, beta = _two_terms("L(N, S)", parameters, steps, losses, floor=False, delta=None)[1:]
    alpha, beta = (_within(x, 1e-3, 1e3, "L(N, S)") for x in (alpha, beta))
    N_c, S_c = _exp(a / alpha, b / beta, what="L(N, S)")
    return KaplanSteps(N_c, S_c, alpha, beta)


def hoffmann(
    parameters: Column, tokens: Column, losses: Column, *, delta: float = 1e-3, start: HoffmannLoss | None = None
) -> HoffmannLoss:
    """L(N, D) = E + A/N^α + B/D^β by the third approach of Hoffmann et al. 2022 (sec. 3.3 and D.3).

    Huber's loss of the residuals of log L, summed over runs, is minimised by L-BFGS from a grid of starts, the terms
    being added as logarithms. The paper's grid is kept, but only its best starts are followed; the sum, not the mean,
    since an objective as small as the mean ends the descent too early (Besiroglu et al. 2024). With a `start`, the fit
    of nearly the same runs, only that is followed.
    """
    known = None if start is None else [*np.log([start.E, start.A, start.B]).tolist(), start.alpha, start.beta]
    what = "E + A/N^α + B/D^β"
    e, a, b, alpha, beta = _two_terms(what, parameters, tokens, losses, floor=True, delta=delta, known=known)
    alpha, beta = (_within(x, 1e-3, 1e3, what) for x in (alpha, beta))
    E, A, B = _exp(e, a, b, what=what)
    return HoffmannLoss(E=E, A=A, B=B, alpha=alpha, beta=beta)


def critical_batch(steps: Column, tokens: Column) -> tuple[float, float, float]:
    """S_min, E_min and B_crit = E_min/S_min of one loss, from steps S and tokens E that reached it, batch by batch.

    (S/S_min − 1)(E/E_min − 1) = 1 (Kaplan et al. 2020, eq. 5.1), which is S_min/S + E_min/E = 1: least squares.
    """
    S, E = columns("critical batch", steps=steps, tokens=tokens)
    different("critical batch", steps=S)
    (least_steps, least_tokens), *_ = np.linalg.lstsq(np.stack((1 / S, 1 / E), 1), np.ones(len(S)), rcond=None)
    if min(least_steps, least_tokens) <= 0:
        raise InputError("critical batch: larger batches do not save steps here, so there is none to be found")
    return float(least_steps), float(least_tokens), float(least_tokens / least_steps)


def intervals(
    runs: np.ndarray,
    fit: Callable[[np.ndarray], Mapping[str, float]],
    *,
    strata: Column | None = None,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> tuple[dict[str, Interval], int]:
    """Whatever numbers a fit gives, each with its percentile bootstrap interval over the runs (Efron 1979), and how
    many resamples the fit refused: where these are many, the intervals are of the agreeable ones.

    Args:
        runs: (n, …), what the fit is handed, one entry a run; a resample draws n of them anew.
        fit: of one sample; a resample that it refuses with an `InputError`, too few sizes for instance, is drawn again.
        strata: (n,) labels; a resample keeps how many runs each has (the budgets of IsoFLOP profiles).

    Raises:
        InputError: the runs themselves are refused, or nearly every resample of them is.
    """
    estimate, source = dict(fit(runs)), np.random.default_rng(derive(seed, "bootstrap of runs"))
    labels = np.zeros(len(runs)) if strata is None else np.asarray(strata)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    found: list[Mapping[str, float]] = []
    refused = 0
    for _ in range(20 * resamples):
        chosen = np.concatenate([source.choice(group, len(group)) for group in groups])
        try:
            found.append(fit(runs[chosen]))
        except InputError:
            refused += 1
        if len(found) == resamples:
            break
    if len(found) < resamples:
        raise InputError(f"bootstrap: only {len(found)} of {20 * resamples} resamples could be fitted; give more runs")
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    between = {name: map(float, np.quantile([one[name] for one in found], tails)) for name in estimate}
    return {name: Interval(x, *between[name]) for name, x in estimate.items()}, refused


def columns(what: str, **given: Column) -> list[np.ndarray]:
    """Columns as float64 arrays of one length.

    Raises:
        InputError: fewer than three entries, or one that is not finite and above 0.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in given.items()}
    assert len({len(values) for values in arrays.values()}) == 1, f"{what}: columns of unequal length"
    for name, values in arrays.items():
        if len(values) < 3:
            raise InputError(f"{what}: {len(values)} runs are too few for a fit; give at least 3")
        wrong = ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            raise InputError(f"{what}: {name} holds {values[wrong][0]:g}; a power law takes finite values above 0")
    return list(arrays.values())


def different(what: str, **given: np.ndarray) -> None:
    """Refuse columns that vary too little to say anything.

    Raises:
        InputError: fewer than three different values in one.
    """
    for name, values in given.items():
        if len(np.unique(values)) < 3:
            raise InputError(f"{what}: {name} takes {len(np.unique(values))} different values; a fit needs at least 3")


def _within(value: float, least: float, most: float, what: str) -> float:
    """A parameter that is one; beyond, a term is a constant or a wall."""
    if not least < value < most:
        raise InputError(f"{what}: the losses do not fall as powers of both columns")
    return value


def _exp(*logs: float, what: str) -> list[float]:
    """Scales from their logarithms, where they are numbers."""
    return [math.exp(_within(log, -700, 700, what)) for log in logs]


def _two_terms(
    what: str,
    x: Column,
    y: Column,
    losses: Column,
    *,
    floor: bool,
    delta: float | None,
    known: list[float] | None = None,
) -> tuple[float, float, float, float, float]:
    """e, a, b, α, β of L = exp(e) + exp(a)/x^α + exp(b)/y^β; without a floor e is −∞."""
    X, Y, L = columns(what, parameters=x, tokens=y, losses=losses)
    different(what, parameters=X, tokens=Y)
    (log_x, log_y), (x0, y0) = _centred(X, Y)

    def predict(t: Tensor) -> Tensor:
        both = torch.logaddexp(t[..., 1:2] - t[..., 3:4] * log_x, t[..., 2:3] - t[..., 4:5] * log_y)
        return torch.logaddexp(t[..., 0:1], both) if floor else both

    steps, exponents = np.arange(0, 26, 5.0), np.arange(0, 2.1, 0.5)
    grid = product(np.arange(-1, 1.1, 0.5) if floor else [0.0], steps, steps, exponents, exponents)  # the paper's
    starts = [  # of e, a, b, α, β, the intercepts moved to the centre of the data
        [e, a - alpha * x0, b - beta * y0, alpha, beta] for e, a, b, alpha, beta in ([known] if known else grid)
    ]
    e, a, b, alpha, beta = _least(predict, starts, L, delta=delta)
    return e if floor else -np.inf, a + alpha * x0, b + beta * y0, alpha, beta


def _centred(*given: np.ndarray) -> tuple[list[Tensor], list[float]]:
    """Logarithms less their means, and the means: the constants of a law hardly depend on its exponents there."""
    logs = [np.log(values) for values in given]
    return [torch.tensor(x - x.mean()) for x in logs], [float(x.mean()) for x in logs]


def _least(
    predict: Callable[[Tensor], Tensor], starts: list[list[float]], losses: np.ndarray, *, delta: float | None
) -> list[float]:
    """Where the sum of Huber's loss of log L's residuals is least; that of their squares where `delta` is None."""
    target = torch.tensor(np.log(losses))

    def objective(t: Tensor) -> Tensor:  # (…, parameters) -> (…)
        r = predict(t) - target
        squares = 0.5 * r * r
        if delta is not None:
            squares = torch.where(r.abs() <= delta, squares, delta * (r.abs() - 0.5 * delta)) / delta
        return squares.sum(-1)

    grid = torch.tensor(starts, dtype=torch.double)
    order = torch.cat([objective(some) for some in grid.split(512)]).argsort()
    ends = [_descend(objective, grid[i]) for i in order[:DESCENTS]]
    values = torch.stack([objective(t) for t in ends]).nan_to_num(nan=math.inf)
    return [float(value) for value in ends[int(values.argmin())]]


def _descend(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    t = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [t], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-13, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(t)
        value.backward()
        return value

    optimizer.step(closure)
    return t.detach()
