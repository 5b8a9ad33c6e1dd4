"""Preferences: the model itself on pairs of answers, held to what it was by a reference (DPO, IPO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from allyouneed.align import references
from allyouneed.commands.methods import base
from allyouneed.commands.methods.base import Job, Method, Task, adapted, longest, means, most, over, parted
from allyouneed.core.errors import InputError
from allyouneed.data import jsonl, preferences
from allyouneed.data.preferences import Ranked
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.models.decoder import Decoder
from allyouneed.objectives import preference as objectives
from allyouneed.train.ranks import join

CHECKED = 16  # examples by which policy and reference are compared before the first step


def prepare(module: Any, tokenizer: Tokenizer, task: Task) -> Job:
    """The model itself, pairs for it, and what its reference holds of these."""
    if not isinstance(module, Decoder):
        raise InputError(f"--method {task.method}: a decoder is wanted; of this model the likelihood is not asked")
    beta = task.options.get("beta", 0.1)
    objective = _objective(task, beta)
    limit = most(task.length, module.config.context)

    def example(record: jsonl.Record) -> Ranked:
        assert isinstance(record, jsonl.Preference)
        return preferences.within(preferences.pair(tokenizer, record), limit)

    learned, judged = parted(task, (jsonl.Preference,), example)
    lengths = [one.longest for one in learned]
    pairs = _Pairs(adapted(module, task), learned, judged, task, objective)
    return Job(
        module=module,
        tokenizer=tokenizer,
        objective=objective,
        train=learned,
        valid=judged,
        batches=over(range(len(learned)), pairs.batch),
        lengths=lengths,
        probe=lambda: pairs.batch([longest(lengths)]),
        judge=pairs.judge,
        begin=pairs.begin,
        told=shown(tokenizer, learned[0]),
        reference=pairs.reference,
    )


def shown(tokenizer: Tokenizer, example: Ranked) -> dict[str, str]:
    """One example as it is said before training."""
    names = ("chosen", "rejected")
    return {name: base.example(tokenizer, piece) for name, piece in zip(names, example.pieces, strict=True)}


class _Pairs:
    """All pairs, those to learn from before those to judge by, and the reference's numbers of them."""

    def __init__(self, module: Any, learned: list[Ranked], judged: list[Ranked], task: Task, objective: Any) -> None:
        self.module, self.objective, self.count = module, objective, len(learned)
        self.examples = [*learned, *judged]
        self.reference = references.of(module)
        self.file = task.out / "reference.npy" if join().rank == 0 else None
        self.fresh = task.fresh
        self.known: Tensor | None = None

    def begin(self) -> Mapping[str, float]:
        """Read the reference, once, and find that training begins there."""
        if self.fresh and self.file is not None:
            self.file.unlink(missing_ok=True)
        self.known = references.logprobs(self.reference, self.examples, file=self.file, quiet=join().rank > 0)
        checked = self.examples[:CHECKED]
        return {"drift_before": references.drift(self.module, checked, self.known[:CHECKED])}

    def batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Some of them, with the reference's numbers."""
        assert self.known is not None, "the reference is read before"
        made = preferences.collate([self.examples[i] for i in chosen])
        return made | {"reference": self.known[list(chosen)]}

    def judge(self, held: Sequence[Ranked]) -> Mapping[str, float]:
        """Mean loss and metrics of the pairs to judge by, and how far the policy went from its reference."""
        found = means(self.module, self.objective, range(self.count, len(self.examples)), self.batch)
        return found | {"kl_per_token": references.divergence(self.module, self.reference, held)}


def _objective(task: Task, beta: float) -> Any:
    if task.method == "ipo":
        return objectives.preference(objectives.ipo(beta), beta, per_token=True)
    return objectives.preference(objectives.dpo(beta, task.options.get("label_smoothing", 0.0)), beta)


RATE = 1e-6  # Rafailov et al. 2023, app. B
METHODS = {
    "dpo": Method(prepare, frozenset({"beta", "label_smoothing"}), RATE, exact=True),
    "ipo": Method(prepare, frozenset({"beta"}), RATE, exact=True),
}
