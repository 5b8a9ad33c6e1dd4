"""Layers whose frozen weight W is joined by trained products of low rank, W + s·BA (Hu et al. 2021), and whole
layers that stand for others.

Holds the pair of matrices and the layers around a base layer that hold several of them by name. Which layers of a model
these become, and which adapters are in use, is said in `lora`.

Shapes: N outputs, K inputs, r = rank, V rows of a table, D numbers in a row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.adapt.joined import joined
from allyouneed.adapt.rows import Part, current
from allyouneed.adapt.targets import Targets
from allyouneed.core.errors import InputError


class Lora(core.Configured, nn.Module):
    """ΔW x = s·B(Ax), A (r, K) random and B (N, r) zero at first, so that nothing changes before training
    (Hu et al. 2021, eq. 3).

    >>> Lora.Config(rank=2).build(8, 4)(torch.ones(3, 8)).abs().max().item()
    0.0
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`alpha` None: the rank, by which s = 1, or √r with `rslora`. `targets` are suffixes of layers' names, a regex
        for whole names, or "all-linear": all but the head. `whole` are suffixes of layers that are trained as they are,
        a new head say; each adapter has a copy of its own.
        """

        rank: int = 8
        alpha: float | None = None
        dropout: float = 0.0  # of the input of A
        rslora: bool = False  # s = α/√r (Kalajdzievski 2023) instead of α/r
        targets: Targets = ("q", "v")  # sec. 7.1
        whole: tuple[str, ...] = ()

        def __post_init__(self) -> None:
            if self.rank < 1:
                raise InputError(f"rank={self.rank}; it must be 1 or more")
            if self.alpha is not None and not 0 < self.alpha < math.inf:
                raise InputError(f"alpha={self.alpha}; it must be above 0")
            if not 0 <= self.dropout < 1:
                raise InputError(f"dropout={self.dropout}; from 0 to below 1")

        @property
        def resolved_alpha(self) -> float:
            """α."""
            return float(self.rank) if self.alpha is None else self.alpha

        @property
        def scale(self) -> float:
            """s."""
            return self.resolved_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __init__(
        self, config: Config, inputs: int, outputs: int, *, device: Any = None, draw: torch.Generator | None = None
    ) -> None:
        """`draw` is where A comes from; None: torch's own generator."""
        super().__init__()
        self.config, self.scale = config, config.scale
        self.A = nn.Parameter(torch.empty(config.rank, inputs, device=device))
        self.B = nn.Parameter(torch.empty(outputs, config.rank, device=device))
        self.begin(draw)

    @torch.no_grad()
    def begin(self, draw: torch.Generator | None) -> None:
        """A uniform within ±1/√K, as the authors' code has it; B zero."""
        bound = self.A.shape[1] ** -0.5
        self.A.copy_(torch.rand(self.A.shape, generator=draw) * (2 * bound) - bound)
        self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) -> (…, N), in float32 whatever x is."""
        x = F.dropout(x.to(self.A.dtype), self.config.dropout, self.training)
        return F.linear(F.linear(x, self.A), self.B) * self.scale

    def join(self, y: Tensor, x: Tensor, weight: float) -> Tensor:
        """y (…, N), which nobody else needs, and `weight` times what the adapter makes of x (…, K)."""
        if torch.is_autocast_enabled(x.device.type) or not x.dtype == y.dtype == self.A.dtype:
            return y + (weight * self(x)).to(y.dtype)
        return joined(y, F.dropout(x, self.config.dropout, self.training), self.A, self.B, weight * self.scale)

    def delta(self) -> Tensor:
        """ΔW as it stands in the layer's weight: (N, K)."""
        return self.B @ self.A * self.scale


class LoraRows(Lora):
    """ΔW of a table: row i is s·B A[:, i]; A (r, V) zero and B (D, r) random at first, as PEFT has them.

    >>> LoraRows(Lora.Config(rank=2), 9, 4)(torch.tensor([[8, 0]])).shape
    torch.Size([1, 2, 4])
    """

    @torch.no_grad()
    def begin(self, draw: torch.Generator | None) -> None:
        """A zero, B N(0, 1)."""
        self.A.zero_()
        self.B.copy_(torch.randn(self.B.shape, generator=draw))

    def forward(self, ids: Tensor) -> Tensor:
        """(…) integers -> (…, D)."""
        return F.linear(F.embedding(ids, self.A.t()), self.B) * self.scale

    def join(self, y: Tensor, x: Tensor, weight: float) -> Tensor:
        """Rows (…, D), and `weight` times those of the ids x (…)."""
        return y + (weight * self(x)).to(y.dtype)

    def delta(self) -> Tensor:
        """(V, D)."""
        return (self.B @ self.A).t() * self.scale


