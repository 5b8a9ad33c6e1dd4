"""What every layer of one forward pass shares: where the tokens stand and which of them may see which.

Computed once a pass from segments or a cache, read by every attention layer. Shapes as in `nn.positions`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from allyouneed.nn.positions import Positions


class Sight:
    """Positions of queries (B, T) and keys (B, S), and the mask that follows from them.

    `plain` says that nothing restricts attention but the causal triangle, or for a single query nothing at all,
    so that the fastest kernels may be used without a mask.
    """

    def __init__(
        self, part: Positions, queries: Tensor, keys: Tensor, *, visible: Tensor | None = None, plain: bool = False
    ) -> None:
        self.part, self.queries, self.keys = part, queries, keys
        self.visible, self.plain = visible, plain
        self.rotation = part.rotation(queries)
        self._masks: dict[int | None, Tensor | None] = {}

    def turn(self, x: Tensor) -> Tensor:
        """Queries or new keys (B, H, T, D), turned to their positions."""
        return self.part.turn(x, self.rotation)

    def mask(self, window: int | None) -> Tensor | None:
        """What to add to the scores, (B, 1 or H, T, S) with −inf where a query may not look; None for `plain` sight.

        A `window` of w lets a query see itself and the w − 1 tokens before it.
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
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        if self.visible is not None:
            seen &= self.visible
        scores = torch.zeros((), device=seen.device) if bias is None else bias
        return torch.where(seen, scores, float("-inf"))


def within_segments(part: Positions, segments: Tensor) -> Sight:
    """Sight for packed or padded rows: `segments` (B, T) numbers the documents of a row from 1; 0 is padding.

    A token sees the tokens of its own document up to itself; positions count from 0 in each document. Padding sees
    itself, so that no row of scores is empty.
    """
    positions = places(segments)
    return Sight(part, positions, positions, visible=_own_documents(segments))


def branches(part: Positions, segments: Tensor, length: int) -> Sight:
    """Sight for alternatives that continue the same `length` cached tokens: each sees these and its own document."""
    positions = length + places(segments)
    cached = torch.arange(length, device=segments.device).expand(len(segments), -1)
    own = _own_documents(segments)
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


def _own_documents(segments: Tensor) -> Tensor:
    """Which token sees which by order and document alone: (B, T) -> (B, 1, T, T)."""
    index = torch.arange(segments.shape[1], device=segments.device)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    real = (segments != 0)[:, None, :, None] | torch.eye(len(index), dtype=torch.bool, device=segments.device)
    return same & real & (index[:, None] >= index)


def whole_rows(part: Positions, ids: Tensor) -> Sight:
    """Sight for rows of ids (B, T, …) that are one document each."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    return Sight(part, positions, positions, plain=True)
