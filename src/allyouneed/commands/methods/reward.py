"""A reward model: one number for an answer, learned from which of two is preferred."""

from __future__ import annotations

from typing import Any

from allyouneed.commands.methods.base import Job, Method, Task, adapted, longest, means, most, over, parted
from allyouneed.commands.methods.preference import shown
from allyouneed.core.errors import InputError
from allyouneed.data import jsonl, preferences
from allyouneed.data.preferences import Ranked
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.models.decoder import Decoder
from allyouneed.models.heads import Classifier
from allyouneed.objectives import reward as objectives


def prepare(module: Any, tokenizer: Tokenizer, task: Task) -> Job:
    """A layer of one output on what the model makes of an answer's last token, and pairs for it."""
    if not isinstance(module, Decoder):
        raise InputError("--method reward: a decoder is wanted, which reads a prompt and its answer as one text")
    limit, field = most(task.length, module.config.context), task.options.get("margin_field")

    def example(record: jsonl.Record) -> Ranked:
        assert isinstance(record, jsonl.Preference | jsonl.Graded)
        return preferences.within(preferences.pair(tokenizer, record), limit)

    kind, named = (jsonl.Preference, None) if field is None else (jsonl.Graded, {field: "margin"})
    learned, judged = parted(task, (kind,), example, named)
    tokenizer = tokenizer.padded(piece.ids[-1] for one in (*learned, *judged) for piece in one.pieces)
    module.grow(tokenizer.vocab_size)
    objective, lengths = objectives.reward(), [one.longest for one in learned]
    head = adapted(model(module, tokenizer.pad_id), task)
    return Job(
        module=head,
        tokenizer=tokenizer,
        objective=objective,
        train=learned,
        valid=judged,
        batches=over(learned, preferences.collate),
        lengths=lengths,
        probe=lambda: preferences.collate([learned[longest(lengths)]]),
        judge=lambda held: means(head, objective, held, preferences.collate),
        told=shown(tokenizer, learned[0]),
    )


def model(module: Decoder, pad_id: int | None) -> Classifier:
    """A reward model that begins as `module`, as transformers' …ForSequenceClassification with one label has it."""
    config = Classifier.Config(model=module.config, labels=("reward",), bias=False, dropout=0.0, pad_id=pad_id)
    return Classifier(config, module)


METHODS = {"reward": Method(prepare, frozenset({"margin_field"}))}
