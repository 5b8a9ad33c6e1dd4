"""Improving Language Understanding by Generative Pre-Training (Radford et al., 2018).

Claim   A Transformer that has learned to predict the next word of unlabelled text, and is then fine-tuned on few labels
        with nothing new but three tokens and one linear layer, is better on tasks of many kinds than one of the same
        shape that learns from the labels alone, and than an LSTM that has read as much (sec. 5, table 5).
Here    Most of Shakespeare and the chronicle of a small country are read. Then four tasks are set by works that were
        kept out of the reading, each put to the model by one of the paper's four transformations: were two words of a
        line exchanged (classification); does one line follow the other (entailment); are two passages of the same work
        (similarity, read both ways round); which of four lines goes on (multiple choice). Beside them one task of the
        small country: is the second text the first in the other tongue. The treatment is fine-tuned with the language
        model's loss beside the labels', λ = 0.5. Controls: the same without pre-training; an LSTM of as many
        parameters, pre-trained alike; the treatment with λ = 0. Each takes the better of two rates, chosen on further
        examples.
Apart   0.6 million parameters and 1.0 million tokens instead of 117 million and about a billion, and tasks that real
        text sets by itself instead of the benchmarks. The paper's two further figures (how many layers are transferred;
        what an untuned model tells) are not drawn again. What λ does is reported and not judged: in table 5 the mean
        is 74.7 with it and 75.0 without.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from allyouneed import core
from allyouneed.core.seeds import derive, seed_everything
from allyouneed.data import labelled, passages
from allyouneed.data.batches import Epochs, Windows
from allyouneed.data.chronicle import Chronicle
from allyouneed.data.corpora import corpus
from allyouneed.data.jsonl import LabelledPair
from allyouneed.data.labelled import Example, Labels, within
from allyouneed.data.tokenizer_training import train_bpe
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.evaluate.labels import classes
from allyouneed.models import gpt
from allyouneed.models.decoder import Decoder
from allyouneed.models.heads import Chooser, Classifier
from allyouneed.models.recurrent import RecurrentModel
from allyouneed.nn.initialise import Normal
from allyouneed.nn.recurrent import LSTM, Recurrent
from allyouneed.objectives.labels import labels
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine, Linear

GPT, NO_AUXILIARY, SCRATCH, RECURRENT = "GPT", "no auxiliary loss", "no pre-training", "LSTM"
REAL, WORLD = ("word order", "next line", "same work", "continuation"), "tongues"
METHODS = {
    "word order": "classify",
    "next line": "pairs",
    "same work": "similarity",
    "continuation": "choices",
    WORLD: "pairs",
}
FRAME = ("<s>", "<$>", "<e>")  # start, delimiter, extract


@dataclass(frozen=True, kw_only=True)
class Arm(core.Config):
    """Which model, whether it has read before, and λ."""

    model: str
    pretrained: bool = True
    auxiliary: float = 0.5


ARMS = {
    GPT: Arm(model=GPT),
    NO_AUXILIARY: Arm(model=GPT, auxiliary=0.0),
    SCRATCH: Arm(model=GPT, pretrained=False),
    RECURRENT: Arm(model=RECURRENT),
}


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The two models, what they read and are taught, and the margins of the verdict, in accuracy."""

    model: Decoder.Config  # its vocabulary is set by the text
    recurrent: RecurrentModel.Config
    pretraining: Training
    recurrent_pretraining: Training
    tuning: Training  # its steps and rate are set by the task
    rates: tuple[float, ...]
    corpus: str
    world: Chronicle.Config
    world_characters: int = 800_000
    rows: int = 16
    length: int = 128
    labels: tuple[int, ...] = (60, 400)  # examples to learn from
    judged: int = 400
    batch: int = 32
    epochs: int = 4
    real: float = 0.03  # mean of the tasks of real text: GPT minus no pre-training, above
    made: float = 0.05  # the world's task: the same, above
    recurrence: float = 0.0  # mean of all tasks: GPT minus LSTM, above


