"""Labelled texts as batches for the heads of `models.heads`: classes, pairs, choices, spans, tags.

What stands around a text and between two – [CLS] and [SEP], or the start, delimiter and extract tokens of Radford et
al. (2018, sec. 3.3) – is the tokenizer's rule (`Tokenizer.framed`). Shapes: B rows, N readings, T tokens, L answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from allyouneed.core.errors import InputError, brief, unknown
from allyouneed.data import jsonl
from allyouneed.data.packing import IGNORED, Batch
from allyouneed.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Example:
    """One row: the `ids` of each of its readings and the `types` of these, and its `labels`: the class, the number of
    the right reading, the first and last token of a span, or one for each token, `IGNORED` where there is none.
    """

    ids: tuple[list[int], ...]
    types: tuple[list[int], ...]
    labels: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of its longest reading."""
        return max(map(len, self.ids))


@dataclass(frozen=True)
class Span:
    """The example of a question, and by what its answer is judged."""

    example: Example
    context: str
    places: tuple[tuple[int, int] | None, ...]  # for each token, the characters of the context it stands for
    answers: tuple[str, ...]


def collate(examples: Sequence[Example]) -> Batch:
    """`ids`, `segments` and `types` (B, N, T), `labels` (B, L); padded with 0, labels with `IGNORED`.

    >>> rows = [Example(([5, 6],), ([0, 0],), (1,)), Example(([7], [8, 9, 9]), ([0], [0, 0, 0]), (0,))]
    >>> batch = collate(rows)
    >>> batch["ids"].tolist(), batch["segments"].sum().item()
    ([[[5, 6, 0], [0, 0, 0]], [[7, 0, 0], [8, 9, 9]]], 6)
    """
    shape = (len(examples), max(len(e.ids) for e in examples), max(e.longest for e in examples))
    ids, types, segments = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    labels = torch.full((len(examples), max(len(e.labels) for e in examples)), IGNORED)
    for row, example in enumerate(examples):
        for n, (read, kinds) in enumerate(zip(example.ids, example.types, strict=True)):
            ids[row, n, : len(read)] = torch.tensor(read)
            types[row, n, : len(read)] = torch.tensor(kinds)
            segments[row, n, : len(read)] = 1
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return {"ids": ids, "segments": segments, "types": types, "labels": labels}


def of_text(tokenizer: Tokenizer, text: str, label: int) -> Example:
    """A text and its class."""
    ids = tokenizer.encode(text, add_special_tokens=True)
    return Example((ids,), ([0] * len(ids),), (label,))


def of_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], label: int) -> Example:
    """Readings of two texts each: one of a premise and a hypothesis, two of a pair without order, or one for each
    choice after the same context.
    """
    found = tokenizer.encode_pairs(pairs)
    return Example(tuple(ids for ids, _ in found), tuple(types for _, types in found), (label,))


def both_ways(first: str, second: str) -> list[tuple[str, str]]:
    """A pair without order, to be read in both (Radford et al. 2018, sec. 3.3)."""
    return [(first, second), (second, first)]


def of_tags(tokenizer: Tokenizer, words: Sequence[str], tags: Sequence[int]) -> Example:
    """Words with a tag each; the first token of a word has its tag, the others none (Devlin et al. 2019, sec. 5.3).

    Raises:
        InputError: not one tag for each word, or a word without a token.
    """
    if len(words) != len(tags):
        raise InputError(f"{len(words)} tokens and {len(tags)} tags; as many of one as of the other are needed")
    ids, words_of = tokenizer.encode_words(words)
    labels, before = [], None
    for i in words_of:
        labels.append(IGNORED if i is None or i == before else tags[i])
        before = i
    lost = sorted(set(range(len(words))) - set(words_of))
    if lost:
        raise InputError(f"tokens[{lost[0]}] is {brief(words[lost[0]])}, of which the vocabulary makes no token")
    return Example((ids,), ([0] * len(ids),), tuple(labels))


def of_span(tokenizer: Tokenizer, question: str, context: str, answers: Sequence[tuple[str, int]]) -> Span:
    """A question and the passages of a text that answer it, as text and place in characters; the first is learned.

    Raises:
        InputError: an answer is not what stands at its place, or no token stands for the first.
    """
    for text, start in answers:
        if not text or start < 0 or context[start : start + len(text)] != text:
            there = brief(context[max(start, 0) : max(start, 0) + len(text)])
            found = f"where {there} is" if start < len(context) else f"beyond the {len(context)} of the context"
            raise InputError(f"answers: {brief(text)} at character {start}, {found}; the span must lie in the context")
    ids, types, spots = tokenizer.locate(question, context)
    places = tuple(None if place is None else _without_spaces(context, place) for place in spots)
    (text, start), *_ = answers
    inside = [i for i, place in enumerate(places) if place and place[0] < start + len(text) and place[1] > start]
    if not inside:
        raise InputError(f"answers: of {brief(text)} the vocabulary makes no token")
    example = Example((ids,), (types,), (inside[0], inside[-1]))
    return Span(example, context, places, tuple(text for text, _ in answers))


