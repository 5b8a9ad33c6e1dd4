"""Who sees whom, told so that a kernel can work it out for any tile of the scores by itself.

Each query sees the keys from one index up to another. Such intervals say causal and banded sight, documents packed in a
row, padding, prefixes and caches, in memory linear in length. The whole mask, which is quadratic, is made only for the
kernel that asks for it.

Shapes: B rows, T queries, S keys, H heads; a dimension of 1 says that all rows or queries agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from allyouneed.nn.positions import Positions

Interval = tuple[Tensor, Tensor]  # (B or 1, T or 1) each: from the first index up to, not including, the second
ALL = slice(None)


@dataclass(frozen=True)
class Span:
    """What a block of queries needs: none of them sees a key outside `low` … `high`, each sees all keys within `whole`
    (upper ends not included).
    """

    rows: slice
    low: int
    high: int
    whole: tuple[int, int]

    def tiles(self, size: int) -> list[tuple[slice, bool]]:
        """The keys needed, `size` at a time, and whether every query sees all of them."""
        starts = range(self.low // size * size, self.high, size)
        tiles = [slice(max(start, self.low), min(start + size, self.high)) for start in starts]
        return [(tile, self.whole[0] <= tile.start and tile.stop <= self.whole[1]) for tile in tiles]


class View:
    """What the queries of one layer see of `num_keys` keys.

    Args:
        intervals: the keys that each query sees: one interval, or two, of which it sees both; empty ones see nothing.
        part: makes a bias of the positions of `queries` (B or 1, T) and `keys` (B or 1, S). None: no bias.
        plain: nothing restricts attention but, where `causal`, the triangle – for a single query nothing at all –, so
            that the fastest kernels may be used without a mask.

    >>> last = torch.arange(4)[None] + 1
    >>> View([(torch.zeros_like(last), last)], 4).tile(slice(2, 4), slice(1, 4)).tolist()
    [[[[0.0, 0.0, -inf], [0.0, 0.0, 0.0]]]]
    """

    def __init__(
        self,
        intervals: Sequence[Interval],
        num_keys: int,
        *,
        part: Positions | None = None,
        queries: Tensor | None = None,
        keys: Tensor | None = None,
        plain: bool = False,
        causal: bool = False,
    ) -> None:
        self.intervals, self.num_keys = intervals, num_keys
        self.part, self.queries, self.keys = part, queries, keys
        self.plain, self.causal = plain, causal
        self._spans: dict[tuple[int, int], list[Span]] = {}
        self._bounds: dict[tuple[int, int], Tensor] = {}

    @cached_property
    def mask(self) -> Tensor | None:
        """What to add to the scores, (B or 1, H or 1, T or 1, S) with −inf where a query may not look; None where the
        view is plain and nothing is added.
        """
        return None if self.plain and not self.has_bias else self.tile(ALL, ALL)

    @property
    def has_bias(self) -> bool:
        """Whether positions add anything to the scores."""
        return self._sample is not None

    @property
    def learned(self) -> tuple[Tensor, ...]:
        """The parameters that make the bias, where a gradient is asked for."""
        if self.part is None or self._sample is None or not self._sample.requires_grad:
            return ()
        return tuple(p for p in self.part.parameters() if p.requires_grad)

    @cached_property
    def _sample(self) -> Tensor | None:
        return self.bias(slice(0, 1), slice(0, 1))

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """The mask of some queries and keys: (B or 1, H or 1, t or 1, s)."""
        bias, seen = self.bias(rows, columns), self.seen(rows, columns)
        return torch.where(seen, torch.zeros((), device=seen.device) if bias is None else bias, float("-inf"))

    def seen(self, rows: slice, columns: slice) -> Tensor:
        """Which of these queries sees which of these keys: (B or 1, 1, t or 1, s)."""
        index = torch.arange(*columns.indices(self.num_keys), device=self.intervals[0][0].device)
        found = [
            (_of(first, rows)[:, None, :, None] <= index) & (index < _of(last, rows)[:, None, :, None])
            for first, last in self.intervals
        ]
        return found[0] if len(found) == 1 else found[0] | found[1]

    def bias(self, rows: slice, columns: slice) -> Tensor | None:
        """What positions add to the scores of some queries and keys, (B or 1, H, t, s), or None for nothing."""
        if self.part is None:
            return None
        assert self.queries is not None and self.keys is not None, "a bias is one of positions"
        return self.part.bias(self.queries[:, rows], self.keys[:, columns])

    def spans(self, length: int, size: int) -> list[Span]:
        """What each block of `size` of the `length` queries needs."""
        if (length, size) not in self._spans:
            blocks = [slice(start, min(start + size, length)) for start in range(0, length, size)]
            ends = torch.stack([self._ends(rows) for rows in blocks]).tolist()
            self._spans[length, size] = [
                Span(rows, low, high, whole=(whole_low, whole_high))
                for rows, (low, high, whole_low, whole_high) in zip(blocks, ends, strict=True)
            ]
        return self._spans[length, size]

    @property
    def slopes(self) -> Tensor | None:
        """The bias in one number a head, (H,), where positions have it so."""
        return None if self.part is None else self.part.slopes()

    def bounds(self, batch: int, length: int) -> Tensor:
        """The ends of the intervals of each query as one tensor, first, last, first, last …: (2 or 4, B, T), int32."""
        if (batch, length) not in self._bounds:
            ends = [end.expand(batch, length) for interval in self.intervals for end in interval]
            self._bounds[batch, length] = torch.stack(ends).to(torch.int32)
        return self._bounds[batch, length]

    def places(self, batch: int) -> tuple[Tensor, Tensor]:
        """The positions of queries and keys, for each row: (B, T) and (B, S), int32."""
        assert self.queries is not None and self.keys is not None
        queries, keys = (x.expand(batch, -1).to(torch.int32).contiguous() for x in (self.queries, self.keys))
        return queries, keys

    def _ends(self, rows: slice) -> Tensor:
        """`low`, `high` and `whole` of a block; of two intervals neither is seen whole."""
        firsts, lasts = zip(*((_of(first, rows), _of(last, rows)) for first, last in self.intervals), strict=True)
        low, high = torch.stack([x.min() for x in firsts]).min(), torch.stack([x.max() for x in lasts]).max()
        whole = (firsts[0].max(), lasts[0].min()) if len(firsts) == 1 else (high, low)
        return torch.stack((low, high, *whole))


def _of(x: Tensor, rows: slice) -> Tensor:
    """The queries `rows` of x (B or 1, T or 1)."""
    return x if x.shape[1] == 1 else x[:, rows]
