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
from torch import Tensor

Mix = tuple[tuple[str, float], ...]  # (adapter, how much of it): what joins the frozen weights for one row

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of one adapter: `index` (n,) int64, None where these are all; `shares` (n,)."""

    index: Tensor | None
    shares: Tensor

    def join(self, y: Tensor, x: Tensor, product: Product) -> Tensor:
        """y with what the adapter makes of its rows of x."""
        found = product(x if self.index is None else x[self.index])
        found = (self.shares.view(-1, *[1] * (found.ndim - 1)) * found).to(y.dtype)
        return y + found if self.index is None else y.index_add(0, self.index, found)


@dataclass(frozen=True, eq=False)
class Rows:
    """Which adapters each of R rows has."""

    count: int
    parts: Mapping[str, _Part]

    def join(self, y: Tensor, x: Tensor, products: Mapping[str, Product]) -> Tensor:
        """y (R, …) of a layer with what its adapters make of x (R, …); one row alone, as of positions, is all rows'."""
        parts = [(part, products[name]) for name, part in self.parts.items() if name in products]
        if parts and len(x) == 1 != self.count:
            y, x = (t.expand(self.count, *t.shape[1:]) for t in (y, x))
        assert not parts or len(x) == self.count, f"{len(x)} rows of a layer, adapters chosen for {self.count}"
        for part, product in parts:
            y = part.join(y, x, product)
        return y


_CHOSEN: ContextVar[Rows | None] = ContextVar("chosen", default=None)  # of each thread its own


@contextmanager
def chosen(mixes: Sequence[Mix], device: torch.device | str = "cpu") -> Iterator[None]:
    """Within, and in this thread, adapted layers join row i by the adapters of `mixes[i]`, not by those in use.

    >>> from allyouneed.adapt.lora import Lora, LoraLinear
    >>> layer = LoraLinear(torch.nn.Linear(4, 3))
    >>> torch.nn.init.ones_(layer.add("one", Lora.Config(rank=2)).B).shape
    torch.Size([3, 2])
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


def _parts(mixes: Sequence[Mix], device: torch.device | str) -> dict[str, _Part]:
    found: dict[str, dict[int, float]] = {}
    for i, mix in enumerate(mixes):
        for name, share in mix:
            found.setdefault(name, {})[i] = share
    return {name: _part(shares, len(mixes), device) for name, shares in found.items()}


def _part(shares: Mapping[int, float], count: int, device: torch.device | str) -> _Part:
    index = None if len(shares) == count else torch.tensor(list(shares), device=device)
    return _Part(index, torch.tensor(list(shares.values()), device=device))
