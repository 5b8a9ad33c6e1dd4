"""What every layer of one forward pass shares: where the tokens stand and which of them may see which.

Computed once a pass from segments or a cache, read by every attention layer. Shapes as in `nn.positions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from allyouneed.nn.positions import Positions


@dataclass(frozen=True)
class Memory:
    """What a decoder reads of another model: `states` (B, M, dim), and where rows are padded `mask` (B, 1, 1, M), 0 or
    −inf, to be added to the scores.
    """

    states: Tensor
    mask: Tensor | None = None

    def select(self, rows: Tensor) -> Memory:
        """Keep only `rows` (n,), in that order, possibly repeated."""
        return Memory(self.states[rows], None if self.mask is None else self.mask[rows])


class Sight:
    """Positions of queries (B, T) and keys (B, S), and the mask that follows from them.

    `plain` says that nothing restricts attention but, where `causal`, the triangle – for a single query nothing at
    all –, so that the fastest kernels may be used without a mask.
    """

    def __init__(
        self,
        part: Positions,
        queries: Tensor,
        keys: Tensor,
        *,
        visible: Tensor | None = None,
        plain: bool = False,
        causal: bool = True,
        memory: Memory | None = None,
    ) -> None:
        self.part, self.queries, self.keys = part, queries, keys
        self.visible, self.plain, self.causal, self.memory = visible, plain, causal, memory
        self.rotation = part.rotation(queries)
        self._masks: dict[int | None, Tensor | None] = {}

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

    def mask(self, window: int | None) -> Tensor | None:
        """What to add to the scores, (B, 1 or H, T, S) with −inf where a query may not look; None for `plain` sight.

        A `window` of w lets a query see itself and the w − 1 tokens before it, and after it where sight is not causal.
        """
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> Tensor | None:
        bias = self.part.bias(self.queries, self.keys)
        reaches_all = window is None or (self.plain and self.keys.shape[1] <= window)
        if self.plain and reaches_all and bias is None:
            return None
        distance = self.queries[:, None, :, None] - self.keys[:, None, None, :]
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            seen &= distance.abs() < window
        if self.visible is not None:
            seen &= self.visible
        scores = torch.zeros((), device=seen.device) if bias is None else bias
        return torch.where(seen, scores, float("-inf"))


def within_segments(part: Positions, segments: Tensor, *, causal: bool = True, memory: Memory | None = None) -> Sight:
    """Sight for packed or padded rows: `segments` (B, T) numbers the documents of a row from 1; 0 is padding.

    A token sees the tokens of its own document, where `causal` up to itself; positions count from 0 in each document.
    Padding sees itself, so that no row of scores is empty.
    """
    positions = places(segments)
    return Sight(part, positions, positions, visible=_own_documents(segments), causal=causal, memory=memory)


def prefixed(part: Positions, segments: Tensor, prefix: Tensor) -> Sight:
    """Sight of a prefix language model (Raffel et al. 2020, sec. 3.2.1): within `prefix` (B, T, true where a token
    belongs to its document's) tokens see each other both ways, the others see what comes before them.
    """
    positions = places(segments)
    index = torch.arange(segments.shape[1], device=segments.device)
    before = index[:, None] >= index
    both = (prefix[:, :, None] & prefix[:, None, :])[:, None]
    return Sight(part, positions, positions, visible=_own_documents(segments) & (before | both), causal=False)


def branches(part: Positions, segments: Tensor, length: int) -> Sight:
    """Sight for alternatives that continue the same `length` cached tokens: each sees these and its own document."""
    positions = length + places(segments)
    cached = torch.arange(length, device=segments.device).expand(len(segments), -1)
    index = torch.arange(segments.shape[1], device=segments.device)
    own = _own_documents(segments) & (index[:, None] >= index)
    before = own.new_ones((*own.shape[:-1], length))
    return Sight(part, positions, torch.cat((cached, positions), 1), visible=torch.cat((before, own), -1))


def places(segments: Tensor) -> Tensor:
    """The position of each token within its document: (B, T) -> (B, T).

    >>> places(torch.tensor([[1, 1, 2, 2, 2, 0]])).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def last(x: Tensor, segments: Tensor) -> Tensor:
    """The vector of each row's last token that is no padding: (B, T, dim) and (B, T) -> (B, dim).

    >>> last(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[1, 1, 0]])).tolist()
    [[2.0]]
    """
    place = (segments != 0).long().cumsum(1).argmax(1)
    return x[torch.arange(len(x), device=x.device), place]


def _own_documents(segments: Tensor) -> Tensor:
    """Which token sees which by document alone: (B, T) -> (B, 1, T, T)."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    itself = torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    return same & ((segments != 0)[:, None, :, None] | itself)


def whole_rows(part: Positions, ids: Tensor, *, causal: bool = True, memory: Memory | None = None) -> Sight:
    """Sight for rows of ids (B, T, …) that are one document each."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]  # one for all rows, and so is what follows from it
    return Sight(part, positions, positions, plain=True, causal=causal, memory=memory)