class Adapted(nn.Module):
    """A frozen base layer and its adapters by name; `weights` says how much of each is added, `merged` how much of each
    is in the base's weight already.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.adapters = base, nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self.merged: dict[str, float] = {}
        self.train(base.training)

    def add(self, name: str, config: Lora.Config, draw: torch.Generator | None = None) -> None:
        """A new adapter, not in use yet; it is drawn from `draw`, and drops out only where the layer is in training."""
        self.adapters[name] = self.made(config, draw).train(self.training)

    def made(self, config: Lora.Config, draw: torch.Generator | None) -> nn.Module:
        """What a new adapter of this layer is."""
        raise NotImplementedError

    def fold(self, weights: Mapping[str, float], sign: float) -> None:
        """Put adapters into the base's weight, or take them out, `sign` being −1."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device | None:
        """Where the base is."""
        return next((x.device for x in (*self.base.parameters(), *self.base.buffers())), None)


class LowRank(Adapted):
    """The base's output and what the adapters in use add to it."""

    def forward(self, x: Tensor) -> Tensor:
        """As of the base."""
        y: Tensor = self.base(x)
        if (by_row := current()) is not None:
            return y if self.merged else by_row.fold(Part.add, y, x, self.adapters)
        for name, weight in {} if self.merged else self.weights.items():
            y = self.adapters[name].join(y, x, weight)  # type: ignore[operator]
        return y

    @torch.no_grad()
    def fold(self, weights: Mapping[str, float], sign: float) -> None:
        """Add the products to the base's weight, or subtract them."""
        held: Any = self.base.weight
        for name, weight in weights.items():
            held += (sign * weight * self.adapters[name].delta()).to(held.dtype)  # type: ignore[operator]


class LoraLinear(LowRank):
    """Wx + b + Σ w·s·BAx over the adapters in use; `base` is any layer with `in_features` and `out_features`.

    >>> layer = LoraLinear(nn.Linear(8, 4))
    >>> layer.add("default", Lora.Config(rank=2))
    >>> torch.equal(layer(torch.ones(1, 8)), layer.base(torch.ones(1, 8)))
    True
    """

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.in_features: int = base.in_features
        self.out_features: int = base.out_features

    def made(self, config: Lora.Config, draw: torch.Generator | None) -> Lora:
        """A pair of matrices (r, K) and (N, r)."""
        return Lora(config, self.in_features, self.out_features, device=self.device, draw=draw)


class LoraEmbedding(LowRank):
    """The rows of a table and what the adapters in use add to them.

    >>> layer = LoraEmbedding(nn.Embedding(9, 4))
    >>> layer.add("default", Lora.Config(rank=2))
    >>> layer(torch.tensor([3])).shape
    torch.Size([1, 4])
    """

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.num_embeddings: int = base.num_embeddings
        self.embedding_dim: int = base.embedding_dim

    def made(self, config: Lora.Config, draw: torch.Generator | None) -> LoraRows:
        """A pair of matrices (r, V) and (D, r)."""
        return LoraRows(config, self.num_embeddings, self.embedding_dim, device=self.device, draw=draw)


class Whole(Adapted):
    """A layer of which an adapter has a trained copy; merging exchanges the two.

    >>> layer = Whole(nn.Linear(8, 4))
    >>> layer.add("default", Lora.Config())
    >>> layer(torch.ones(1, 8)).shape
    torch.Size([1, 4])
    """

    def forward(self, *given: Any, **named: Any) -> Any:
        """As of the base, by the copy in use if one is."""
        if (by_row := current()) is not None:
            (x,) = given
            y: Tensor = self.base(x)
            return y if self.merged else by_row.fold(Part.put, y, x, self.adapters)
        chosen = None if self.merged else next(iter(self.weights), None)
        return (self.base if chosen is None else self.adapters[chosen])(*given, **named)

    def made(self, config: Lora.Config, draw: torch.Generator | None) -> nn.Module:
        """A copy of the base as it is."""
        return copy.deepcopy(self.base)

    @torch.no_grad()
    def fold(self, weights: Mapping[str, float], sign: float) -> None:
        """Exchange the numbers of base and copy."""
        for name in weights:
            for here, there in zip(self.base.parameters(), self.adapters[name].parameters(), strict=True):
                here.data, there.data = there.data, here.data
