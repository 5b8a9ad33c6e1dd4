"""Keys and values of tokens already read, so that each is computed once.

One tensor a layer, allocated ahead. Row b holds `lengths[b]` tokens; what lies beyond is never looked at, so rows of
unequal length and right padding need no mask of their own: a query at position p sees the keys 0 … p.
Shapes: B rows, H key/value heads, C capacity, T new tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from allyouneed.nn.positions import Positions
from allyouneed.nn.sight import Memory, Sight, branches


class Cache:
    """The cache of a whole model: `layers[i]` is what layer i reads and writes.

    >>> cache = Cache(num_layers=1, batch=2, num_kv_heads=1, capacity=8, head_dim=4)
    >>> keys, values = cache.layers[0].extend(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    >>> keys.shape, cache.advance(3)
    (torch.Size([2, 1, 3, 4]), None)
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory: Memory | None = None,
    ) -> None:
        shape = (batch, num_kv_heads, capacity, head_dim)
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.uniform: int | None = 0  # the length of every row, where they agree
        self.longest = 0
        self.memory = memory
        self.layers = [
            LayerCache(
                self, torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
            )
            for _ in range(num_layers)
        ]

    def sight(self, part: Positions, length: int, segments: Tensor | None = None) -> Sight:
        """What `length` new tokens a row may see: all that the cache holds, and themselves up to each.

        With `segments` (B, length) the new tokens are alternatives that do not see each other; rows must agree in
        length, and nothing but the first alternative can be kept.
        """
        total = self.longest + length
        if total > self.capacity:
            raise ValueError(f"cache holds {self.capacity} tokens, {total} needed")
        if segments is not None:
            assert self.uniform is not None, "alternatives continue rows of one length"
            return branches(part, segments, self.uniform)
        queries = self.lengths[:, None] + torch.arange(length, device=self.lengths.device)
        keys = torch.arange(total, device=self.lengths.device).expand(len(self.lengths), -1)
        plain = self.uniform is not None and (length == 1 or self.uniform == 0)
        return Sight(part, queries, keys, queries, plain=plain, memory=self.memory)

    def advance(self, counts: Tensor | int) -> None:
        """Keep `counts` (B,) of the tokens just written; one number where it is the same for every row."""
        self.lengths = self.lengths + (counts if isinstance(counts, int) else counts.to(self.lengths.device))
        if isinstance(counts, int):
            self.uniform = None if self.uniform is None else self.uniform + counts
            self.longest += counts
        else:
            lengths = self.lengths.tolist()
            self.longest = max(lengths)
            self.uniform = self.longest if min(lengths) == self.longest else None

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens of every row; rows must be at least that long."""
        assert self.uniform is not None and length <= self.uniform, "rows of unequal length"
        self.lengths.fill_(length)
        self.uniform = self.longest = length

    def select(self, rows: Tensor) -> None:
        """Keep only `rows` (n,), in that order, possibly repeated: finished rows leave, beams fork."""
        self.lengths = self.lengths[rows]
        lengths = self.lengths.tolist()
        self.longest = max(lengths, default=0)
        self.uniform = self.longest if lengths and min(lengths) == self.longest else None
        self.memory = None if self.memory is None else self.memory.select(rows)
        for layer in self.layers:
            layer.select(rows)


class LayerCache:
    """One layer's keys and values, each (B, H, C, D), and those of a memory, (B, H, M, D), once they were asked for."""

    def __init__(self, cache: Cache, keys: Tensor, values: Tensor) -> None:
        self.cache, self.keys, self.values = cache, keys, values
        self.recalled: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, H, T, D) after each row's last; everything up to the longest row's end."""
        length, total = keys.shape[2], self.cache.longest + keys.shape[2]
        if self.cache.uniform is not None:
            self.keys[:, :, self.cache.uniform : total] = keys
            self.values[:, :, self.cache.uniform : total] = values
        else:
            rows = torch.arange(len(keys), device=keys.device)[:, None]
            places = self.cache.lengths[:, None] + torch.arange(length, device=keys.device)
            self.keys[rows, :, places] = keys.transpose(1, 2)
            self.values[rows, :, places] = values.transpose(1, 2)
        return self.keys[:, :, :total], self.values[:, :, :total]

    def recall(self, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values of the memory, computed by `project` the first time."""
        if self.recalled is None:
            self.recalled = project()
        return self.recalled

    def select(self, rows: Tensor) -> None:
        """Keep only `rows`."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        if self.recalled is not None:
            self.recalled = (self.recalled[0][rows], self.recalled[1][rows])
