"""Supervised fine-tuning: the model itself on texts, answers and the assistant's part of conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from allyouneed.commands.methods.base import (
    Job,
    Method,
    Task,
    adapted,
    joined,
    longest,
    means,
    most,
    over,
    parted,
    rows,
)
from allyouneed.core.errors import InputError
from allyouneed.data import instructions, jsonl
from allyouneed.data.packing import pad_right
from allyouneed.data.pairs import apart
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.models.decoder import Decoder
from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.objectives.next_token import next_token
from allyouneed.objectives.span import target_given_source

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


def prepare(module: Any, tokenizer: Tokenizer, task: Task) -> Job:
    """The model itself, and answers for it to give."""
    if isinstance(module, EncoderDecoder):
        return _between_stacks(module, tokenizer, task)
    if not isinstance(module, Decoder):
        raise InputError(
            "--method sft: this model only reads; use classify, pairs, similarity, choices, spans, tokens or reward"
        )
    limit = most(task.length, module.config.context)

    def example(record: jsonl.Record) -> Any:
        made = instructions.piece(tokenizer, record)
        _check(len(made.ids), limit)
        return made

    learned, judged = parted(task, instructions.KINDS, example)
    lengths = [len(one.ids) for one in learned]
    packed = rows(learned, max(lengths))
    return Job(
        module=adapted(module, task),
        tokenizer=tokenizer,
        objective=next_token,
        train=packed,
        valid=judged,
        batches=over(packed, joined),
        lengths=lengths,
        probe=lambda: packed[0],
        judge=_judge(module, next_token, pad_right),
        before=True,
        told={"example": instructions.shown(tokenizer, learned[0])},
    )


def _between_stacks(module: EncoderDecoder, tokenizer: Tokenizer, task: Task) -> Job:
    """A model that reads one text and writes the other."""
    limit = most(task.length, module.config.decoder.context)

    def size(pair: Any) -> int:
        return max(map(len, pair))

    def example(record: jsonl.Record) -> Any:
        made = instructions.pair(tokenizer, record)
        _check(size(made), limit)
        return made

    def collate(chosen: Sequence[Any]) -> dict[str, Tensor]:
        return apart(chosen, start=tokenizer.pad_id or 0)

    learned, judged = parted(task, (jsonl.Completion,), example)
    lengths = [size(one) for one in learned]
    return Job(
        module=adapted(module, task),
        tokenizer=tokenizer,
        objective=target_given_source,
        train=learned,
        valid=judged,
        batches=over(learned, collate),
        lengths=lengths,
        probe=lambda: collate([learned[longest(lengths)]]),
        judge=_judge(module, target_given_source, collate),
        before=True,
    )


def _check(size: int, limit: int) -> None:
    if size > limit:
        raise InputError(f"{size} tokens; at most {limit} fit (--length, or a shorter text)")


def _judge(module: Any, objective: Any, collate: Collate) -> Callable[[Sequence[Any]], Mapping[str, float]]:
    return lambda held: {"nats_per_token": means(module, objective, held, collate)["loss"]}


METHODS = {"sft": Method(prepare)}
