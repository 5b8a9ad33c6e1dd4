"""How many tokens an expert may take: places are given in order, and who finds none is dropped.

In training first choices come before second ones, and among these earlier tokens before later ones (Lepikhin et al.
2020, alg. 1). With k > 1 choices a token may then lose its second place to a token after it, which a causal model must
not know of. In evaluation, therefore, earlier tokens come first with all their choices: no token changes what an
earlier one of its row is given. With one choice both orders are the same.

Shapes: N tokens (of B rows, one after the other), k choices a token, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from allyouneed import core


@dataclass(frozen=True, kw_only=True)
class Unlimited(core.Config):
    """Every token finds a place at every expert it asks for: nothing is dropped."""

    def admit(
        self, experts: Tensor, asked: Tensor | None, num_experts: int, *, rows: int, training: bool
    ) -> Tensor | None:
        """Which of the `asked` (N, k) find a place, None standing for all: those that ask."""
        return asked


@dataclass(frozen=True, kw_only=True)
class Factor(core.Config):
    """⌈factor · k · N / E⌉ places at each expert (Fedus et al. 2021, eq. 3; Lepikhin et al. 2020, sec. 2.2).

    Which tokens are dropped then depends on what else is in the batch. So that a model says the same of a text whatever
    it is batched with, and with a cache the same as without, nothing is dropped in evaluation unless `evaluation` says
    so (GShard and ST-MoE use a factor of 2 there); the room then grows with the number of tokens, later ones included.
    """

    factor: float = 1.25  # Fedus et al. 2021, sec. 2.2: 1.0 to 1.25
    evaluation: float | None = None

    def __post_init__(self) -> None:
        for name in ("factor", "evaluation"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise core.InputError(f"capacity {name}={value}; it must be above 0: 1.25 leaves a quarter of room")

    def admit(
        self, experts: Tensor, asked: Tensor | None, num_experts: int, *, rows: int, training: bool
    ) -> Tensor | None:
        """Which of the `asked` (N, k), None: all, find a place at their `experts` (N, k)."""
        factor = self.factor if training else self.evaluation
        if factor is None:
            return asked
        return _within(math.ceil(factor * experts.numel() / num_experts), experts, asked, num_experts, training)


@dataclass(frozen=True, kw_only=True)
class PerRow(core.Config):
    """A fixed number of `places` at each expert for every row of a batch, in evaluation too, as `transformers` has it
    for Switch. What one row drops no other row changes; padding takes places, and a row read in pieces finds them anew.
    """

    places: int = 64

    def __post_init__(self) -> None:
        if self.places < 1:
            raise core.InputError(f"capacity places={self.places}; each expert needs at least 1 a row")

    def admit(
        self, experts: Tensor, asked: Tensor | None, num_experts: int, *, rows: int, training: bool
    ) -> Tensor | None:
        """Which of the `asked` (N, k), None: all, find a place at their `experts` (N, k)."""
        row = torch.arange(rows, device=experts.device).repeat_interleave(len(experts) // rows)
        return _within(self.places, row[:, None] * num_experts + experts, asked, rows * num_experts, training)


Capacity = Unlimited | Factor | PerRow


def _within(room: int, experts: Tensor, asked: Tensor | None, num_experts: int, training: bool) -> Tensor:
    asked = torch.ones_like(experts, dtype=torch.bool) if asked is None else asked
    return asked & (places(experts, asked, num_experts, firsts_first=training) < room)


def places(experts: Tensor, asked: Tensor, num_experts: int, *, firsts_first: bool) -> Tensor:
    """How many asked for the same expert before: (N, k) -> (N, k); for what is not asked for, a number of no meaning.
    All first choices come before all second ones (`firsts_first`), or all choices of a token before the next token's.

    >>> experts, asked = torch.tensor([[0, 1], [1, 0], [1, 2]]), torch.ones(3, 2, dtype=torch.bool)
    >>> places(experts, asked, 3, firsts_first=True).tolist(), places(experts, asked, 3, firsts_first=False).tolist()
    ([[0, 2], [0, 1], [1, 0]], [[0, 0], [1, 1], [2, 0]])
    """
    wanted = torch.where(asked, experts, num_experts)
    queue = (wanted.t() if firsts_first else wanted).flatten()
    order = queue.argsort(stable=True)
    ordered = queue[order]
    place = torch.arange(len(queue), device=queue.device) - torch.searchsorted(ordered, ordered)
    found = torch.empty_like(queue).scatter_(0, order, place)
    return found.view(experts.shape[1], -1).t() if firsts_first else found.view_as(experts)
