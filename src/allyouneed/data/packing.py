"""Documents of token ids to rows of one length, for a batch: chopped, packed whole, or padded on the right.

Holds no text and no randomness. Shapes: B rows, T = length tokens. Rows come as a `Batch` of int64 tensors:

    ids       (B, T)  the tokens
    targets   (B, T)  the token to predict at each place; IGNORED at a document's last token, in prompts and in padding
    segments  (B, T)  the number of each token's document within its row, counted from 1; 0 is padding
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # what torch's cross entropy passes over
Batch = dict[str, Tensor]


class Piece(NamedTuple):
    """One document or a part of it: its tokens and what follows each of them, lists of one length."""

    ids: list[int]
    targets: list[int]


def document(ids: Sequence[int], predicted: Sequence[bool] | None = None) -> Piece:
    """A document every token of which is predicted from those before it, or only the tokens marked in `predicted`.

    >>> document([5, 6, 7])
    Piece(ids=[5, 6, 7], targets=[6, 7, -100])
    >>> document([5, 6, 7], predicted=[False, False, True]).targets
    [-100, 7, -100]
    """
    marks = [True] * len(ids) if predicted is None else predicted
    assert len(marks) == len(ids), "one mark for each token"
    following = [token if mark else IGNORED for token, mark in zip(ids, marks, strict=True)]
    return Piece(list(ids), following[1:] + [IGNORED] * bool(ids))


def answer(prompt: Sequence[int], completion: Sequence[int]) -> Piece:
    """A prompt, which is read and not predicted, and the completion that is.

    >>> answer([5, 6], [7, 8]).targets
    [-100, 7, 8, -100]
    """
    return document([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))


def chop(pieces: Iterable[Piece], length: int) -> Batch:
    """All pieces one after another, chopped into rows; a document may begin in one row and go on in the next.

    No token and no target is lost; only the last row is padded.

    >>> rows = chop([document([1, 2, 3]), document([4, 5])], length=4)
    >>> rows["ids"].tolist(), rows["targets"].tolist()
    ([[1, 2, 3, 4], [5, 0, 0, 0]], [[2, 3, -100, 5], [-100, -100, -100, -100]])
    >>> rows["segments"].tolist()
    [[1, 1, 1, 2], [1, 0, 0, 0]]
    """
    rows: list[list[Piece]] = []
    space = 0
    for piece in pieces:
        start = 0
        while start < len(piece.ids):
            if space == 0:
                rows.append([])
                space = length
            taken = _cut(piece, start, start + space)
            rows[-1].append(taken)
            start, space = start + len(taken.ids), space - len(taken.ids)
    return _stack(rows, length)


def fit(pieces: Iterable[Piece], length: int) -> Batch:
    """Pieces packed whole, the longest first, each into the fullest row that still has room for it.

    Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, sec. 3): documents
    longer than a row are cut into rows first, and nothing else is ever cut. Rows are padded at their end.

    >>> fit([document([1, 2]), document([3, 4, 5]), document([6])], length=4)["ids"].tolist()
    [[3, 4, 5, 6], [1, 2, 0, 0]]
    """
    parts = [_cut(p, start, start + length) for p in pieces for start in range(0, len(p.ids), length)]
    rows: list[list[Piece]] = []
    spaces: list[tuple[int, int]] = []  # (tokens left, row), sorted; full rows are dropped
    for part in sorted(parts, key=lambda p: -len(p.ids)):
        found = bisect_left(spaces, (len(part.ids), 0))
        if found < len(spaces):
            space, row = spaces.pop(found)
        else:
            space, row = length, len(rows)
            rows.append([])
        rows[row].append(part)
        if space > len(part.ids):
            insort(spaces, (space - len(part.ids), row))
    return _stack(rows, length)


def pad_right(pieces: Sequence[Piece], length: int | None = None) -> Batch:
    """One piece a row, padded on the right to the longest; what goes beyond `length` tokens is cut off.

    >>> rows = pad_right([answer([1], [2, 3]), answer([4], [5])])
    >>> rows["targets"].tolist(), rows["segments"].tolist()
    ([[2, 3, -100], [5, -100, -100]], [[1, 1, 1], [1, 1, 0]])
    """
    longest = max(len(piece.ids) for piece in pieces)
    width = longest if length is None else min(longest, length)
    return _stack([[_cut(piece, 0, width)] for piece in pieces], width)


def take(batch: Batch, rows: slice | Sequence[int]) -> Batch:
    """Some rows of a batch.

    >>> take({"ids": torch.tensor([[1, 2], [3, 4], [5, 6]])}, [2, 0])["ids"].tolist()
    [[5, 6], [1, 2]]
    """
    return {name: tensor[rows] for name, tensor in batch.items()}


def _cut(piece: Piece, start: int, stop: int) -> Piece:
    return Piece(piece.ids[start:stop], piece.targets[start:stop])


def _stack(rows: Sequence[Sequence[Piece]], length: int) -> Batch:
    """Rows of pieces as one batch."""
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    targets, segments = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, pieces in enumerate(rows):
        start = 0
        for number, piece in enumerate(pieces, 1):
            span = slice(start, start + len(piece.ids))
            ids[row, span] = torch.tensor(piece.ids)
            targets[row, span] = torch.tensor(piece.targets)
            segments[row, span] = number
            start = span.stop
    return {"ids": ids, "targets": targets, "segments": segments}
