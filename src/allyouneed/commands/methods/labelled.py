"""Labels: classes, pairs, choices, spans or tags, told by a new layer on the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from allyouneed.commands.methods.base import Job, Method, Task, adapted, longest, most, over, parted
from allyouneed.core.errors import InputError, brief
from allyouneed.data import jsonl, labelled
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.evaluate import labels as judging
from allyouneed.models import heads
from allyouneed.models.bert import encoder_from
from allyouneed.models.decoder import Decoder
from allyouneed.models.encoder import Encoder, MaskedModel
from allyouneed.objectives import labels as objectives

FRAME = ("<|start|>", "<|delimiter|>", "<|extract|>")  # what a decoder reads around and between texts
HEADS: dict[str, type[heads.Head]] = {"choices": heads.Chooser, "spans": heads.SpanReader, "tokens": heads.Tagger}


def prepare(module: Any, tokenizer: Tokenizer, task: Task) -> Job:
    """A head on the model, and examples for it."""
    auxiliary = _auxiliary(module, task)
    module, tokenizer = _ready(module, tokenizer, task.method)
    how, limit = labelled.METHODS[task.method], most(task.length, module.config.context)
    known = _labels(task, how)

    def example(record: jsonl.Record) -> Any:
        return labelled.within(how.make(tokenizer, known, record), limit)

    learned, judged = parted(task, [how.kind], example)
    head = _head(module, tokenizer, task.method, known)
    lengths = [labelled.example_of(one).longest for one in learned]

    def collate(chosen: Sequence[Any]) -> dict[str, Tensor]:
        return labelled.collate([labelled.example_of(one) for one in chosen])

    adapted(head, task)

    def judge(examples: Sequence[Any]) -> Mapping[str, float]:
        return (judging.spans if task.method == "spans" else judging.classes)(head, examples)

    return Job(
        module=head,
        tokenizer=tokenizer,
        objective=objectives.labels(auxiliary),
        train=learned,
        valid=judged,
        batches=over(learned, collate),
        lengths=lengths,
        probe=lambda: collate([learned[longest(lengths)]]),
        judge=judge,
        told=_counted(task, known, learned),
        identity=known.names,
    )


def _auxiliary(module: Any, task: Task) -> float:
    """λ of the language model's own loss."""
    auxiliary: float = task.options.get("auxiliary", 0.0)
    if not 0 <= auxiliary < math.inf:
        raise InputError(f"--auxiliary {auxiliary}; a number from 0 is needed")
    if auxiliary and not isinstance(module, Decoder):
        raise InputError("--auxiliary: only a decoder has a language model's loss; leave it out")
    return auxiliary


def _ready(module: Any, tokenizer: Tokenizer, method: str) -> tuple[Any, Tokenizer]:
    """The model without the head it was trained with, and with what frames texts for the new one."""
    if not isinstance(module, Decoder | Encoder):
        raise InputError(f"--method {method}: a decoder or an encoder is wanted; this model reads and writes, use sft")
    if isinstance(module, Decoder):
        tokenizer = tokenizer.framed(*FRAME)
        module.grow(tokenizer.vocab_size)
        return module, tokenizer
    if isinstance(module, MaskedModel):
        module = encoder_from(module)
    module.repool(method not in ("spans", "tokens"))  # transformers' classes pool just where the whole text is told of
    return module, tokenizer


def _labels(task: Task, how: labelled.Method) -> labelled.Labels:
    """The names in the file."""
    named: set[str] = set()
    ignored: list[str] | None = None if task.bad is None else []  # the next reading tells of them
    jsonl.made(task.data, [how.kind], lambda record: named.update(map(str, how.named(record))), bad=ignored)
    known = labelled.Labels(sorted(named))
    if known.names and len(known.names) < 2:
        raise InputError(f"{task.data}: the only label is {known.names[0]!r}; two at least are needed to learn from")
    return known


def _counted(task: Task, known: labelled.Labels, learned: Sequence[Any]) -> dict[str, str]:
    """How often each label is learned, as it is told; refuses one that never is."""
    if not known.names:
        return {}
    counted = Counter(known.names[i] for one in learned for i in labelled.example_of(one).labels if i >= 0)
    lacking = [name for name in known.names if name not in counted]
    if lacking:
        raise InputError(f"{task.data}: no line to learn the label {brief(lacking[0])} from; give it more lines")
    listed = [f"{label} {counted[label]}" for label in known.names[:12]]
    return {"labels": ", ".join(listed) + (f" and {len(known.names) - 12} more" if len(known.names) > 12 else "")}


def _head(module: Any, tokenizer: Tokenizer, method: str, known: labelled.Labels) -> heads.Head:
    kind = HEADS.get(method, heads.Classifier)
    scores = isinstance(module, Decoder) and kind is heads.Classifier  # transformers' layer has no bias there
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else next(iter(tokenizer.eos_ids), None)
    return kind(kind.Config(model=module.config, labels=known.names, bias=not scores, pad_id=pad), module)


METHODS = {name: Method(prepare, frozenset({"auxiliary"})) for name in labelled.METHODS}
