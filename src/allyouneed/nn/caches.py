"""What a model keeps of tokens already read, so that each is read once: of a whole model, and of one layer.

A layer keeps one of two things: keys and values of all tokens (`KeyValues`), or a state of fixed size that each token
changes (`RecurrentState`). The model's cache knows how many tokens its rows hold, and speaks to both alike. Rows have
room of their own here; where many sequences come and go, `nn.paged` keeps both in one storage.

Row b holds `lengths[b]` tokens. Rows of unequal length are read padded on the right: of keys and values what lies
beyond a row's length is never looked at (a query at position p sees the keys 0 … p); states are those after as many
tokens as `counts` says. Shapes: B rows, H key/value heads, C capacity, T new tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from allyouneed.nn.positions import Positions
from allyouneed.nn.sight import Memory, Sight, branches

Recalled = tuple[Tensor, Tensor]
Recalling = Callable[[Callable[[], Recalled]], Recalled]


class Rows:
    """How many tokens each row holds, which all layers share; `counts` (B) how many of those that are being read each
    will hold besides, None: all.

    >>> rows = Rows(2)
    >>> rows.add(torch.tensor([3, 1]))
    >>> rows.lengths.tolist(), rows.longest, rows.uniform
    ([3, 1], 3, None)
    """

    def __init__(self, batch: int, device: torch.device | str = "cpu") -> None:
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.uniform: int | None = 0  # the length of every row, where they agree
        self.longest = 0
        self.counts: Tensor | None = None

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Rows:
        """Rows that hold so many tokens already."""
        rows = Rows(len(lengths), device)
        rows.add(torch.tensor(lengths, device=device))
        return rows

    def add(self, counts: Tensor | int) -> None:
        """Hold `counts` (B) more tokens; one number where it is the same for every row."""
        if isinstance(counts, int):
            self.lengths = self.lengths + counts
            self.uniform = None if self.uniform is None else self.uniform + counts
            self.longest += counts
        else:
            self._set(self.lengths + counts.to(self.lengths.device))

    def cut(self, length: int) -> None:
        """Hold `length` tokens in every row."""
        self._set(torch.full_like(self.lengths, length))

    def select(self, kept: Tensor) -> None:
        """Keep only the rows `kept` (n,)."""
        self._set(self.lengths[kept])

    def _set(self, lengths: Tensor) -> None:
        numbers = lengths.tolist()
        self.lengths, self.longest = lengths, max(numbers, default=0)
        self.uniform = self.longest if numbers and min(numbers) == self.longest else None


class LayerCache:
    """One layer's part of a cache."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.recalled: Recalled | None = None
        self.recalling: Recalling | None = None  # who knows what was made of the memory in earlier passes

    def advance(self) -> None:
        """Keep what the last pass wrote."""

    def recall(self, project: Callable[[], Recalled]) -> Recalled:
        """What a layer makes of the memory alone, (B, …, M, ·) each, computed by `project` the first time."""
        if self.recalled is None:
            self.recalled = project() if self.recalling is None else self.recalling(project)
        return self.recalled

    def select(self, kept: Tensor) -> None:
        """Keep only the rows `kept` (n,), in that order, possibly repeated."""
        if self.recalled is not None:
            self.recalled = (self.recalled[0][kept], self.recalled[1][kept])


class KeyValues(LayerCache):
    """Keys and values of all tokens read, wherever they are kept."""

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, H, T, D) after each row's last; everything up to the longest row's end."""
        raise NotImplementedError


class OwnKeyValues(KeyValues):
    """Keys and values, each (B, H, C, D), of rows that have all their room to themselves from the first on.

    >>> kept = OwnKeyValues(Rows(2), torch.zeros(2, 1, 8, 4))
    >>> kept.extend(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))[0].shape
    torch.Size([2, 1, 3, 4])
    """

    def __init__(self, rows: Rows, room: Tensor) -> None:
        """`room` (B, H, C, D) is for the keys; for the values as much is taken again."""
        super().__init__(rows)
        self.keys, self.values = room, torch.zeros_like(room)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, H, T, D) after each row's last; everything up to the longest row's end."""
        length, total = keys.shape[2], self.rows.longest + keys.shape[2]
        if self.rows.uniform is not None:
            self.keys[:, :, self.rows.uniform : total] = keys
            self.values[:, :, self.rows.uniform : total] = values
        else:
            rows = torch.arange(len(keys), device=keys.device)[:, None]
            places = self.rows.lengths[:, None] + torch.arange(length, device=keys.device)
            self.keys[rows, :, places] = keys.transpose(1, 2)
            self.values[rows, :, places] = values.transpose(1, 2)
        return self.keys[:, :, :total], self.values[:, :, :total]

    def select(self, kept: Tensor) -> None:
        """Keep only the rows `kept`."""
        super().select(kept)
        self.keys, self.values = self.keys[kept], self.values[kept]