@dataclass(frozen=True)
class Material:
    """What one seed's models read, and the examples of each task: to learn from, to choose by, to be judged by."""

    tokenizer: Tokenizer
    tokens: torch.Tensor
    tasks: Mapping[str, tuple[list[Example], list[Example], list[Example]]]


def run(config: Config, report: Report) -> None:
    """Pre-train both models, fine-tune every arm on every task, and hold the differences against the margins."""
    materials: dict[int, Material] = {}

    def material(seed: int) -> Material:
        if seed not in materials:
            materials.clear()  # one at a time is enough
            materials[seed] = _material(config, seed)
        return materials[seed]

    def read(name: str, seed: int, folder: Path) -> dict[str, Any]:
        return _pretrained(config, name, material(seed), seed, folder)

    found = report.repeat({f"pre-train {name}": name for name in (GPT, RECURRENT)}, read)
    weights = {name: [one["weights"] for one in found[f"pre-train {name}"]] for name in (GPT, RECURRENT)}
    for name in (GPT, RECURRENT):
        facts = found[f"pre-train {name}"]
        report.arm(f"pre-train {name}", parameters=facts[0]["parameters"], tokens=facts[0]["tokens"])

    def choose(folder: Path) -> dict[str, float]:
        return {
            name: _best_rate(config, arm, material(0), report.folder / weights[arm.model][0])
            for name, arm in ARMS.items()
        }

    rates = report.job("rates", choose)

    def tune(name: str, seed: int, folder: Path) -> dict[str, Any]:
        arm = ARMS[name]
        before = report.folder / weights[arm.model][seed]
        return {
            str(count): {
                task: _tuned(config, arm, rates[name], material(seed), task, count, before, seed) for task in METHODS
            }
            for count in config.labels
        }

    scores = report.repeat({name: name for name in ARMS}, tune)
    _judge(config, report, scores, rates)


def _judge(config: Config, report: Report, scores: Mapping[str, list[Any]], rates: Mapping[str, float]) -> None:
    most = str(max(config.labels))

    def mean(name: str, tasks: Sequence[str], count: str = most) -> list[float]:
        return [statistics.fmean(one[count][task] for task in tasks) for one in scores[name]]

    def gains(other: str, tasks: Sequence[str]) -> list[float]:
        return [a - b for a, b in zip(mean(GPT, tasks), mean(other, tasks), strict=True)]

    for name, arm in ARMS.items():
        report.arm(name, rate=rates[name], auxiliary=arm.auxiliary, pretrained=arm.pretrained)
    report.check("tasks of real text, GPT minus no pre-training", values=gains(SCRATCH, REAL), above=config.real)
    report.check("task of the world, GPT minus no pre-training", values=gains(SCRATCH, [WORLD]), above=config.made)
    report.check("all tasks, GPT minus LSTM", values=gains(RECURRENT, list(METHODS)), above=config.recurrence)
    for count in map(str, config.labels):
        report.table(
            f"accuracy with {count} labels (chance 0.5; continuation 0.25), mean of seeds",
            [
                {"arm": name}
                | {task: round(statistics.fmean(mean(name, [task], count)), 3) for task in METHODS}
                | {"mean": round(statistics.fmean(mean(name, list(METHODS), count)), 3)}
                for name in ARMS
            ],
        )
    auxiliary = statistics.fmean(gains(NO_AUXILIARY, list(METHODS)))
    report.note(f"λ = 0.5 instead of 0 changes the mean accuracy by {auxiliary:+.3f} (table 5: −0.3 points of score).")
    figure, axes = figures.new(13, 3.2, columns=len(METHODS))
    for place, (task, axis) in enumerate(zip(METHODS, axes, strict=True)):
        each = [mean(name, [task]) for name in ARMS]
        figures.bars(
            axis,
            list(ARMS) if place == 0 else [""] * len(ARMS),
            [statistics.fmean(values) for values in each],
            [(min(values), max(values)) for values in each],
            [figures.PALETTE[0], figures.PALETTE[1], figures.CONTROL, figures.PALETTE[2]],
            form="{:.2f}",
        )
        figures.mark(axis, "", x=0.25 if METHODS[task] == "choices" else 0.5)
        figures.describe(axis, title=task, x="accuracy")
    report.figure(figure, f"Accuracy after {most} labels; lines: lowest to highest seed; dashed: chance.")


