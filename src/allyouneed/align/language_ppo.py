"""PPO for language models: the objective of one minibatch of `align.rollouts`, with pretraining text or without."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.core.modes import evaluating
from allyouneed.objectives.likelihood import check_exact
from allyouneed.objectives.loss import Loss
from allyouneed.objectives.next_token import IGNORED
from allyouneed.objectives.policy import kl_k3, mix, value_loss
from allyouneed.objectives.ppo import FAR, Clipped, Unclipped


@dataclass(frozen=True, kw_only=True)
class LanguagePPO(core.Config):
    """−(clipped surrogate) + c·(clipped value loss), a mean over the answers' tokens, + γ·(loss of a pretraining token)
    (Ouyang et al. 2022, eq. 2; Ziegler et al. 2019, and their code for the constants).

    The penalty for leaving the reference is in the rewards. Nothing is dropped, since π_old was read so: else the ratio
    were off 1 before the first step. Called with a `LanguagePolicy` and a batch. Metrics: the
    terms, the share of tokens whose ratio is `far` from 1, and `kl_of_step`, KL[π_old, π] of the answers' tokens.
    """

    surrogate: Clipped | Unclipped = field(default_factory=Clipped)
    value_epsilon: float | None = 0.2
    value_weight: float = 0.1  # c, of half the squared error
    ptx: float = 0.0  # γ; Ouyang et al.: 27.8

    def __post_init__(self) -> None:
        for name in ("value_epsilon", "value_weight", "ptx"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name}={value}; 0 or more is needed")

    def __call__(self, module: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The loss of some rows, a target being a token of an answer."""
        check_exact(batch["old_logprobs"])
        with evaluating(module):
            read, told = module(batch), batch["targets"] != IGNORED
        text = batch.get("pretraining")
        acted = told if text is None else told & (text == 0)[:, None]
        policy = self.of_answers(read.logprobs, read.values, batch, acted)
        if text is None:
            return policy
        nll = -(read.logprobs * text[:, None]).where(told, 0.0).sum()
        return mix(policy, Loss(nll, (told & ~acted).sum()), self.ptx)

    def of_answers(self, logprobs: Tensor, values: Tensor, batch: Mapping[str, Tensor], acted: Tensor) -> Loss:
        """The loss where the policy has acted, all (B, T)."""
        old = batch["old_logprobs"]
        gain = self.surrogate(logprobs, old, batch["advantages"]).where(acted, 0.0).sum()
        error = value_loss(values, batch["old_values"], batch["returns"], self.value_epsilon).where(acted, 0.0).sum()
        far = (logprobs.detach() - old).expm1().abs() > FAR
        metrics = {
            "policy_loss": -gain.detach(),
            "value_loss": 0.5 * error.detach(),
            "far": (far & acted).sum().float(),
            "kl_of_step": kl_k3(old, logprobs.detach()).where(acted, 0.0).sum(),
        }
        return Loss(self.value_weight * 0.5 * error - gain, acted.sum(), metrics)
