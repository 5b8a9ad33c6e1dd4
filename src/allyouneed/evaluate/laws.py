"""Scaling laws: their forms, the constants that were published, and how they would spend a budget. Numbers only.

N parameters, D tokens, C FLOPs of training, S steps, L nats a token. Kaplan's N leaves embeddings out, Hoffmann's does
not. Losses are of each paper's own corpus and tokenizer and cannot be compared between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from allyouneed.core.errors import InputError

PF_DAY = 1e15 * 24 * 3600  # FLOPs
SMALLEST = 768  # parameters without embeddings, of the smallest model that any of these laws was fitted on (Kaplan, 3)


def training_flops(parameters: float, tokens: float) -> float:
    """C ≈ 6ND (Kaplan et al. 2020, sec. 2.1); `nn.flops` counts exactly."""
    return 6.0 * parameters * tokens


@dataclass(frozen=True)
class PowerLaw:
    """y = scale · x^exponent.

    >>> PowerLaw(2.0, 0.5)(16.0), PowerLaw(2.0, 0.5).inverse(8.0)
    (8.0, 16.0)
    """

    scale: float
    exponent: float

    @classmethod
    def falling(cls, critical: float, alpha: float) -> Self:
        """Kaplan's way to write one: L = (x_c/x)^α."""
        return cls(critical**alpha, -alpha)

    @classmethod
    def through(cls, x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> Self:
        """The line of least squares in log y over log x."""
        exponent, intercept = np.polyfit(np.log(x), np.log(y), 1)
        return cls(float(np.exp(intercept)), float(exponent))

    @property
    def critical(self) -> float:
        """x_c, where y would be 1."""
        return float(self.scale ** (-1 / self.exponent))

    def __call__(self, x: float) -> float:
        """y at x."""
        return float(self.scale * x**self.exponent)

    def inverse(self, y: float) -> float:
        """The x at which y is reached."""
        return float((y / self.scale) ** (1 / self.exponent))


@dataclass(frozen=True)
class KaplanLoss:
    """L(N, D) = [(N_c/N)^(α_N/α_D) + D_c/D]^α_D (Kaplan et al. 2020, eq. 1.5)."""

    N_c: float
    D_c: float
    alpha_N: float  # noqa: N815
    alpha_D: float  # noqa: N815

    def __call__(self, parameters: float, tokens: float) -> float:
        """Nats a token."""
        size = (self.N_c / parameters) ** (self.alpha_N / self.alpha_D)
        return float((size + self.D_c / tokens) ** self.alpha_D)


@dataclass(frozen=True)
class KaplanSteps:
    """L(N, S_min) = (N_c/N)^α_N + (S_c/S_min)^α_S (Kaplan et al. 2020, eq. 1.6)."""

    N_c: float
    S_c: float
    alpha_N: float  # noqa: N815
    alpha_S: float  # noqa: N815

    def __call__(self, parameters: float, steps: float) -> float:
        """Nats a token, after so many steps of batches far above the critical size."""
        return float((self.N_c / parameters) ** self.alpha_N + (self.S_c / steps) ** self.alpha_S)


@dataclass(frozen=True)
class HoffmannLoss:
    """L(N, D) = E + A/N^α + B/D^β (Hoffmann et al. 2022, eq. 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, parameters: float, tokens: float) -> float:
        """Nats a token."""
        return float(self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta)

    @property
    def frontier(self) -> PowerLaw:
        """N_opt(C) = G·(C/6)^a with G = (αA/βB)^(1/(α+β)), a = β/(α+β) (eq. 4)."""
        a = self.beta / (self.alpha + self.beta)
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return PowerLaw(G * 6**-a, a)


@dataclass(frozen=True)
class Allocation:
    """A budget, and the model and data it is spent on."""

    compute: float
    parameters: float
    tokens: float

    @property
    def tokens_per_parameter(self) -> float:
        """D/N."""
        return self.tokens / self.parameters


@dataclass(frozen=True)
class Law:
    """Somebody's answer to how large a model should be: `frontier` is N_opt(C); D is what C = 6ND leaves.

    `loss`, of N and D, is that of training to convergence where there is an `efficient` one: that of the best use of C,
    which stops well before.
    """

    name: str
    source: str
    frontier: PowerLaw
    loss: Callable[[float, float], float] | None = None
    efficient: PowerLaw | None = None

    def of_compute(self, compute: float) -> Allocation:
        """The best use of a budget.

        Raises:
            InputError: here as below, it would be spent on fewer parameters than any law was fitted on.
        """
        return self._spend(_positive("compute", compute), f"compute={compute:g}")

    def of_parameters(self, parameters: float) -> Allocation:
        """The budget for which so large a model is the best."""
        compute = _finite(self.frontier.inverse, "parameters", parameters)
        return self._spend(compute, f"parameters={parameters:g}")

    def of_tokens(self, tokens: float) -> Allocation:
        """The budget for which so much data is the best."""
        data = PowerLaw(1 / (6 * self.frontier.scale), 1 - self.frontier.exponent)
        return self._spend(_finite(data.inverse, "tokens", tokens), f"tokens={tokens:g}")

    def best_loss(self, best: Allocation) -> float | None:
        """Nats a token when a budget is spent as the law says; None where its authors give no loss."""
        if self.efficient is not None:
            return self.efficient(best.compute)
        return None if self.loss is None else self.loss(best.parameters, best.tokens)

    def _spend(self, compute: float, asked: str) -> Allocation:
        parameters = self.frontier(compute)
        if parameters < SMALLEST:
            least = self.frontier.inverse(SMALLEST)
            raise InputError(
                f"{asked}: by the law {self.name!r} that is for {parameters:.3g} parameters, fewer than the smallest "
                f"model any law was fitted on ({SMALLEST}), for which {least:.2g} FLOPs are the budget"
            )
        return Allocation(compute, parameters, compute / (6 * parameters))

    def growth(self, factor: float = 10.0) -> tuple[float, float]:
        """How many times as many parameters and tokens `factor` times the compute wants."""
        grown = factor**self.frontier.exponent
        return grown, factor / grown


# Kaplan et al. 2020: eq. 1.3, table 2
KAPLAN_COMPUTE = PowerLaw.falling(3.1e8 * PF_DAY, 0.050)  # of C_min
KAPLAN = KaplanLoss(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103)

# Hoffmann et al. 2022, eq. 10 before it was rounded, which the paper's TeX source tells (Besiroglu et al. 2024); their
# own fit to the points of the paper's fig. 4, which agrees with its first two approaches
HOFFMANN = HoffmannLoss(E=1.69337368, A=406.401018, B=410.722827, alpha=0.33917084, beta=0.2849083)
BESIROGLU = HoffmannLoss(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)

# Hoffmann et al. 2022, tables 3 and A3: N, and for approaches 1, 2 and 3 C and D. Of 175 B the paper prints 1.26e24 for
# approach 3, a slip of the exponent: 6ND is 1.26e25, and budgets rise from row to row
TABLE: tuple[tuple[float, ...], ...] = (
    (400e6, 1.92e19, 8.0e9, 1.84e19, 7.7e9, 2.21e19, 9.2e9),
    (1e9, 1.21e20, 20.2e9, 1.20e20, 20.0e9, 1.62e20, 27.1e9),
    (10e9, 1.23e22, 205.1e9, 1.32e22, 219.5e9, 2.46e22, 410.1e9),
    (67e9, 5.76e23, 1.5e12, 6.88e23, 1.7e12, 1.71e24, 4.1e12),
    (175e9, 3.85e24, 3.7e12, 4.54e24, 4.3e12, 1.26e25, 12.0e12),
    (280e9, 9.90e24, 5.9e12, 1.18e25, 7.1e12, 3.52e25, 20.1e12),
    (520e9, 3.43e25, 11.0e12, 4.19e25, 13.4e12, 1.36e26, 43.5e12),
    (1e12, 1.27e26, 21.2e12, 1.59e26, 26.5e12, 5.65e26, 94.1e12),
    (10e12, 1.30e28, 216.2e12, 1.75e28, 292.0e12, 8.55e28, 1425.5e12),
)


def _line(approach: int) -> PowerLaw:
    """N_opt(C) of an approach, of which the paper prints the exponent alone: the line through its table."""
    rows = np.array(TABLE)
    return PowerLaw.through(rows[:, 2 * approach - 1], rows[:, 0])


LAWS = (
    # 1.3e9 · C_min^0.73 (app. A, table 6; C_min in PF-days) and eq. 1.3. C_min is half of what is spent at the critical
    # batch size (eq. 5.5). Eq. 1.5 is of runs that were stopped only when their loss fell no more
    Law(
        "Kaplan",
        "Kaplan et al. 2020, table 6",
        PowerLaw(1.3e9 * (2 * PF_DAY) ** -0.73, 0.73),
        loss=KAPLAN,
        efficient=PowerLaw(KAPLAN_COMPUTE(0.5), KAPLAN_COMPUTE.exponent),
    ),
    Law("Hoffmann 1", "Hoffmann et al. 2022, curves' envelope, through table 3", _line(1)),
    Law("Hoffmann 2", "Hoffmann et al. 2022, IsoFLOP profiles, through table A3", _line(2)),
    Law("Hoffmann 3", "Hoffmann et al. 2022, parametric, eq. 10 unrounded", HOFFMANN.frontier, HOFFMANN),
    Law("Besiroglu", "Besiroglu et al. 2024, approach 3 refitted", BESIROGLU.frontier, BESIROGLU),
)


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name}={value:g}; it must be a finite number above 0")
    return value


def _finite(law: Callable[[float], float], name: str, value: float) -> float:
    """A law of something asked for, where what it says is still a number."""
    try:
        return law(_positive(name, value))
    except OverflowError:
        raise InputError(f"{name}={value:g}: the compute for it is more than the largest number there is") from None