def _material(config: Config, seed: int) -> Material:
    """Text, vocabulary and examples. No work that sets tasks is read, and no line of the chronicle that is judged."""
    text, world = corpus(config.corpus, valid=0.2, seed=seed), config.world.replace(seed=seed).build()
    read = [*(document.text for document in text.train), world.text(config.world_characters, seed)]
    tokenizer = train_bpe(read, config.model.vocab_size - len(FRAME)).framed(*FRAME)
    works = [found for document in text.valid if len(found := passages.lines(document.text)) > 8]
    spare = max(config.labels)
    count = 2 * spare + config.judged
    records: dict[str, Sequence[Any]] = {
        "word order": passages.order(works, count, seed),
        "next line": passages.follows(works, count, seed),
        "same work": passages.same_work(works, count, seed),
        "continuation": passages.continuation(works, count, seed),
        WORLD: _tongues(world, 2 * spare, config.judged, seed),
    }
    tasks = {}
    for task, chosen in records.items():
        make = labelled.METHODS[METHODS[task]].make
        examples = [within(make(tokenizer, Labels(("0", "1")), record), config.model.context) for record in chosen]
        tasks[task] = examples[:spare], examples[spare : 2 * spare], examples[2 * spare :]
    tokens = torch.tensor([i for ids in tokenizer.encode_batch(read) for i in (*ids, *tokenizer.eos_ids[:1])])
    return Material(tokenizer, tokens, tasks)


def _tongues(world: Chronicle, learned: int, judged: int, seed: int) -> list[LabelledPair]:
    """Words, and in every other record what they are in the other tongue. The text has no line of those judged."""
    asked = [(line.beginning, options) for line, options in world.questions("translation", judged, seed)]
    source = random.Random(derive(seed, "tongues"))
    known = {beginning for beginning, _ in asked}
    lines: dict[str, tuple[str, ...]] = {}
    while len(lines) < learned:
        line, other = (world.tasks["translation"](source) for _ in range(2))
        if line.beginning not in known and other.answer != line.answer:
            lines[line.beginning] = (line.answer, other.answer)
    every = [*lines.items(), *asked]
    return [LabelledPair(first, f"{options[i % 2]}.", 1 - i % 2) for i, (first, options) in enumerate(every)]


def _model(config: Config, name: str, vocab_size: int) -> Any:
    return (config.model if name == GPT else config.recurrent).replace(vocab_size=vocab_size)


def _pretrained(config: Config, name: str, material: Material, seed: int, folder: Path) -> dict[str, Any]:
    """The weights of a model that has read, as a file, and what that took."""
    seed_everything(seed)
    module = _model(config, name, material.tokenizer.vocab_size).build()
    batches = Windows(material.tokens, batch_size=config.rows, length=config.length, seed=seed)
    training = config.pretraining if name == GPT else config.recurrent_pretraining
    train(module, next_token, batches, training.replace(seed=seed), folder=folder, title="  read")
    path = folder / "model.safetensors"
    save_file({key: value.clone() for key, value in module.state_dict().items()}, path)
    return {
        "weights": "/".join(path.parts[-4:]),  # within the run's folder
        "parameters": sum(p.numel() for p in module.parameters()),
        "tokens": training.steps * config.rows * config.length,
    }


def _best_rate(config: Config, arm: Arm, material: Material, weights: Path) -> float:
    """The rate by which the most examples that are not judged later are told after fine-tuning, mean of two tasks."""
    count = max(config.labels)

    def score(rate: float) -> float:
        return statistics.fmean(
            _tuned(config, arm, rate, material, task, count, weights, seed=0, choosing=True)
            for task in ("word order", "next line")
        )

    return max(config.rates, key=score) if len(config.rates) > 1 else config.rates[0]


