"""Optimisers, and which parameters they shrink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from allyouneed import core


class AdamW(core.Configured, torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, alg. 2) over a module's trainable parameters.

    >>> optimizer = AdamW.Config(lr=1e-3).build(nn.Linear(2, 2))
    >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    [(0.1, 1), (0.0, 1)]
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """The betas, epsilon and decay of GPT-3 (Brown et al. 2020, app. B), which LLaMA keeps (sec. 2.3)."""

        lr: float = 3e-4  # the schedule's peak
        betas: tuple[float, float] = (0.9, 0.95)
        eps: float = 1e-8
        weight_decay: float = 0.1

    def __init__(self, config: Config, module: nn.Module) -> None:
        decayed, rest = decay_groups(module)
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        super().__init__(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over memory instead of a dozen
        )


def decay_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters that weight decay shrinks, and those it leaves alone.

    Matrices are shrunk. Norm gains and biases are not, "non bias or gain weights" being what GPT decays (Radford et al.
    2018, sec. 4.1), nor are embeddings, most of whose rows have no gradient in a given step and would only fade.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (decayed if parameter.dim() > 1 and id(parameter) not in embeddings else rest).append(parameter)
    return decayed, rest
