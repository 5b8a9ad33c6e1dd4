"""What every layer of one forward pass shares: where the tokens stand and which of them may see which.

Computed once a pass from segments or a cache, read by every attention layer. Shapes as in `nn.positions`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from allyouneed.nn.positions import Positions
from allyouneed.nn.view import Interval, View


@dataclass(frozen=True)
class Memory:
    """What a decoder reads of another model: `states` (B, M, dim), and where rows are padded `segments` (B, M), 0 for
    padding on either side.
    """

    states: Tensor
    segments: Tensor | None = None
    views: list[View] = field(default_factory=list, compare=False, repr=False)  # the one view, once it was asked for

    @property
    def view(self) -> View:
        """Every query sees the whole row of states, but no padding."""
        if not self.views:
            self.views.append(self._build_view())
        return self.views[0]

    def rows(self) -> list[Memory]:
        """Each row by itself, without the padding on its right."""
        return [self._row(i) for i in range(len(self.states))]

    @staticmethod
    def join(memories: Sequence[Memory]) -> Memory:
        """One memory of the rows of several, padded on the right where they differ in length."""
        lengths = [memory.states.shape[1] for memory in memories]
        states = torch.cat([widened(memory.states, max(lengths), 1) for memory in memories])
        if len(set(lengths)) == 1 and all(memory.segments is None for memory in memories):
            return Memory(states)
        return Memory(states, torch.cat([widened(memory._known(), max(lengths), 1) for memory in memories]))

    def select(self, rows: Tensor) -> Memory:
        """Keep only `rows` (n,), in that order, possibly repeated."""
        return Memory(self.states[rows], None if self.segments is None else self.segments[rows])

    def _row(self, i: int) -> Memory:
        if self.segments is None:
            return Memory(self.states[i : i + 1])
        known = self.segments[i : i + 1, : int((self.segments[i] != 0).nonzero()[-1]) + 1]
        states = self.states[i : i + 1, : known.shape[1]]
        return Memory(states, None if bool(known.all()) else known)

    def _known(self) -> Tensor:
        if self.segments is not None:
            return self.segments
        return torch.ones(self.states.shape[:2], dtype=torch.long, device=self.states.device)

    def _build_view(self) -> View:
        length = self.states.shape[1]
        if self.segments is None:
            return View([_everything(length, self.states.device)], length, plain=True)
        known = (self.segments != 0).long()
        last = (known * (_index(known) + 1)).amax(1, keepdim=True)
        return View([(known.argmax(1, keepdim=True), last)], length)


class Sight:
    """Positions of queries (B, T) and keys (B, S), and who sees whom.

    Args:
        own: (B or 1, T), the index of each query among the keys.
        seen: the keys that each query sees, whatever the window. None: all, where `causal` up to itself.
        shared: how many keys from the first on all queries see besides.
        plain: nothing restricts attention but, where `causal`, the triangle (`nn.view`).
    """

    def __init__(
        self,
        part: Positions,
        queries: Tensor,
        keys: Tensor,
        own: Tensor,
        *,
        seen: Interval | None = None,
        shared: int = 0,
        plain: bool = False,
        causal: bool = True,
        memory: Memory | None = None,
    ) -> None:
        self.part, self.queries, self.keys, self.own = part, queries, keys, own
        self.seen, self.shared, self.plain, self.causal, self.memory = seen, shared, plain, causal, memory
        self.rotation = part.rotation(queries)
        self._views: dict[int | None, View] = {}

    def fresh(self) -> Sight:
        """The same with no view made yet, for a block that is computed twice and must do the same both times."""
        sight = copy.copy(self)
        sight._views = {}
        return sight

    def turn(self, x: Tensor) -> Tensor:
        """Queries or new keys (B, H, T, D), turned to their positions."""
        return self.part.turn(x, self.rotation)

    @cached_property
    def begins(self) -> Tensor | None:
        """Which tokens do not follow the one at their left but what was read before the row, (B, T); None: none. For
        layers that carry a state along the row.
        """
        if self.plain:
            return None
        begins = torch.zeros_like(self.queries, dtype=torch.bool)
        begins[:, 1:] = self.queries[:, 1:] != self.queries[:, :-1] + 1
        return begins if bool(begins.any()) else None

    def view(self, window: int | None) -> View:
        """What the queries see through a layer's `window`: of w, itself and the w − 1 tokens before it, and after it
        where sight is not causal.
        """
        if window not in self._views:
            self._views[window] = self._build_view(window)
        return self._views[window]

    def _build_view(self, window: int | None) -> View:
        total = self.keys.shape[1]
        intervals = [self._narrowed(window)]
        if self.shared:  # keys whose index is their position
            first = torch.zeros_like(self.queries) if window is None else (self.queries + 1 - window).clamp(min=0)
            intervals.append((first, torch.full_like(self.queries[:, :1], self.shared)))
        return View(
            intervals,
            total,
            part=self.part,
            queries=self.queries,
            keys=self.keys,
            plain=self.plain and (window is None or total <= window),
            causal=self.causal,
        )

    def _narrowed(self, window: int | None) -> Interval:
        first, last = self.seen or _everything(self.keys.shape[1], self.keys.device)
        if self.causal:
            last = self.own + 1
        if window is not None:
            first = torch.maximum(first, self.own + 1 - window)
            last = torch.minimum(last, self.own + window)
        return first, last


def within_segments(part: Positions, segments: Tensor, *, causal: bool = True, memory: Memory | None = None) -> Sight:
    """Sight for packed or padded rows: `segments` (B, T) numbers the documents of a row from 1; 0 is padding.

    A token sees the tokens of its own document, where `causal` up to itself; positions count from 0 in each document.
    Padding sees itself, so that no row of scores is empty.
    """
    positions, own = places(segments), _index(segments)
    seen = _own_documents(segments, positions, own)
    return Sight(part, positions, positions, own, seen=seen, causal=causal, memory=memory)


def prefixed(part: Positions, segments: Tensor, prefix: Tensor) -> Sight:
    """Sight of a prefix language model (Raffel et al. 2020, sec. 3.2.1): within `prefix` (B, T), true for the first
    tokens of a document, tokens see each other both ways, the others see what comes before them.
    """
    positions, own = places(segments), _index(segments)
    first, _ = _own_documents(segments, positions, own)
    last = torch.where(prefix, _ends(own - positions, own, prefix), own + 1)
    return Sight(part, positions, positions, own, seen=(first, last), causal=False)


def branches(part: Positions, segments: Tensor, length: int) -> Sight:
    """Sight for alternatives that continue the same `length` cached tokens: each sees these and its own document."""
    positions, own = places(segments), _index(segments)
    cached = torch.arange(length, device=segments.device).expand(len(segments), -1)
    first, last = _own_documents(segments, positions, own)
    keys = torch.cat((cached, length + positions), 1)
    return Sight(part, length + positions, keys, length + own, seen=(length + first, length + last), shared=length)


def whole_rows(part: Positions, ids: Tensor, *, causal: bool = True, memory: Memory | None = None) -> Sight:
    """Sight for rows of ids (B, T, …) that are one document each."""
    positions = _index(ids)  # one for all rows, and so is what follows from it
    return Sight(part, positions, positions, positions, plain=True, causal=causal, memory=memory)


def places(segments: Tensor) -> Tensor:
    """The position of each token within its document: (B, T) -> (B, T).

    >>> places(torch.tensor([[1, 1, 2, 2, 2, 0]])).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def widened(x: Tensor, length: int, dim: int) -> Tensor:
    """`x` with zeros after it along one of its dimensions, up to `length`.

    >>> widened(torch.ones(2, 1), 3, 1).tolist()
    [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """
    if x.shape[dim] == length:
        return x
    missing = list(x.shape)
    missing[dim] = length - x.shape[dim]
    return torch.cat((x, x.new_zeros(missing)), dim)


