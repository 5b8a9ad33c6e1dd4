"""Sources and their targets as batches for encoder–decoders, sentences of like length together.

Shapes: B rows, M source tokens, T target tokens. A batch holds

    source           (B, M)  what is read
    source_segments  (B, M)  1, or 0 for padding
    ids              (B, T)  the target behind the start token
    targets          (B, T)  the token to predict at each place, the end token last; IGNORED in padding
    segments         (B, T)  1, or 0 for padding
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from allyouneed.core.seeds import generator
from allyouneed.data.batches import Epochs
from allyouneed.data.packing import IGNORED, Batch

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a source and of its target


def collate(pairs: Sequence[Pair], *, start: int, end: int) -> Batch:
    """One pair a row, both sides padded on the right.

    >>> batch = collate([([5, 6], [7]), ([5], [8, 9])], start=1, end=2)
    >>> batch["ids"].tolist(), batch["targets"].tolist(), batch["source_segments"].tolist()
    ([[1, 7, 0], [1, 8, 9]], [[7, 2, -100], [8, 9, 2]], [[1, 1], [1, 0]])
    """
    return {
        "source": _padded([source for source, _ in pairs], 0),
        "source_segments": _padded([[1] * len(source) for source, _ in pairs], 0),
        "ids": _padded([[start, *target] for _, target in pairs], 0),
        "targets": _padded([[*target, end] for _, target in pairs], IGNORED),
        "segments": _padded([[1] * (len(target) + 1) for _, target in pairs], 0),
    }


def bucketed(pairs: Sequence[Pair], *, tokens: int, start: int, end: int, seed: int) -> Epochs[Batch]:
    """Batches of about `tokens` target tokens, padding included, of sentences of like length (Vaswani et al. 2017,
    sec. 5.1). Which pairs share a batch is drawn once, the order of the batches anew each epoch.

    >>> batches = bucketed([([3] * n, [4] * n) for n in (1, 9, 2, 8)], tokens=20, start=1, end=2, seed=0)
    >>> sorted(len(next(batches)["ids"][0]) for _ in range(2))
    [3, 10]
    """
    order = torch.randperm(len(pairs), generator=generator(seed, "buckets")).tolist()
    order.sort(key=lambda i: (len(pairs[i][1]), len(pairs[i][0])))
    made: list[list[Pair]] = []
    for i in order:
        if not made or (len(made[-1]) + 1) * (len(pairs[i][1]) + 1) > tokens:
            made.append([])
        made[-1].append(pairs[i])
    batches = [collate(one, start=start, end=end) for one in made]
    return Epochs(batches, batch_size=1, collate=lambda drawn: drawn[0], seed=seed)


def _padded(rows: Sequence[Sequence[int]], filling: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filling] * (width - len(row))] for row in rows])
