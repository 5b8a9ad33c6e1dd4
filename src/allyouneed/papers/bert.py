"""BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (Devlin et al., 2019).

arXiv:1810.04805.

Claim   A model that has learned to fill blanks, seeing both sides of them, understands sentences better after
        fine-tuning on a few labels than one of the same size that has read as much from left to right; and telling,
        besides, whether one sentence follows the other makes it better still where two sentences are compared
        (sec. 5.1, table 5).
Here    A small country in which every noun is of one of four kinds and only its verbs tell of which, in documents about
        nouns of one kind. Three arms read the same rows with the same parameters: masked tokens and following
        sentences; masked tokens alone; the next token alone, later tokens hidden. Each is then fine-tuned on the same
        labels: is a noun of the first two kinds; does a verb fit a noun (a pair of sentences); are the nouns of two
        sentences of one kind (a pair); and of which kind are two nouns that nobody has ever read, which only the verb
        between them tells (a label for each). Labels are given for one half of the nouns, or of the verbs, and what
        is judged is about the other. The bidirectional arms are judged by the vector of [CLS], the other by that of
        its last token, the only one that has seen the sentence. A fourth arm is fine-tuned without having read.
Apart   0.1 million parameters and two million tokens, instead of 110 million and 137 billion; a made-up country instead
        of books and Wikipedia, so that the sentences are short and their truth is known; one rate for all arms and no
        choice among several. The left-to-right arm learns from every token, the others from 15 %: at equal tokens
        read it has had seven times the targets, as in the paper, whose models read far more. The country replaced one
        whose pairs no arm learned to tell; its length of training is what fits in ten minutes. Of the
        strange nouns that are judged one in a hundred was also among those labelled. The first of two
        strange nouns cannot be told from left to right at all, which is the paper's own argument for looking both
        ways where tokens are labelled (sec. 5.1); the table shows the tasks one by one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allyouneed import core
from allyouneed.core.seeds import seed_everything
from allyouneed.data import labelled
from allyouneed.data.batches import Epochs
from allyouneed.data.jsonl import Tagged
from allyouneed.data.kinds import NOTHING, Kinds
from allyouneed.data.labelled import Example
from allyouneed.data.masked import MaskedPairs, Masking
from allyouneed.data.packing import IGNORED
from allyouneed.data.tokenizer_training import train_wordpiece
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.evaluate.labels import classes
from allyouneed.models import bert
from allyouneed.models.encoder import MaskedModel
from allyouneed.models.heads import Classifier, Head, Tagger
from allyouneed.nn.initialise import Normal
from allyouneed.objectives.labels import labels
from allyouneed.objectives.loss import Loss
from allyouneed.objectives.masked import masked, masked_and_pairs
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine

BOTH, NO_NSP, LEFT_TO_RIGHT, SCRATCH = "BERT", "no NSP", "left to right, no NSP", "no pre-training"
ARMS = (BOTH, NO_NSP, LEFT_TO_RIGHT, SCRATCH)
PAIRS = ("fitting verb", "same kind")
TASKS = ("which half", *PAIRS, "strange nouns")


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The model, what it reads and is taught, and the margins of the verdict, in accuracy."""

    model: MaskedModel.Config
    training: Training
    tuning: Training
    world: Kinds.Config
    characters: int = 1_500_000
    rows: int = 32
    length: int = 48
    batch: int = 16
    labels: int = 240  # examples to learn from, per task
    judged: int = 300
    bidirectional: float = 0.02  # mean of tasks: no NSP minus left to right
    pairs: float = 0.02  # mean of tasks of pairs: BERT minus no NSP
    pretrained: float = 0.05  # mean of tasks: BERT minus no pre-training


class LeftToRight(MaskedModel):
    """The same parameters, every token seeing only those before it."""

    causal = True

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        """As of the masked model."""


