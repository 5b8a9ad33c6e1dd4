"""Tasks that real text sets by itself, whose right answers nobody had to write down: lines of documents as they stand,
and with something changed. Each is labelled as data files are (`data.jsonl`).

>>> lines = tuple(f"line {n} of a play of many words" for n in range(40))
>>> [record.label for record in in_order([lines], 4, seed=0)]
[1, 0, 1, 0]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import derive
from allyouneed.data.jsonl import Choices, Labelled, LabelledPair

Lines = Sequence[str]  # of one document, in order
Made = TypeVar("Made")


def lines(text: str, least: int = 20, most: int = 72) -> tuple[str, ...]:
    """The lines of `least` to `most` characters, without the space around them: shorter ones name speakers or are bare,
    longer ones are tables.
    """
    return tuple(line for line in map(str.strip, text.splitlines()) if least <= len(line) <= most)


def in_order(documents: Sequence[Lines], count: int, seed: int) -> list[Labelled]:
    """Is a line as it was written (1), or were its words shuffled (0)?"""

    def make(source: random.Random, right: bool) -> Labelled | None:
        line = _line(documents, source)[0]
        shuffled = _shuffled(line, source)
        return Labelled(line if right else shuffled, int(right)) if shuffled != line else None

    return _made(make, count, seed, "in order")


def follows(documents: Sequence[Lines], count: int, seed: int) -> list[LabelledPair]:
    """Does the second line follow the first (1), or is it another of the same document (0)?"""

    def make(source: random.Random, right: bool) -> LabelledPair | None:
        first, second, others = _line(documents, source, before=1)
        other = second if right else source.choice(others)
        return LabelledPair(first, other, int(right)) if right or other not in (first, second) else None

    return _made(make, count, seed, "follows")


def same_kind(kinds: Sequence[Sequence[Lines]], count: int, seed: int) -> list[LabelledPair]:
    """Are two lines from documents of the same kind (1) or of two (0)?"""
    if len(kinds) < 2:
        raise InputError(f"{len(kinds)} kinds of documents; to tell whether two lines are of the same takes two")

    def make(source: random.Random, right: bool) -> LabelledPair | None:
        one, other = source.sample(range(len(kinds)), 2)
        first, second = (_line(kinds[i], source)[0] for i in (one, one if right else other))
        return LabelledPair(first, second, int(right)) if first != second else None

    return _made(make, count, seed, "same kind")


def continuation(documents: Sequence[Lines], count: int, seed: int, options: int = 4) -> list[Choices]:
    """Which of `options` lines follows a line? The others are of the same document, and their words shuffled."""

    def make(source: random.Random, _: bool) -> Choices | None:
        context, right, others = _line(documents, source, before=1)
        choices = [right, *(_shuffled(line, source) for line in source.sample(others, options - 1))]
        if len(set(choices)) < options:
            return None
        source.shuffle(choices)
        return Choices(context, choices, choices.index(right))

    return _made(make, count, seed, "continuation")


def _shuffled(line: str, source: random.Random) -> str:
    words = line.split()
    source.shuffle(words)
    return " ".join(words)


def _made(make: Callable[[random.Random, bool], Made | None], count: int, seed: int, name: str) -> list[Made]:
    """`count` records, every other one right, none twice."""
    source = random.Random(derive(seed, "passages", name))
    found: dict[str, Made] = {}
    for _ in range(100 * count):
        if len(found) == count:
            return list(found.values())
        record = make(source, len(found) % 2 == 0)
        if record is not None:
            found.setdefault(repr(record), record)
    raise InputError(f"{name}: only {len(found)} different examples in these documents; {count} were asked for")


def _line(documents: Sequence[Lines], source: random.Random, before: int = 0) -> list[Any]:
    """A line with those `before` it, and last all lines of its document; long documents come oftener."""
    document = source.choices(documents, [max(len(one) - before, 0) for one in documents])[0]
    start = source.randrange(len(document) - before)
    return [*document[start : start + before + 1], document]