class RecurrentState(LayerCache):
    """What a layer remembers of a text: tensors (B, …), which each pass replaces and none changes in place.

    >>> state = RecurrentState(Rows(1), torch.zeros(1, 4))
    >>> state.leave(torch.ones(1, 4))
    >>> state.advance()
    >>> state.before[0].tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """

    def __init__(self, rows: Rows, *before: Tensor) -> None:
        super().__init__(rows)
        self.before = self.after = before

    def leave(self, *after: Tensor) -> None:
        """Write what the layer remembers after the tokens it is reading; it counts once the cache advances."""
        self.after = tuple(x.detach() for x in after)

    def advance(self) -> None:
        """Go on from what was left."""
        self.before = self.after

    def select(self, kept: Tensor) -> None:
        """Keep only the rows `kept`."""
        super().select(kept)
        self.before = self.after = tuple(x[kept] for x in self.before)


class Cache:
    """The cache of a whole model: `layers[i]` is what layer i reads and writes.

    A pass is `sight`, the layers, `advance`; without the last, nothing of it is kept.
    """

    def __init__(
        self, rows: Rows, layers: Sequence[LayerCache], capacity: int | None = None, memory: Memory | None = None
    ) -> None:
        """`capacity`: of the layers that have one; None: any number of tokens."""
        self.rows, self.layers, self.capacity, self.memory = rows, layers, capacity, memory
        self._states = [layer for layer in layers if isinstance(layer, RecurrentState)]
        self._marks: list[tuple[int, list[tuple[Tensor, ...]]]] = []
        if rows.uniform is not None:
            self.mark()

    @property
    def lengths(self) -> Tensor:
        """How many tokens each row holds, (B)."""
        return self.rows.lengths

    def sight(
        self, part: Positions, length: int, segments: Tensor | None = None, counts: Tensor | None = None
    ) -> Sight:
        """What `length` new tokens a row may see: all that the cache holds, and themselves up to each.

        With `counts` (B) only as many of each row will be kept. With `segments` (B, length) the new tokens are
        alternatives that do not see each other; rows must agree in length, and nothing of them is kept.
        """
        total = self.rows.longest + length
        if self.capacity is not None and total > self.capacity:
            raise ValueError(f"cache holds {self.capacity} tokens, {total} needed")
        self.rows.counts = None if counts is None else counts.to(self.lengths.device)
        if segments is not None:
            assert self.rows.uniform is not None, "alternatives continue rows of one length"
            return branches(part, segments, self.rows.uniform)
        queries = self.lengths[:, None] + torch.arange(length, device=self.lengths.device)
        keys = torch.arange(total, device=self.lengths.device).expand(len(self.lengths), -1)
        plain = self.rows.uniform is not None and (length == 1 or self.rows.uniform == 0)
        return Sight(part, queries, keys, queries, plain=plain, memory=self.memory)

    def advance(self, counts: Tensor | int) -> None:
        """Keep `counts` (B) of the tokens just read, those that `sight` was told of; one number where it is all."""
        self.rows.add(counts)
        for layer in self.layers:
            layer.advance()

    def rewind(self, length: int) -> int:
        """Go back to `length` tokens, or to the last mark before them where a layer keeps a state; how many it holds
        then. Rows must agree and be at least that long.
        """
        assert self.rows.uniform is not None, "rows of unequal length"
        assert 0 <= length <= self.rows.uniform, f"{length} tokens of {self.rows.uniform} that the rows hold"
        if length == self.rows.uniform:
            return length
        if self._states:
            assert self._marks and self._marks[0][0] <= length, "no mark to go back to: a select forgets them all"
            while self._marks[-1][0] > length:
                self._marks.pop()
            length, states = self._marks[-1]
            for layer, before in zip(self._states, states, strict=True):
                layer.before = before
        self.rows.cut(length)
        return length

    def mark(self) -> None:
        """Remember this place for `rewind`; costs nothing but the states kept. Nothing goes back over a `select`."""
        assert self.rows.uniform is not None, "rows of unequal length"
        if self._states and (not self._marks or self._marks[-1][0] < self.rows.uniform):
            self._marks.append((self.rows.uniform, [layer.before for layer in self._states]))

    def select(self, kept: Tensor) -> None:
        """Keep only the rows `kept` (n,), in that order, possibly repeated: finished rows leave, beams fork."""
        self.rows.select(kept)
        self._marks.clear()
        self.memory = None if self.memory is None else self.memory.select(kept)
        for layer in self.layers:
            layer.select(kept)
