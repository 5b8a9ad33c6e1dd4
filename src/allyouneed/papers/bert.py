"""BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (Devlin et al., 2019).

arXiv:1810.04805.

Claim   A model that has learned to fill blanks, seeing both sides of them, understands sentences better after
        fine-tuning on a few labels than one of the same size that has read as much from left to right; and telling,
        besides, whether one sentence follows the other makes it better still where two sentences are compared
        (sec. 5.1, table 5).
Here    The chronicle of a small country, in documents of one hero each. Three arms read the same rows with the same
        parameters: masked tokens and following sentences; masked tokens alone; the next token alone, later tokens
        hidden. Each is then fine-tuned on the same labels: is a line that shows a task (a translation, a repetition,
        the first of a list) completed rightly, and are two sentences about the same hero. No such line stood in
        the text, whoever completed it. The bidirectional arms are judged by the vector of [CLS], the other by that of
        its last token, the only one that has seen the sentence. A fourth arm is fine-tuned without having read.
Apart   0.4 million parameters and some million tokens, instead of 110 million and 137 billion; a made-up country
        instead of books and Wikipedia, so that the sentences are short and their truth is known; one rate for all
        arms and no choice among several. The left-to-right arm learns from every token, the others from 15 %: at
        equal tokens read it has had seven times the targets, as in the paper, whose models read far more.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from allyouneed import core
from allyouneed.core.seeds import derive, seed_everything
from allyouneed.data.batches import Epochs
from allyouneed.data.chronicle import Chronicle
from allyouneed.data.masked import MaskedPairs, Masking
from allyouneed.data.packing import IGNORED, Batch
from allyouneed.data.tokenizer_training import train_wordpiece
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.models import bert
from allyouneed.models.encoder import MaskedModel
from allyouneed.objectives.loss import Loss
from allyouneed.objectives.masked import masked, masked_and_pairs
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine

BOTH, NO_NSP, LEFT_TO_RIGHT, SCRATCH = "BERT", "no NSP", "left to right, no NSP", "no pre-training"
ARMS = (BOTH, NO_NSP, LEFT_TO_RIGHT, SCRATCH)
LINES = ("translation", "repetition", "first of a list")
PAIRS = "same hero"
Example = tuple[str, str | None, int]  # a sentence, perhaps a second one, and the label


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The model, what it reads and is taught, and the margins of the verdict, in accuracy."""

    model: MaskedModel.Config
    training: Training
    tuning: Training
    world: Chronicle.Config
    characters: int = 2_000_000
    rows: int = 32
    length: int = 64
    labels: int = 200  # examples to learn from, per task, and as many to be judged by
    bidirectional: float = 0.02  # mean of tasks: no NSP minus left to right
    pairs: float = 0.02  # accuracy on pairs: BERT minus no NSP
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
    tasks = (*LINES, PAIRS)
    means = {arm: [statistics.fmean(one[task] for task in tasks) for one in found[arm]] for arm in ARMS}
    report.check(
        "mean accuracy, bidirectional minus left to right, both without NSP",
        values=_differences(means[NO_NSP], means[LEFT_TO_RIGHT]),
        above=config.bidirectional,
    )
    report.check(
        "accuracy on pairs of sentences, with NSP minus without",
        values=_differences([one[PAIRS] for one in found[BOTH]], [one[PAIRS] for one in found[NO_NSP]]),
        above=config.pairs,
    )
    report.check(
        "mean accuracy, BERT minus no pre-training",
        values=_differences(means[BOTH], means[SCRATCH]),
        above=config.pretrained,
    )
    table = {task: {arm: statistics.fmean(one[task] for one in found[arm]) for arm in ARMS} for task in tasks}
    report.table(
        "accuracy after fine-tuning (chance 0.5)",
        [{"task": task} | {arm: round(value, 3) for arm, value in row.items()} for task, row in table.items()],
    )
    for arm in ARMS:
        values = [[one[task] for task in tasks] for one in found[arm]]
        report.curve(arm, range(len(tasks)), values, x_label=f"task ({', '.join(tasks)})", y_label="accuracy")
    figure, axes = figures.new(11, 3.2, columns=len(tasks))
    for place, (task, axis) in enumerate(zip(tasks, axes, strict=True)):
        each = [[one[task] for one in found[arm]] for arm in ARMS]
        colors = [*figures.PALETTE[: len(ARMS) - 1], figures.CONTROL]
        spans = [(min(values), max(values)) for values in each]
        labels = ARMS if place == 0 else [""] * len(ARMS)
        figures.bars(axis, labels, [statistics.fmean(values) for values in each], spans, colors, form="{:.2f}")
        figures.mark(axis, "", x=0.5)
        figures.describe(axis, title=task, x="accuracy")
    report.figure(figure, "Accuracy after fine-tuning, by task; lines: lowest to highest seed; dashed: chance.")


