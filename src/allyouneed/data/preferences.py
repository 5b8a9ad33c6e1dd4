"""Answers to one prompt in order of preference, as tokens: what preferences and rewards are learned from.

How a prompt and its answer become tokens and which of these are learned, `data.instructions` says. Shapes: B prompts, N
answers to each, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from allyouneed.core.errors import InputError, about
from allyouneed.data import instructions, jsonl
from allyouneed.data.packing import IGNORED, Batch, Piece, pad_right
from allyouneed.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Ranked:
    """A prompt with each of its answers, the answer marked as what is to be predicted; the `ranks` of these, 0 for the
    best; and the `margin` by which rewards should differ at least (Llama 2, eq. 2).
    """

    pieces: tuple[Piece, ...]
    ranks: tuple[int, ...]
    margin: float = 0.0

    @property
    def longest(self) -> int:
        """Tokens of the longest answer with its prompt."""
        return max(len(piece.ids) for piece in self.pieces)


def pair(tokenizer: Tokenizer, record: jsonl.Preference | jsonl.Graded) -> Ranked:
    """The preferred answer and the other, whose prompt they may repeat as messages of their own.

    Raises:
        InputError: an answer without text, two that are the same, or what `instructions.piece` refuses.

    >>> from allyouneed.data.tokenizers import byte_tokenizer
    >>> made = pair(byte_tokenizer(), jsonl.Preference("2+2=", "4", "5"))
    >>> [piece.ids[-2:] for piece in made.pieces], made.ranks
    ([[52, 256], [53, 256]], (0, 1))
    """
    pieces = []
    for name, given in (("chosen", record.chosen), ("rejected", record.rejected)):
        with about(name):
            answer = _after(record.prompt, given)
        if not _said(answer).strip():
            raise InputError(f"{name} is empty; an answer is needed")
        with about(name):
            pieces.append(instructions.piece(tokenizer, jsonl.Completion(record.prompt, answer)))
    if pieces[0] == pieces[1]:
        raise InputError("chosen and rejected are the same answer; two that differ are needed")
    return Ranked(tuple(pieces), (0, 1), record.margin if isinstance(record, jsonl.Graded) else 0.0)


def within(made: Ranked, most: int) -> Ranked:
    """The same, if it fits: an answer that is cut would be learned as if it ended there.

    Raises:
        InputError: names the answer of more than `most` tokens.
    """
    for name, piece in zip(("chosen", "rejected"), made.pieces, strict=True):
        if len(piece.ids) > most:
            raise InputError(
                f"{name} with its prompt has {len(piece.ids)} tokens; at most {most} fit (--length, or a shorter text)"
            )
    return made


def collate(examples: Sequence[Ranked]) -> Batch:
    """`ids`, `targets`, `segments` (B, N, T), `ranks` (B, N) and `margin` (B,); what is lacking is padded, answers with
    the rank `IGNORED`.

    >>> from allyouneed.data.packing import answer
    >>> rows = collate([Ranked((answer([5], [6, 7]), answer([5], [8])), (0, 1))])
    >>> rows["ids"].tolist(), rows["targets"].tolist(), rows["ranks"].tolist()
    ([[[5, 6, 7], [5, 8, 0]]], [[[6, 7, -100], [8, -100, -100]]], [[0, 1]])
    """
    most = max(len(example.pieces) for example in examples)
    lacking = [most - len(example.pieces) for example in examples]
    pieces = [p for e, n in zip(examples, lacking, strict=True) for p in (*e.pieces, *[Piece([], [])] * n)]
    rows = {name: x.unflatten(0, (len(examples), most)) for name, x in pad_right(pieces).items()}
    ranks = [[*example.ranks, *[IGNORED] * n] for example, n in zip(examples, lacking, strict=True)]
    return rows | {"ranks": torch.tensor(ranks), "margin": torch.tensor([example.margin for example in examples])}


def _after(prompt: jsonl.Turns, answer: jsonl.Turns) -> jsonl.Turns:
    """The answer's own messages, where it is a whole conversation that begins with the prompt.

    Raises:
        InputError: it begins with somebody else's words, and not with the prompt, which would stand there twice.
    """
    if isinstance(answer, str):
        return answer
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if len(answer) > len(turns) and answer[: len(turns)] == turns:
        answer = answer[len(turns) :]
    if _said(answer) and answer[0]["role"] in ("system", "user"):
        role = answer[0]["role"]
        raise InputError(f"begins with a {role}'s message but not with the prompt; give the answer alone")
    return answer


def _said(answer: jsonl.Turns) -> str:
    if isinstance(answer, str):
        return answer
    return "".join(message["content"] for message in answer if message["role"] == "assistant")
