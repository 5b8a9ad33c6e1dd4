"""Guessing the next tokens so that one pass of the model judges several: speculative decoding (Leviathan et al. 2023;
Chen et al. 2023).

A speculator only guesses; the engine keeps what the model would have said. Drafts that were found, not drawn, are kept
where the model, drawing as it would without them, says the same: tokens are those that come without speculation, also
of a request with a temperature and a seed. Drafts that were drawn come with their distribution, and are judged by it
(`sampling.judged`): tokens are distributed as without, and the same each time with a seed, in any batch.

Holds how many to guess and how they are found in the text itself; models that guess are in `generate.drafting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.generate.reading import Continues
from allyouneed.generate.sampling import Sampler
from allyouneed.generate.tables import BlockTable
from allyouneed.nn.paged import Storage


@dataclass(eq=False)
class Pace:
    """How many drafts one request tries at a time: twice as many after all were kept, none for a while after a failure,
    the longer the more of them in a row.

    It follows from what became of the request's own drafts alone, so that with a seed its tokens do not depend on what
    else runs.

    >>> pace = Pace(first=4, most=8, most_rest=16)
    >>> pace.hear(4, 4)
    >>> pace.count
    8
    """

    first: int
    most: int
    most_rest: int  # passes without drafts
    least: float = 0.0  # share of the drafts that must be kept; where fewer are, or none, that is a failure
    length: int = 0
    rest: int = 0  # passes to sit out
    failures: int = 0  # in a row

    def __post_init__(self) -> None:
        self.length = self.length or self.first

    @property
    def count(self) -> int:
        """How many to try in the next pass."""
        return 0 if self.rest else self.length

    def hear(self, tried: int, kept: int) -> None:
        """What became of the drafts of a pass, of which there may have been none."""
        self.rest = max(0, self.rest - 1)
        if not tried:
            return
        if kept == tried:
            self.length = min(max(self.length, 2 * tried), self.most)
        else:
            self.length = max(self.first, kept + 1)
        if kept and kept >= self.least * tried:
            self.failures = 0
        else:
            self.failures += 1
            self.rest = min(2**self.failures - 1, self.most_rest)


@dataclass(frozen=True, eq=False)
class Asked:
    """A request whose next tokens are to be guessed."""

    number: int
    tokens: Sequence[int]  # the prompt's, then those made
    count: int  # of drafts, at most
    sampler: Sampler
    table: BlockTable  # what the model holds of all tokens but the last, with room for the drafts


@dataclass(frozen=True, eq=False)
class Drafts:
    """Guessed tokens, and for those that were drawn the distribution of each, (V,)."""

    tokens: Sequence[int] = ()
    odds: Sequence[Tensor] = ()


class Speculator(Protocol):
    """Guesses the next tokens of requests that are being continued."""

    def bytes_per_block(self, size: int) -> int:
        """What it keeps itself for each block of `size` tokens that the model's storage has."""

    def attach(self, module: Continues, storage: Storage, chunk: int) -> None:
        """Guess for this model, reading at most `chunk` tokens of texts in a pass; called once, by its engine."""

    def pace(self) -> Pace:
        """Of a new request."""

    def propose(self, asked: Sequence[Asked]) -> Sequence[Drafts | None]:
        """Guesses for each, at most `count`, maybe none. None: it waits for them, sitting out this pass; the first of
        those that would wait never has to wait for another.
        """

    def forget(self, number: int) -> None:
        """A request is over."""


@dataclass
class _Found:
    """Where the runs of some tokens of one text ended last."""

    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    seen: int = 0  # tokens of the text that were gone through


class PromptLookup:
    """Guesses that what followed the last tokens where they stood before follows again (Saxena 2023; Yang et al. 2023):
    for texts that copy, summaries and edits of code. No more is guessed than tokens agree (Oliaro et al. 2024, sec. 4).

    >>> lookup = PromptLookup()
    >>> lookup.found(0, [1, 2, 3, 4, 5, 1, 2, 3], count=2)
    [4, 5]
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """How much must agree, and how much is guessed."""

        longest: int = 5  # tokens that are looked for first
        shortest: int = 3  # and last; fewer are too often followed by something else
        first: int = 2  # drafts in the first pass, and after some were not kept
        most: int = 8  # drafts in a pass
        most_rest: int = 16  # passes without a look, after a series of failures

        def __post_init__(self) -> None:
            """Refuse numbers that nothing is found with."""
            if not 1 <= self.shortest <= self.longest or not 1 <= self.first <= self.most:
                raise InputError(f"{self}: 1 <= shortest <= longest and 1 <= first <= most are needed")

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or PromptLookup.Config()
        self._texts: dict[int, _Found] = {}

    def bytes_per_block(self, size: int) -> int:
        """It keeps no keys and values."""
        return 0

    def attach(self, module: Continues, storage: Storage, chunk: int) -> None:
        """Nothing of the model is needed."""

    def pace(self) -> Pace:
        """Of a new request."""
        return Pace(self.config.first, self.config.most, self.config.most_rest)

    def propose(self, asked: Sequence[Asked]) -> list[Drafts]:
        """Guesses for each, where its last tokens stood before."""
        return [Drafts(self.found(one.number, one.tokens, one.count)) for one in asked]

    def found(self, number: int, tokens: Sequence[int], count: int) -> list[int]:
        """What followed the last tokens of text `number`, which only grows, where they stood last."""
        text, sizes = self._texts.setdefault(number, _Found()), range(self.config.shortest, self.config.longest + 1)
        for end in range(text.seen + 1, len(tokens)):
            for size in sizes[: max(0, end - self.config.shortest + 1)]:
                text.places[tuple(tokens[end - size : end])] = end
        text.seen = len(tokens) - 1
        for size in reversed(sizes):
            place = text.places.get(tuple(tokens[-size:]))
            if place is not None:
                alike = (i for i in range(size, count) if i >= place or tokens[place - i - 1] != tokens[-i - 1])
                return list(tokens[place : place + min(count, next(alike, count))])
        return []

    def forget(self, number: int) -> None:
        """A request is over."""
        self._texts.pop(number, None)


def agreement(p: Tensor, q: Tensor) -> float:
    """α, the probability that a draft drawn from q is kept: Σ min(p, q) (Leviathan et al. 2023, theorem 3.5)."""
    return p.minimum(q).sum().item()


def expected(alpha: float, drafts: int) -> float:
    """Tokens that come of a pass over so many drafts, each kept with probability α (Leviathan et al. 2023, eq. 1).

    >>> expected(0.5, 1), expected(1.0, 4)
    (1.5, 5.0)
    """
    return drafts + 1.0 if alpha == 1 else (1 - alpha ** (drafts + 1)) / (1 - alpha)