def run(config: Config, report: Report) -> None:
    """Pre-train and fine-tune every arm, and hold the differences against the margins."""
    found = report.repeat({arm: arm for arm in ARMS}, lambda arm, seed, folder: _accuracies(config, arm, seed, folder))
    read = config.training.steps * config.rows * config.length
    for arm in ARMS:
        report.arm(arm, parameters=found[arm][0]["parameters"], tokens=0 if arm == SCRATCH else read)

    def means(arm: str, tasks: Sequence[str] = TASKS) -> list[float]:
        return [statistics.fmean(one[task] for task in tasks) for one in found[arm]]

    report.check(
        "mean accuracy, bidirectional minus left to right, both without NSP",
        values=_differences(means(NO_NSP), means(LEFT_TO_RIGHT)),
        above=config.bidirectional,
    )
    report.check(
        "mean accuracy on pairs of sentences, with NSP minus without",
        values=_differences(means(BOTH, PAIRS), means(NO_NSP, PAIRS)),
        above=config.pairs,
    )
    report.check(
        "mean accuracy, BERT minus no pre-training",
        values=_differences(means(BOTH), means(SCRATCH)),
        above=config.pretrained,
    )
    table = {task: {arm: statistics.fmean(one[task] for one in found[arm]) for arm in ARMS} for task in TASKS}
    report.table(
        "accuracy after fine-tuning (chance 0.5; strange nouns 0.25)",
        [{"task": task} | {arm: round(value, 3) for arm, value in row.items()} for task, row in table.items()],
    )
    for arm in ARMS:
        values = [[one[task] for task in TASKS] for one in found[arm]]
        report.curve(arm, range(len(TASKS)), values, x_label=f"task ({', '.join(TASKS)})", y_label="accuracy")
    figure, axes = figures.new(11, 3.2, columns=len(TASKS))
    for place, (task, axis) in enumerate(zip(TASKS, axes, strict=True)):
        each = [[one[task] for one in found[arm]] for arm in ARMS]
        colors = [*figures.PALETTE[: len(ARMS) - 1], figures.CONTROL]
        spans = [(min(values), max(values)) for values in each]
        labels = ARMS if place == 0 else [""] * len(ARMS)
        figures.bars(axis, labels, [statistics.fmean(values) for values in each], spans, colors, form="{:.2f}")
        figures.mark(axis, "", x=0.25 if task == "strange nouns" else 0.5)
        figures.describe(axis, title=task, x="accuracy")
    report.figure(figure, "Accuracy after fine-tuning, by task; lines: lowest to highest seed; dashed: chance.")


def _accuracies(config: Config, arm: str, seed: int, folder: Path) -> dict[str, float]:
    """One arm's accuracy on every task."""
    world = config.world.replace(seed=seed).build()
    texts = world.documents(config.characters, seed)
    tokenizer = train_wordpiece((sentence for text in texts for sentence in text), config.model.vocab_size)
    seed_everything(seed)
    sizes = config.model.replace(vocab_size=tokenizer.vocab_size)
    sizes = _left_to_right(sizes) if arm == LEFT_TO_RIGHT else sizes
    module = sizes.build()
    if arm != SCRATCH:
        masking = Masking(share=1.0, hidden=0.0, exchanged=0.0) if arm == LEFT_TO_RIGHT else Masking()
        documents = [tokenizer.encode_batch(text) for text in texts]
        batches = MaskedPairs(
            documents, tokenizer, batch_size=config.rows, length=config.length, seed=seed, masking=masking
        )
        objective: Any = {BOTH: masked_and_pairs, NO_NSP: masked, LEFT_TO_RIGHT: _next_token}[arm]
        train(module, objective, batches, config.training.replace(seed=seed), folder=folder, title="  read")
    known = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found: dict[str, float] = {"parameters": sizes.num_parameters()}
    for task, (learned, judged) in _examples(config, world, tokenizer, seed).items():
        module.load_state_dict(known)
        seed_everything(seed)
        kind: type[Head] = Tagger if task == "strange nouns" else Classifier
        head = kind(kind.Config(model=sizes, labels=tuple(map(str, range(config.world.kinds)))), module)
        rows = Epochs(learned, batch_size=config.batch, collate=labelled.collate, seed=seed)
        train(head, labels(), rows, config.tuning.replace(seed=seed), quiet=True)
        found[task] = classes(head, judged)["accuracy"]
    return found


