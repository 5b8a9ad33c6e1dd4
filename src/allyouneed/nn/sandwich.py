"""A channel part between two recurrent layers: the language model that mixtures of experts were first scaled up in.

Shapes: B rows, T tokens, D = dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.nn.ffn import MLP, GatedMLP
from allyouneed.nn.moe import MoE
from allyouneed.nn.recurrent import GRU, LSTM, Recurrent, State


class Sandwich(core.Configured, nn.Module):
    """Recurrent layer, channel part, recurrent layer (Shazeer et al. 2017, app. C.1). What each gives passes dropout
    and is added to what it read; the channel part's passes a sigmoid first. Stands in for `nn.recurrent.Recurrent`.

    >>> import torch
    >>> between = MLP.Config(hidden_dim=32, activation="relu", bias=False)
    >>> y, states = Sandwich.Config(cell=LSTM.Config(), between=between).build(8)(torch.randn(2, 5, 8))
    >>> y.shape, len(states)
    (torch.Size([2, 5, 8]), 2)
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """The same `cell` below and above; `dropout` also of what comes in."""

        cell: LSTM.Config | GRU.Config
        between: MoE.Config | MLP.Config | GatedMLP.Config
        dropout: float = 0.0

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.below, self.above = (Recurrent.Config(cell=config.cell).build(dim) for _ in range(2))
        self.between = config.between.build(dim)

    def forward(
        self,
        x: Tensor,
        states: Sequence[State] | None = None,
        begins: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, list[State]]:
        """(B, T, D) -> (B, T, D) and the states of both layers; arguments as of `Recurrent`."""
        x = self._drop(x)
        shown, below = self.below(x, None if states is None else states[:1], begins, counts)
        x = x + self._drop(shown)
        x = x + self._drop(self.between(x).sigmoid())
        shown, above = self.above(x, None if states is None else states[1:], begins, counts)
        return x + self._drop(shown), [*below, *above]

    def begin(self, rows: int) -> list[State]:
        """The states of `rows` rows that nothing was read of."""
        return [*self.below.begin(rows), *self.above.begin(rows)]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