def _accuracies(config: Config, arm: str, seed: int, folder: Path) -> dict[str, float]:
    """One arm's accuracy on every task."""
    world = config.world.replace(seed=seed).build()
    sentences = [part + "." for part in world.text(config.characters, seed).strip().split(". ")]
    sentences = [sentence.removesuffix("..") + "." if sentence.endswith("..") else sentence for sentence in sentences]
    tokenizer = train_wordpiece(sentences, config.model.vocab_size)
    documents = [tokenizer.encode_batch(text) for text in _documents(sentences)]
    seed_everything(seed)
    sizes = config.model.replace(vocab_size=tokenizer.vocab_size)
    module = (_left_to_right(sizes) if arm == LEFT_TO_RIGHT else sizes).build()
    if arm != SCRATCH:
        masking = Masking(share=1.0, hidden=0.0, exchanged=0.0) if arm == LEFT_TO_RIGHT else Masking()
        batches = MaskedPairs(
            documents, tokenizer, batch_size=config.rows, length=config.length, seed=seed, masking=masking
        )
        objective: Any = {BOTH: masked_and_pairs, NO_NSP: masked, LEFT_TO_RIGHT: _next_token}[arm]
        train(module, objective, batches, config.training.replace(seed=seed), folder=folder, title="  read")
    known = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found: dict[str, float] = {"parameters": sizes.num_parameters()}
    for task in (*LINES, PAIRS):
        module.load_state_dict(known)
        found[task] = _fine_tuned(config, module, tokenizer, _examples(world, task, config.labels, seed), seed)
    return found


def _left_to_right(config: MaskedModel.Config) -> LeftToRight.Config:
    return LeftToRight.Config(**{name: getattr(config, name) for name in config.to_json() if name != core.config.TAG})


