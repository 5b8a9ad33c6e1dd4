"""What a text-to-text model is pre-trained on: spans that were cut out of a text, or the rest of a text.

Nothing here knows the model; batches come from `Windows`-like iterators that own their randomness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.data.batches import Generated
from allyouneed.data.packing import Batch
from allyouneed.data.pairs import Collate, Pair


class Lengths(NamedTuple):
    """Tokens of text, and of the source and target made of them, each with its end token."""

    text: int
    source: int
    target: int


def counts(length: int, density: float = 0.15, mean: float = 3.0) -> tuple[int, int]:
    """How many of `length` tokens are cut out, and in how many spans.

    >>> counts(568)
    (85, 28)
    """
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean), 1), length - noise)


def lengths(source: int, density: float = 0.15, mean: float = 3.0) -> Lengths:
    """The longest text whose source, with a sentinel for each span and an end token, is exactly `source` tokens long.

    T5 reads 568 tokens of text to fill 512, and writes 114 (Raffel et al. 2020, sec. 3.1.2, and the authors' code).

    Raises:
        InputError: no room for a token, a sentinel and the end, `density` not between 0 and 1, `mean` below 1, or both
            so extreme that no text has such a source.

    >>> lengths(512)
    Lengths(text=568, source=512, target=114)
    """
    if source < 3 or not 0 < density < 1 or mean < 1:
        raise InputError(f"length={source}, density={density}, mean={mean}; 3 or more, between 0 and 1, 1 or more")
    text = 2
    while _lengths(text + 1, density, mean).source <= source:
        text += 1
    found = _lengths(text, density, mean)
    if found.source != source:  # where spans are as many as kept tokens
        raise InputError(f"length={source}: no text gives it with density={density}, mean={mean}; {found.source} does")
    return found


def _lengths(text: int, density: float, mean: float) -> Lengths:
    noise, spans = counts(text, density, mean)
    return Lengths(text, text - noise + spans + 1, noise + spans + 1)


def parts(total: int, count: int, randomness: torch.Generator) -> list[int]:
    """`total` cut into `count` parts of at least 1, every way to do so being equally likely.

    >>> sum(parts(10, 3, torch.Generator().manual_seed(0)))
    10
    """
    cuts = sorted((torch.randperm(total - 1, generator=randomness)[: count - 1] + 1).tolist())
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, total], strict=True)]


def spans(length: int, density: float, mean: float, randomness: torch.Generator) -> list[tuple[int, int]]:
    """Where the spans that are cut out begin and end. The text begins with what stays and ends with a span.

    Kept and cut tokens are each cut into as many parts as there are spans, and taken in turn, as the authors' code
    does.
    """
    noise, number = counts(length, density, mean)
    cut, kept = parts(noise, number, randomness), parts(length - noise, number, randomness)
    found, at = [], 0
    for stays, goes in zip(kept, cut, strict=True):
        found.append((at + stays, at + stays + goes))
        at += stays + goes
    return found


def corrupt(ids: Sequence[int], cut: Sequence[tuple[int, int]], *, sentinel: int, end: int) -> Pair:
    """The source, where a sentinel stands for each span, and the target, each span after its sentinel; both ended.

    Sentinels count down from `sentinel`, the highest id (Raffel et al. 2020, sec. 3.1.4 and fig. 2).

    >>> corrupt([10, 11, 12, 13, 14], [(1, 3), (4, 5)], sentinel=99, end=1)
    ([10, 99, 13, 98, 1], [99, 11, 12, 98, 14, 1])
    """
    source: list[int] = []
    target: list[int] = []
    at = 0
    for number, (begin, stop) in enumerate(cut):
        source += [*ids[at:begin], sentinel - number]
        target += [sentinel - number, *ids[begin:stop]]
        at = stop
    return [*source, *ids[at:], end], [*target, end]


class Spans(Generated):
    """Span corruption of random windows of one long text: every source is `length` tokens, every target alike.

    Args:
        tokens: (N,), any integer type.
        batch_size: rows a batch.
        length: of the source, sentinels and end token included.
        collate: pairs to a batch (`pairs.apart`, `pairs.joined`).
        sentinel: the highest of the sentinels.
        sentinels: how many there are.
        end: the end token.
        seed: of windows and spans.
        density: the share of tokens cut out.
        mean: tokens a span.

    Raises:
        InputError: the text is too short, or there are more spans than sentinels.
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        batch_size: int,
        length: int,
        collate: Collate,
        sentinel: int,
        end: int,
        seed: int,
        sentinels: int = 100,
        density: float = 0.15,
        mean: float = 3.0,
    ) -> None:
        self.lengths = lengths(length, density, mean)
        number = counts(self.lengths.text, density, mean)[1]
        if number > sentinels:
            raise InputError(f"length={length} needs {number} sentinels, the vocabulary has {sentinels}")
        _long_enough(tokens, self.lengths.text)
        self.tokens, self.batch_size, self.collate = tokens, batch_size, collate
        self.sentinel, self.end, self.density, self.mean = sentinel, end, density, mean
        super().__init__(self._draw, seed=seed)

    def _draw(self, randomness: torch.Generator) -> Batch:
        texts = _windows(self.tokens, self.batch_size, self.lengths.text, randomness)
        cuts = [spans(self.lengths.text, self.density, self.mean, randomness) for _ in texts]
        return self.collate(
            [corrupt(text, cut, sentinel=self.sentinel, end=self.end) for text, cut in zip(texts, cuts, strict=True)]
        )


class Splits(Generated):
    """Random windows of one long text, each split at a random place: what comes before is read, the rest predicted.

    The objective of a prefix language model (Raffel et al. 2020, sec. 3.2.3). `length` tokens a window; no end token,
    for windows do not end where texts do.

    >>> from allyouneed.data.pairs import joined
    >>> next(Splits(torch.arange(50), batch_size=2, length=6, collate=joined, seed=0))["ids"].shape
    torch.Size([2, 6])
    """

    def __init__(self, tokens: Tensor, *, batch_size: int, length: int, collate: Collate, seed: int) -> None:
        if length < 2:
            raise InputError(f"length={length}: 2 or more are needed, one to read and one to predict")
        _long_enough(tokens, length)
        self.tokens, self.batch_size, self.length, self.collate = tokens, batch_size, length, collate
        super().__init__(self._draw, seed=seed)

    def _draw(self, randomness: torch.Generator) -> Batch:
        texts = _windows(self.tokens, self.batch_size, self.length, randomness)
        places = torch.randint(1, self.length, (self.batch_size,), generator=randomness).tolist()
        return self.collate([(text[:place], text[place:]) for text, place in zip(texts, places, strict=True)])


def _long_enough(tokens: Tensor, length: int) -> None:
    if len(tokens) < length:
        raise InputError(f"a text of {len(tokens)} tokens is too short for windows of {length}")


def _windows(tokens: Tensor, count: int, length: int, randomness: torch.Generator) -> list[list[int]]:
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=randomness)
    found: list[list[int]] = tokens[starts + torch.arange(length)].tolist()
    return found