def _tuned(
    config: Config,
    arm: Arm,
    rate: float,
    material: Material,
    task: str,
    count: int,
    weights: Path,
    seed: int,
    *,
    choosing: bool = False,
) -> float:
    """The accuracy on a task after fine-tuning on `count` examples."""
    learned, spare, judged = material.tasks[task]
    seed_everything(seed)
    model = _model(config, arm.model, material.tokenizer.vocab_size)
    kind: Callable[..., Any] = Chooser if METHODS[task] == "choices" else Classifier
    head = kind(kind.Config(model=model, labels=("no", "yes")))  # type: ignore[attr-defined]
    if arm.pretrained:
        head.model.load_state_dict(load_file(weights))
    steps = config.epochs * -(-count // config.batch)
    training = config.tuning.replace(steps=steps, optimizer=config.tuning.optimizer.replace(lr=rate), seed=seed)
    batches = Epochs(learned[:count], batch_size=config.batch, collate=labelled.collate, seed=seed)
    train(head, labels(arm.auxiliary), batches, training, quiet=True)
    return classes(head, spare if choosing else judged)["accuracy"]


def _small(vocab_size: int, context: int, dim: int, num_layers: int, hidden: int) -> dict[str, Any]:
    """Weights begin as the paper's would at this width: 0.02 at 768, and as 1/√dim elsewhere."""
    layers = Recurrent.Config(cell=LSTM.Config(), num_layers=2, dropout=0.1)
    model = gpt.architecture(
        vocab_size=vocab_size, context=context, dim=dim, num_layers=num_layers, num_heads=4, dropout=0.1
    )
    return {
        "model": model.replace(initialise=Normal(std=0.02 * math.sqrt(768 / dim), scale_residual=False)),
        "recurrent": RecurrentModel.Config(vocab_size=vocab_size, dim=hidden, layers=layers, tied=True),
    }


def _pretraining(steps: int, lr: float) -> Training:
    """Adam, linear warm-up and a cosine to zero (sec. 4.1)."""
    schedule = Cosine(warmup=steps // 5, floor=0.0)
    return Training(steps=steps, optimizer=AdamW.Config(lr=lr, weight_decay=0.01), schedule=schedule, log_every=50)


TUNING = Training(steps=1, optimizer=AdamW.Config(weight_decay=0.01), schedule=Linear(warmup=2), log_every=50)

PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 10},
    sizes={
        "smoke": Config(
            **_small(300, 1024, 16, 1, 16),
            pretraining=_pretraining(6, 2e-3),
            recurrent_pretraining=_pretraining(6, 1e-2),
            tuning=TUNING,
            rates=(1e-3,),
            corpus="python-reference",
            world=Chronicle.Config(words=16),
            world_characters=10_000,
            rows=4,
            length=32,
            labels=(8,),
            judged=8,
            batch=4,
            epochs=1,
        ),
        "laptop": Config(
            **_small(1024, 256, 96, 4, 154),
            pretraining=_pretraining(500, 2e-3),  # of three rates the one that read best in 250 steps, for each
            recurrent_pretraining=_pretraining(500, 1e-2),
            tuning=TUNING,
            rates=(5e-4, 1.5e-3),
            corpus="shakespeare",
            world=Chronicle.Config(words=48),
        ),
        # Sec. 4.1: 100 epochs of 64 rows of 512 tokens at 2.5e-4; fine-tuned for 3 epochs at 6.25e-5
        "paper": Config(
            model=gpt.published(),
            recurrent=RecurrentModel.Config(
                vocab_size=40478, dim=2048, layers=Recurrent.Config(cell=LSTM.Config()), tied=True
            ),
            pretraining=_pretraining(3_000_000, 2.5e-4).replace(precision="bf16"),
            recurrent_pretraining=_pretraining(3_000_000, 2.5e-4).replace(precision="bf16"),
            tuning=TUNING,
            rates=(6.25e-5,),
            corpus="shakespeare",
            world=Chronicle.Config(words=400),
            world_characters=100_000_000,
            rows=64,
            length=512,
            labels=(5000,),
            judged=2000,
            epochs=3,
        ),
    },
)
