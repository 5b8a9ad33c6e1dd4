"""Adapters chosen row by row, so that one pass reads for requests with different ones (Chen et al. 2023; Sheng et al.
2023).

What a layer reads is multiplied by its frozen weight as a whole. Then the rows of each adapter are gathered and go
through its two thin matrices, whatever their rank: segments, no padding.

Shapes: R rows, which are the first dimension of what layers read; n of them with one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Mix = tuple[tuple[str, float], ...]  # (adapter, how much of it): what joins the frozen weights for one row

Layer = Callable[[Tensor], Tensor]
Change = Callable[["Part", Tensor, Tensor, Layer], Tensor]  # `Part.add` or `Part.put`


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one adapter: `index` (n,) int64, None where these are all; `shares` (n,)."""

    index: Tensor | None
    shares: Tensor

    def add(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """y, its rows grown by their shares of what a layer makes of x."""
        found = layer(self.of(x))
        found = (self.shares.view(-1, *[1] * (found.ndim - 1)) * found).to(y.dtype)
        return y + found if self.index is None else y.index_add(0, self.index, found)

    def put(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """y, its rows being what a layer makes of x."""
        found = layer(self.of(x)).to(y.dtype)
        return found if self.index is None else y.index_copy(0, self.index, found)

    def of(self, x: Tensor) -> Tensor:
        """Its rows."""
        return x if self.index is None else x[self.index]


@dataclass(frozen=True, eq=False)
class Rows:
    """Which adapters each of R rows has."""

    count: int
    parts: Mapping[str, Part]

    def fold(self, change: Change, y: Tensor, x: Tensor, layers: nn.ModuleDict) -> Tensor:
        """y (R, …), what a layer makes of x (R, …), after its adapters changed their rows. One row alone, of positions
        say, is that of all.
        """
        parts = [(part, layers[name]) for name, part in self.parts.items() if name in layers]
        if parts and len(x) == 1 != self.count:
            y, x = (t.expand(self.count, *t.shape[1:]) for t in (y, x))
        if parts and len(x) != self.count:
            raise ValueError(f"{len(x)} rows of a layer, adapters chosen for {self.count}")
        for part, layer in parts:
            y = change(part, y, x, layer)
        return y


_CHOSEN: ContextVar[Rows | None] = ContextVar("chosen", default=None)  # of each thread its own


@contextmanager
def chosen(mixes: Sequence[Mix], device: torch.device | str = "cpu") -> Iterator[None]:
    """Within, and in this thread, adapted layers join row i by the adapters of `mixes[i]`, not by those in use.

    >>> from allyouneed.adapt.layers import Lora, LoraLinear
    >>> layer = LoraLinear(torch.nn.Linear(4, 3))
    >>> layer.add("one", Lora.Config(rank=2))
    >>> _ = torch.nn.init.ones_(layer.adapters["one"].B)
    >>> with torch.no_grad(), chosen([(), (("one", 0.5),)]):
    ...     (layer(torch.ones(2, 4)) == layer.base(torch.ones(2, 4))).all(1).tolist()
    [True, False]
    """
    token = _CHOSEN.set(Rows(len(mixes), _parts(mixes, device)))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def current() -> Rows | None:
    """What was chosen here, if anything."""
    return _CHOSEN.get()


def _parts(mixes: Sequence[Mix], device: torch.device | str) -> dict[str, Part]:
    found: dict[str, dict[int, float]] = {}
    for i, mix in enumerate(mixes):
        for name, share in mix:
            found.setdefault(name, {})[i] = share
    return {name: _part(shares, len(mixes), device) for name, shares in found.items()}


def _part(shares: Mapping[int, float], count: int, device: torch.device | str) -> Part:
    index = None if len(shares) == count else torch.tensor(list(shares), device=device)
    return Part(index, torch.tensor(list(shares.values()), device=device))
