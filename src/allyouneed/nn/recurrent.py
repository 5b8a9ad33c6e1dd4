"""Recurrent cells with a norm inside, and the layers that carry them along a row.

Where the norm stands is the layer norm paper's supplementary equations; which norm it is, the configuration says.

Shapes: B rows, T tokens, D = dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.nn.norms import NoNorm, Norm

State = tuple[Tensor, ...]  # what a cell remembers, each (B, D); the first is what it shows


class Cell(core.Configured, nn.Module):
    """A recurrent cell: what it made of the inputs before, and an input, give what it remembers now."""

    gates: int  # how many vectors of D one step computes
    memories: int  # how many it carries on

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`norm` stands on the summed inputs from each side."""

        norm: Norm = field(default_factory=NoNorm.Config)

    def __init__(self, config: Config, dim: int, input_dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.input = nn.Linear(input_dim or dim, self.gates * dim, bias=False)
        self.hidden = nn.Linear(dim, self.gates * dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(self.gates * dim))

    def forward(self, x: Tensor, state: State) -> State:
        """An input (B, input_dim) and the state before -> the state after."""
        return self.step(self.input(x), state)

    def step(self, summed: Tensor, state: State) -> State:
        """The same with W_x x, (B, gates·D), computed before, for all tokens at once."""
        raise NotImplementedError

    def begin(self, rows: int) -> State:
        """The state of `rows` rows that nothing was read of: zeros."""
        return tuple(self.bias.new_zeros(rows, self.dim) for _ in range(self.memories))

    def initialise(self) -> None:
        """Matrices from U(−1/√D, 1/√D) as `torch.nn` has them, biases zero."""
        for matrix in (self.input.weight, self.hidden.weight):
            nn.init.uniform_(matrix, -(self.dim**-0.5), self.dim**-0.5)
        nn.init.zeros_(self.bias)


class LSTM(Cell):
    """Long short-term memory with norms (Hochreiter & Schmidhuber 1997; Ba et al. 2016, supplementary material):

    (i, f, g, o) = norm₁(W_h h) + norm₂(W_x x) + b;  c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g);  h' = σ(o) ⊙ tanh(norm₃(c')).

    The norms of W_h h and W_x x are over all four gates together; c itself is carried on unnormalised.

    >>> cell = LSTM.Config().build(8)
    >>> h, c = cell(torch.randn(2, 8), cell.begin(2))
    >>> h.shape, c.shape
    (torch.Size([2, 8]), torch.Size([2, 8]))
    """

    gates, memories = 4, 2

    @dataclass(frozen=True, kw_only=True)
    class Config(Cell.Config):
        """As of the cell; `forget_bias` is what the forget gate's bias begins with (Jozefowicz et al. 2015: 1)."""

        forget_bias: float = 1.0

    def __init__(self, config: Config, dim: int, input_dim: int | None = None) -> None:
        super().__init__(config, dim, input_dim)
        self.forget_bias = config.forget_bias
        self.hidden_norm, self.input_norm = (config.norm.build(self.gates * dim) for _ in range(2))
        self.cell_norm = config.norm.build(dim)
        self.initialise()

    def step(self, summed: Tensor, state: State) -> State:
        """W_x x (B, 4D) and (h, c) -> (h', c')."""
        h, c = state
        i, f, g, o = (self.hidden_norm(self.hidden(h)) + self.input_norm(summed) + self.bias).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.cell_norm(c).tanh(), c

    def initialise(self) -> None:
        """As of the cell, and the forget gate's bias."""
        super().initialise()
        nn.init.constant_(self.bias[self.dim : 2 * self.dim], self.forget_bias)


class GRU(Cell):
    """Gated recurrent unit with norms (Cho et al. 2014; Ba et al. 2016, supplementary material):

    (r, z) = norm₁(W_h h) + norm₂(W_x x) + b;  n = tanh(norm₃(W x) + b_n + σ(r) ⊙ (norm₄(U h) + b_u));
    h' = σ(z) ⊙ h + (1 − σ(z)) ⊙ n.

    z keeps, as in the authors' code and in `torch.nn.GRUCell`. The biases are those of a cell without norm; beside
    layer norm's own they are superfluous.

    >>> cell = GRU.Config().build(8)
    >>> cell(torch.randn(2, 8), cell.begin(2))[0].shape
    torch.Size([2, 8])
    """

    gates, memories = 3, 1

    @dataclass(frozen=True, kw_only=True)
    class Config(Cell.Config):
        """As of the cell."""

    def __init__(self, config: Config, dim: int, input_dim: int | None = None) -> None:
        super().__init__(config, dim, input_dim)
        self.candidate_bias = nn.Parameter(torch.zeros(dim))  # b_u
        self.hidden_norm, self.input_norm = (config.norm.build(2 * dim) for _ in range(2))
        self.candidate_hidden_norm, self.candidate_input_norm = (config.norm.build(dim) for _ in range(2))
        self.initialise()

    def step(self, summed: Tensor, state: State) -> State:
        """W_x x (B, 3D) and (h,) -> (h',)."""
        (h,) = state
        sizes = (2 * self.dim, self.dim)
        (gates_h, candidate_h), (gates_x, candidate_x) = self.hidden(h).split(sizes, -1), summed.split(sizes, -1)
        gates_b, candidate_b = self.bias.split(sizes)
        r, z = (self.hidden_norm(gates_h) + self.input_norm(gates_x) + gates_b).sigmoid().chunk(2, -1)
        recalled = r * (self.candidate_hidden_norm(candidate_h) + self.candidate_bias)
        n = (self.candidate_input_norm(candidate_x) + candidate_b + recalled).tanh()
        return (z * h + (1.0 - z) * n,)


class Recurrent(core.Configured, nn.Module):
    """Layers of cells, each reading along the row what the layer below shows.

    >>> layers = Recurrent.Config(cell=GRU.Config(), num_layers=2).build(8)
    >>> y, states = layers(torch.randn(2, 5, 8))
    >>> y.shape, len(states), torch.equal(y[:, -1], states[-1][0])
    (torch.Size([2, 5, 8]), 2, True)
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`dropout` is applied to what each layer but the last shows (Zaremba et al. 2014)."""

        cell: LSTM.Config | GRU.Config
        num_layers: int = 1
        dropout: float = 0.0

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        if config.num_layers < 1:
            raise core.InputError(f"num_layers={config.num_layers}; at least 1 is needed")
        self.dropout = config.dropout
        self.cells = nn.ModuleList(config.cell.build(dim) for _ in range(config.num_layers))

    def forward(
        self,
        x: Tensor,
        states: Sequence[State] | None = None,
        begins: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, list[State]]:
        """(B, T, D) -> what the last layer shows (B, T, D), and the state of each layer after the last token.

        Args:
            x: the inputs.
            states: of each layer, what it remembers from before; None: nothing.
            begins: (B, T), true at tokens that follow on `states`, not on the token before them.
            counts: (B), after how many tokens of each row its state is wanted; None: all.
        """
        after = []
        for i, cell in enumerate(self.cells):
            assert isinstance(cell, Cell)
            if i:
                x = F.dropout(x, self.dropout, self.training)
            x, state = _along(cell, x, cell.begin(len(x)) if states is None else states[i], begins, counts)
            after.append(state)
        return x, after

    def begin(self, rows: int) -> list[State]:
        """The states of `rows` rows that nothing was read of."""
        return [cell.begin(rows) for cell in self.cells]  # type: ignore[operator]


def _along(cell: Cell, x: Tensor, before: State, begins: Tensor | None, counts: Tensor | None) -> tuple[Tensor, State]:
    shown, state, kept = [], before, before
    for t, summed in enumerate(cell.input(x).unbind(1)):
        if begins is not None:
            state = tuple(torch.where(begins[:, t, None], b, s) for b, s in zip(before, state, strict=True))
        state = cell.step(summed, state)
        shown.append(state[0])
        if counts is not None:
            kept = tuple(torch.where((t < counts)[:, None], s, k) for s, k in zip(state, kept, strict=True))
    return torch.stack(shown, 1), state if counts is None else kept
