"""Proximal policy optimisation as an objective (Schulman et al. 2017, eq. 9): the terms in `policy`, weighed.

For actor-critics, which are called with observations; that of language models is in the room `align`.

Shapes: B actions, … any shape of them, the same for all; D numbers an observation, P parameters of a policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.objectives.loss import Loss
from allyouneed.objectives.policy import clipped_surrogate, kl_k3, surrogate, value_loss

FAR = 0.2  # a ratio's distance from 1, for the log


@dataclass(frozen=True, kw_only=True)
class Clipped(core.Config):
    """min(r·A, clip(r, 1 − ε, 1 + ε)·A) (eq. 7)."""

    epsilon: float = 0.2  # table 1: the best of 0.1, 0.2 and 0.3

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise InputError(f"surrogate.epsilon={self.epsilon}; it must be above 0")

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        """(…) -> (…)."""
        return clipped_surrogate(logprobs, old_logprobs, advantages, self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Unclipped(core.Config):
    """r·A (eq. 6), for use with a penalty or, as a control, without."""

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        """(…) -> (…)."""
        return surrogate(logprobs, old_logprobs, advantages)


@dataclass(frozen=True, kw_only=True)
class Ppo(core.Config):
    """−surrogate + c₁·(V − R)² − c₂·entropy + β·KL[π_old, π], each a mean over actions (eq. 8 and 9).

    - `module(observations)`, (B, D), gives `.values`, (B), and `.policy` with `logprobs(actions)`, `entropy()` and
      `kl_from(parameters)`, each (B);
    - a batch has `observations`, `actions`, and (B) each `old_logprobs`, `old_values`, `advantages` and `returns`;
      where divergence is to be penalised also `old_parameters`, (B, P), and its weight `beta`, (B).

    Metrics: `surrogate`, `value_loss`, `entropy`, `kl` (k3 of the actions taken), and `far`, the share of actions whose
    ratio is further than 0.2 from 1.
    """

    surrogate: Clipped | Unclipped = field(default_factory=Clipped)
    value_weight: float = 0.5  # c₁; 1 of the half of (V − R)² that others take
    value_clip: float | None = None
    entropy_weight: float = 0.0  # c₂; sec. 6.1: none for continuous control

    def __call__(self, module: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The loss of a batch."""
        told, old_logprobs = module(batch["observations"]), batch["old_logprobs"]
        logprobs = told.policy.logprobs(batch["actions"])
        gain = self.surrogate(logprobs, old_logprobs, batch["advantages"])
        error = value_loss(told.values, batch["old_values"], batch["returns"], self.value_clip)
        terms = self.value_weight * error - gain
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.entropy_weight != 0):
            entropy = told.policy.entropy()
        if self.entropy_weight:
            terms = terms - self.entropy_weight * entropy
        if "beta" in batch:
            terms = terms + batch["beta"] * told.policy.kl_from(batch["old_parameters"])
        with torch.no_grad():
            far = ((logprobs - old_logprobs).expm1().abs() > FAR).to(gain.dtype)
            measured = {"surrogate": gain, "value_loss": error, "entropy": entropy, "far": far}
            measured["kl"] = kl_k3(old_logprobs, logprobs)
            sums = {name: x.detach().sum() for name, x in measured.items()}
        return Loss(terms.sum(), torch.tensor(terms.numel()), sums, "actions")