def _without_spaces(text: str, place: tuple[int, int]) -> tuple[int, int]:
    """The characters of a token that are no spaces before a word."""
    start, end = place
    while start < end and text[start].isspace():
        start += 1
    return start, end


class Labels:
    """Names of classes and their numbers, in the order of their spelling."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.numbers = {name: i for i, name in enumerate(self.names)}

    def number(self, name: str | int) -> int:
        """Of one.

        Raises:
            InputError: a label that was not among those trained on.
        """
        if str(name) not in self.numbers:
            raise unknown("label", str(name), self.names)
        return self.numbers[str(name)]


Maker = Callable[[Tokenizer, Labels, Any], Any]
Made = TypeVar("Made", Example, Span)


def _classify(tokenizer: Tokenizer, labels: Labels, record: jsonl.Labelled) -> Example:
    _filled(text=record.text)
    return of_text(tokenizer, record.text, labels.number(record.label))


def _pairs(tokenizer: Tokenizer, labels: Labels, record: jsonl.LabelledPair) -> Example:
    _filled(text=record.text, text_pair=record.text_pair)
    return of_pairs(tokenizer, [(record.text, record.text_pair)], labels.number(record.label))


def _similarity(tokenizer: Tokenizer, labels: Labels, record: jsonl.LabelledPair) -> Example:
    _filled(text=record.text, text_pair=record.text_pair)
    return of_pairs(tokenizer, both_ways(record.text, record.text_pair), labels.number(record.label))


def _choices(tokenizer: Tokenizer, labels: Labels, record: jsonl.Choices) -> Example:
    _filled(context=record.context, **{f"choices[{i}]": choice for i, choice in enumerate(record.choices)})
    if len(record.choices) < 2:
        raise InputError("choices: only one; two at least are needed to choose between")
    if not isinstance(record.label, int) or not 0 <= record.label < len(record.choices):
        raise InputError(f"label is {brief(record.label)}; a number from 0 to {len(record.choices) - 1} is needed")
    return of_pairs(tokenizer, [(record.context, choice) for choice in record.choices], record.label)


def _tokens(tokenizer: Tokenizer, labels: Labels, record: jsonl.Tagged) -> Example:
    _filled(**{f"tokens[{i}]": token for i, token in enumerate(record.tokens)})
    return of_tags(tokenizer, record.tokens, [labels.number(tag) for tag in record.tags])


def _spans(tokenizer: Tokenizer, labels: Labels, record: jsonl.Spans) -> Span:
    _filled(context=record.context, question=record.question)
    answers = list(zip(record.answers["text"], record.answers["answer_start"], strict=True))
    return of_span(tokenizer, record.question, record.context, answers)


def _filled(**texts: str) -> None:
    for name, text in texts.items():
        if not text.strip():
            raise InputError(f"{name} is empty; a text is needed")


@dataclass(frozen=True)
class Method:
    """What one kind of labelled data looks like in a file, and what becomes of a line of it."""

    kind: jsonl.Kind
    make: Maker
    named: Callable[[Any], Sequence[str | int]] = lambda record: ()  # the labels in a record that have names


METHODS: Mapping[str, Method] = {
    "classify": Method(jsonl.Labelled, _classify, lambda record: [record.label]),
    "pairs": Method(jsonl.LabelledPair, _pairs, lambda record: [record.label]),
    "similarity": Method(jsonl.LabelledPair, _similarity, lambda record: [record.label]),
    "choices": Method(jsonl.Choices, _choices),
    "spans": Method(jsonl.Spans, _spans),
    "tokens": Method(jsonl.Tagged, _tokens, lambda record: record.tags),
}


def example_of(made: Example | Span) -> Example:
    """The example, whatever is kept beside it."""
    return made.example if isinstance(made, Span) else made


def within(made: Made, most: int) -> Made:
    """The same, if it fits.

    Raises:
        InputError: a reading of more than `most` tokens.
    """
    longest = example_of(made).longest
    if longest > most:
        raise InputError(f"{longest} tokens, special ones included; at most {most} fit (--length, or a shorter text)")
    return made