def _left_to_right(config: MaskedModel.Config) -> LeftToRight.Config:
    return LeftToRight.Config(**{name: getattr(config, name) for name in config.to_json() if name != core.config.TAG})


def _next_token(module: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Each token told from the vector of the one before it."""
    following = torch.nn.functional.pad(batch["targets"][:, 1:], (0, 1), value=IGNORED)
    return masked(module, {**batch, "targets": following})


def _examples(
    config: Config, world: Kinds, tokenizer: Tokenizer, seed: int
) -> dict[str, tuple[list[Example], list[Example]]]:
    """What each task is learned from and what is judged."""
    halves = (world.labelled, config.labels), (world.judged, config.judged)
    single = [world.first_half(nouns, count, seed) for nouns, count in halves]
    pairs = {
        "fitting verb": [world.fitting(nouns, count, seed) for nouns, count in halves],
        "same kind": [world.alike(nouns, count, seed) for nouns, count in halves],
    }
    tagged = [world.strangers(True, config.labels, seed), world.strangers(False, config.judged, seed)]

    def both(made: list[list[Example]]) -> tuple[list[Example], list[Example]]:
        return made[0], made[1]

    return {
        "which half": both([[labelled.of_text(tokenizer, r.text, int(r.label)) for r in half] for half in single]),
        **{
            task: both(
                [[labelled.of_pairs(tokenizer, [(r.text, r.text_pair)], int(r.label)) for r in half] for half in found]
            )
            for task, found in pairs.items()
        },
        "strange nouns": both([[_tagged(tokenizer, record) for record in half] for half in tagged]),
    }


def _tagged(tokenizer: Tokenizer, record: Tagged) -> Example:
    return labelled.of_tags(tokenizer, record.tokens, [IGNORED if t == NOTHING else int(t) for t in record.tags])


def _differences(these: list[float], those: list[float]) -> list[float]:
    return [a - b for a, b in zip(these, those, strict=True)]


def _training(steps: int, lr: float) -> Training:
    return Training(
        steps=steps, optimizer=AdamW.Config(lr=lr), schedule=Cosine(warmup=steps // 10), log_every=max(1, steps // 10)
    )


def _small(dim: int, num_layers: int) -> MaskedModel.Config:
    """Weights begin as the paper's would at this width: 0.02 at 768, and as 1/√dim elsewhere."""
    config = bert.architecture(vocab_size=400, context=64, dim=dim, num_layers=num_layers, num_heads=4)
    return config.replace(initialise=Normal(std=0.02 * math.sqrt(768 / dim), scale_residual=False))


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 9},
    sizes={
        "smoke": Config(
            model=_small(16, 1),
            training=_training(6, 2e-3),
            tuning=_training(3, 1e-3),
            world=Kinds.Config(nouns=6, verbs=2),
            characters=8_000,
            rows=4,
            length=32,
            batch=4,
            labels=6,
            judged=6,
        ),
        "laptop": Config(
            model=_small(64, 2),
            training=_training(1500, 2e-3),
            tuning=_training(160, 1e-3),
            world=Kinds.Config(),
        ),
        # Appendix A.2 and A.3: a million steps of 256 rows of 512 tokens, rate 1e-4; fine-tuned at 3e-5
        "paper": Config(
            model=bert.sized("base"),
            training=_training(1_000_000, 1e-4).replace(precision="bf16"),
            tuning=_training(600, 3e-5),
            world=Kinds.Config(kinds=6, nouns=20),
            characters=400_000_000,
            rows=256,
            length=512,
            batch=32,
            labels=2000,
            judged=2000,
        ),
    },
)