def last(x: Tensor, segments: Tensor) -> Tensor:
    """The vector of each row's last token that is no padding: (B, T, dim) and (B, T) -> (B, dim).

    >>> last(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[1, 1, 0]])).tolist()
    [[2.0]]
    """
    place = (segments != 0).long().cumsum(1).argmax(1)
    return x[torch.arange(len(x), device=x.device), place]


def _own_documents(segments: Tensor, positions: Tensor, own: Tensor) -> Interval:
    """Where each token's document begins and ends; padding is a document of one token: (B, T) each."""
    padding, starts = segments == 0, own - positions
    return torch.where(padding, own, starts), torch.where(padding, own + 1, _ends(starts, own))


def _ends(starts: Tensor, own: Tensor, counted: Tensor | None = None) -> Tensor:
    """Where the document ends that began at `starts`, or what of it is `counted`: (B, T) -> (B, T)."""
    after = (own + 1).expand_as(starts) if counted is None else torch.where(counted, own + 1, 0)
    return torch.zeros_like(starts).scatter_reduce(1, starts, after, "amax").gather(1, starts)


def _index(x: Tensor) -> Tensor:
    """0, 1, … for each token of x (B, T, …): (1, T)."""
    return torch.arange(x.shape[1], device=x.device)[None]


def _everything(length: int, device: torch.device) -> Interval:
    return torch.zeros((1, 1), dtype=torch.long, device=device), torch.full((1, 1), length, device=device)