def _next_token(module: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Each token told from the vector of the one before it."""
    following = torch.nn.functional.pad(batch["targets"][:, 1:], (0, 1), value=IGNORED)
    return masked(module, {**batch, "targets": following})


def _documents(sentences: list[str]) -> list[list[str]]:
    """Eight sentences each: four tales of one hero, and between them whatever else the chronicle says."""
    tales: dict[str, list[str]] = {}
    others = []
    for sentence in sentences:
        words = sentence.split()
        if len(words) == 5 and words[0] == words[3] == "the":
            tales.setdefault(words[1], []).append(sentence)
        else:
            others.append(sentence)
    rest = iter(others)
    documents = []
    for told in tales.values():
        for start in range(0, len(told) - 3, 4):
            document = [sentence for tale in told[start : start + 4] for sentence in (tale, next(rest, ""))]
            documents.append([sentence for sentence in document if sentence])
    return documents


def _examples(world: Chronicle, task: str, count: int, seed: int) -> list[Example]:
    """Twice `count` examples, half of them true: the first to learn from, the others to be judged by."""
    source = random.Random(derive(seed, "examples", task))
    if task == PAIRS:
        return [_pair(world, i % 2 == 0, source) for i in range(2 * count)]
    return [
        (f"{line.beginning} {options[0] if i % 2 == 0 else source.choice(options[1:])}.", None, i % 2)
        for i, (line, options) in enumerate(world.questions(task, 2 * count, seed))
    ]


def _pair(world: Chronicle, same: bool, source: random.Random) -> Example:
    """Two tales of the same hero or of two, with other persons in both."""
    hero, other, *whom = source.sample(world.words, 4)
    first, second = (source.choice(world.verbs) for _ in range(2))
    second_hero = hero if same else other
    return f"the {hero} {first} the {whom[0]}.", f"the {second_hero} {second} the {whom[1]}.", int(not same)


class _Classifier(nn.Module):
    """A label for each row from the pooled vector of its first token, or of its last where only that has seen all."""

    def __init__(self, model: MaskedModel) -> None:
        super().__init__()
        self.model, self.label = model, nn.Linear(model.config.dim, 2)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, batch: Batch) -> Tensor:
        """A batch of B rows -> (B, 2)."""
        hidden = self.model.hidden(batch["ids"], batch["segments"], batch["types"])
        if self.model.causal:
            hidden = hidden[torch.arange(len(hidden)), batch["segments"].sum(1) - 1][:, None]
        logits: Tensor = self.label(self.model.pool(hidden))
        return logits


def _labels(module: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    total = torch.nn.functional.cross_entropy(module(batch), batch["labels"], reduction="sum")
    return Loss(total, torch.tensor(len(batch["labels"])), unit="sentences")


def _fine_tuned(config: Config, model: MaskedModel, tokenizer: Tokenizer, examples: list[Example], seed: int) -> float:
    """The accuracy on the second half of the examples after learning from the first."""
    encoded = _encoded(tokenizer, examples, config.model.context)
    half = len(examples) // 2
    seed_everything(seed)
    module = _Classifier(model)
    batches = Epochs(encoded[:half], batch_size=config.rows, collate=_collate, seed=seed)
    train(module, _labels, batches, config.tuning.replace(seed=seed), quiet=True)
    module.eval()
    with torch.no_grad():
        judged = _collate(encoded[half:])
        return (module(judged).argmax(-1) == judged["labels"]).float().mean().item()


def _encoded(tokenizer: Tokenizer, examples: list[Example], most: int) -> list[tuple[list[int], list[int], int]]:
    """Ids, kinds of tokens and label."""
    found = []
    for first, second, label in examples:
        if second is None:
            ids = tokenizer.encode(first, add_special_tokens=True)
            found.append((ids, [0] * len(ids), label))
        else:
            found.append((*tokenizer.encode_pairs([(first, second)], most=most)[0], label))
    return found


def _collate(chosen: list[tuple[list[int], list[int], int]]) -> Batch:
    def padded(rows: list[list[int]]) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    return {
        "ids": padded([ids for ids, _, _ in chosen]),
        "types": padded([types for _, types, _ in chosen]),
        "segments": padded([[1] * len(ids) for ids, _, _ in chosen]),
        "labels": torch.tensor([label for _, _, label in chosen]),
    }


def _differences(these: list[float], those: list[float]) -> list[float]:
    return [a - b for a, b in zip(these, those, strict=True)]


def _training(steps: int, lr: float) -> Training:
    return Training(
        steps=steps, optimizer=AdamW.Config(lr=lr), schedule=Cosine(warmup=steps // 10), log_every=max(1, steps // 10)
    )


def _small(dim: int, num_layers: int) -> MaskedModel.Config:
    return bert.architecture(vocab_size=400, context=64, dim=dim, num_layers=num_layers, num_heads=4)


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
            world=Chronicle.Config(words=12),
            characters=8_000,
            rows=4,
            length=32,
            labels=6,
        ),
        "laptop": Config(
            model=_small(96, 3),
            training=_training(700, 2e-3),
            tuning=_training(60, 1e-3),
            world=Chronicle.Config(words=48),
            labels=150,
        ),
        # Appendix A.2 and A.3: a million steps of 256 rows of 512 tokens, rate 1e-4; fine-tuned at 3e-5
        "paper": Config(
            model=bert.sized("base"),
            training=_training(1_000_000, 1e-4).replace(precision="bf16"),
            tuning=_training(600, 3e-5),
            world=Chronicle.Config(words=400),
            characters=400_000_000,
            rows=256,
            length=512,
            labels=2000,
        ),
    },
)
