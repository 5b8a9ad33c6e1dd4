"""Learning-rate schedules: the share of the peak rate that step t of `steps` trains with.

Steps count from 1. The first `warmup` steps climb linearly to the peak, the rest follows each class's own curve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from allyouneed import core


@dataclass(frozen=True, kw_only=True)
class Constant(core.Config):
    """The peak rate after the warm-up.

    >>> [Constant(warmup=2)(step, steps=4) for step in (1, 2, 3, 4)]
    [0.5, 1.0, 1.0, 1.0]
    """

    warmup: int = 0

    def __call__(self, step: int, steps: int) -> float:
        """The factor of the peak rate at `step` (1 … `steps`)."""
        return step / self.warmup if step < self.warmup else self.after_warmup(step, steps)

    def after_warmup(self, step: int, steps: int) -> float:
        """The factor once the peak has been reached."""
        return 1.0

    def progress(self, step: int, steps: int) -> float:
        """How much of what follows the warm-up is done: 0 at the peak, 1 at the last step."""
        return (step - self.warmup) / max(steps - self.warmup, 1)


@dataclass(frozen=True, kw_only=True)
class Linear(Constant):
    """From the peak straight down to `floor` at the last step (BERT, Devlin et al. 2018, app. A.2: to zero).

    >>> [Linear(floor=0.5)(step, steps=4) for step in (1, 2, 3, 4)]
    [0.875, 0.75, 0.625, 0.5]
    """

    floor: float = 0.0

    def after_warmup(self, step: int, steps: int) -> float:
        """1 − (1 − floor) · progress."""
        return 1.0 - (1.0 - self.floor) * self.progress(step, steps)


@dataclass(frozen=True, kw_only=True)
class Cosine(Constant):
    """From the peak down half a cosine to `floor` (Loshchilov & Hutter 2017, eq. 5); GPT-3 (app. B) and LLaMA
    (sec. 2.3) end at a tenth of the peak. `until` is the step at which the floor is reached, None: the last.

    >>> [round(Cosine()(step, steps=4), 3) for step in (1, 2, 3, 4)]
    [0.868, 0.55, 0.232, 0.1]
    >>> [round(Cosine(until=2)(step, steps=4), 3) for step in (1, 2, 3, 4)]
    [0.55, 0.1, 0.1, 0.1]
    """

    floor: float = 0.1
    until: int | None = None

    def after_warmup(self, step: int, steps: int) -> float:
        """floor + (1 − floor) · (1 + cos(π · progress)) / 2."""
        done = min(self.progress(step, self.until or steps), 1.0)
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class InverseSquareRoot(Constant):
    """√(warmup / t): the Transformer's d^−½ · min(t^−½, t · warmup^−1.5) with its peak set to 1 (Vaswani et al. 2017,
    sec. 5.3). The paper's own rates are those of the peak `lr=(d * warmup) ** -0.5`.

    >>> InverseSquareRoot(warmup=100)(400, steps=1000)
    0.5
    """

    warmup: int = 4000

    def after_warmup(self, step: int, steps: int) -> float:
        """√(warmup / t)."""
        return math.sqrt(max(self.warmup, 1) / step)


Schedule = Constant | Linear | Cosine | InverseSquareRoot
