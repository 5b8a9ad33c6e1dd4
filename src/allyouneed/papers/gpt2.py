"""Language Models are Unsupervised Multitask Learners (Radford et al., 2019).

Technical report, OpenAI.

Claim   A language model that only predicts the next token of varied text learns, without any supervision, to do the
        tasks that happen to occur in that text; asked without examples, it does them better the more text it has
        read, and it does so because the text shows the tasks, not because of their form.
Here    A GPT-2 with its own byte-level BPE reads the chronicle of a small country. Every other sentence happens to
        show a task: a sum, a translation, a repetition, the first of a list. At several points of its training it is
        asked, by comparing the likelihood of four answers, lines that were kept out of the text. Treatment: the
        chronicle. Control: the same chronicle, with the answers exchanged among sentences of the same task.
Apart   0.4 million parameters instead of 1.5 billion; a made-up country instead of WebText's forty gigabytes, in which
        tasks are far more frequent than on the web; options instead of free answers. As the far end, SmolLM2-135M is
        asked real tasks without examples; it was tuned to follow instructions, so it is shown, not judged. The
        paper's scores on LAMBADA, WikiText and the like need data that is not here.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allyouneed import core
from allyouneed.core.seeds import seed_everything
from allyouneed.data.batches import Windows
from allyouneed.data.chronicle import Chronicle
from allyouneed.data.tokenizer_training import train_bpe
from allyouneed.evaluate.options import Question, accuracy, correct, score_options, with_demonstrations
from allyouneed.evaluate.tasks import tasks
from allyouneed.generate.load import load
from allyouneed.generate.local import LocalModel
from allyouneed.models import gpt2
from allyouneed.models.decoder import Decoder
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine

SHOWN, EXCHANGED = "tasks occur in the text", "answers exchanged"


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The model, what it reads, what it is asked, and the margins of the verdict."""

    model: Decoder.Config
    training: Training
    world: Chronicle.Config
    characters: int = 2_000_000
    rows: int = 32
    length: int = 64
    questions: int = 40  # per task
    asked: int = 6  # times during the training
    far_end: str | None = None  # a model asked real tasks without examples
    over_chance: float = 0.20  # accuracy at the end, mean of tasks, minus chance
    over_control: float = 0.10  # the same minus the control's
    rises: float = 0.60  # Spearman's correlation of accuracy and tokens read


def run(config: Config, report: Report) -> None:
    """Train both arms, ask them along the way, and hold the differences against the margins."""
    arms = {SHOWN: config.world, EXCHANGED: config.world.replace(sound=False)}

    def work(world: Chronicle.Config, seed: int, folder: Path) -> dict[str, Any]:
        return _trained(config, world.replace(seed=seed).build(), seed, folder)

    found = report.repeat(arms, work)
    for name in arms:
        report.arm(
            name,
            parameters=found[name][0]["parameters"],
            tokens=config.training.steps * config.rows * config.length,
        )
    means = {name: [_means(one["accuracy"]) for one in values] for name, values in found.items()}
    last = {name: [points[-1] for points in values] for name, values in means.items()}
    chance = 0.25
    report.check("accuracy at the end minus chance", values=[a - chance for a in last[SHOWN]], above=config.over_chance)
    report.check(
        "accuracy at the end, treatment minus control",
        values=[a - b for a, b in zip(last[SHOWN], last[EXCHANGED], strict=True)],
        above=config.over_control,
    )
    report.check(
        "rank correlation of accuracy and tokens read",
        values=[_spearman(points) for points in means[SHOWN]],
        above=config.rises,
    )
    report.table("accuracy at the end, by task (chance 0.25)", _by_task(found))
    if config.far_end:
        report.table(
            f"far end: {config.far_end} without examples", report.job("far-end", lambda folder: _far_end(config))
        )
    _figure(report, found, means)


def _trained(config: Config, world: Chronicle, seed: int, folder: Path) -> dict[str, Any]:
    """Accuracy by task, each time the model is asked."""
    text = world.text(config.characters, seed)
    tokenizer = train_bpe([text], config.model.vocab_size)
    asked = {task: _questions(world, task, config.questions, seed) for task in world.tasks}

    def evaluate(module: torch.nn.Module) -> dict[str, float]:
        assert isinstance(module, Decoder)
        lm = LocalModel(module, tokenizer, "gpt2")
        return {
            task: float(correct(questions, score_options(lm, questions, answer_context=None), "raw").mean())
            for task, questions in asked.items()
        }

    seed_everything(seed)
    model = config.model.replace(vocab_size=tokenizer.vocab_size)
    done = train(
        model.build(),
        next_token,
        Windows(torch.tensor(tokenizer.encode(text)), batch_size=config.rows, length=config.length, seed=seed),
        config.training.replace(seed=seed, evaluate_every=math.ceil(config.training.steps / config.asked)),
        folder=folder,
        evaluate=evaluate,
        title="  train",
    )
    points = [row for row in done.history if next(iter(asked)) in row]
    return {
        "parameters": model.num_parameters(),
        "tokens": [row["step"] * config.rows * config.length for row in points],
        "accuracy": {task: [row[task] for row in points] for task in asked},
    }


def _questions(world: Chronicle, task: str, count: int, seed: int) -> list[Question]:
    """Lines with their answers in alphabetical order, so that the place of the right one says nothing."""
    return [
        Question(line.beginning, tuple(sorted(f"{option}." for option in options)), sorted(options).index(line.answer))
        for line, options in world.questions(task, count, seed)
    ]


def _far_end(config: Config) -> list[dict[str, Any]]:
    """A real model's accuracy on real tasks, asked with no more than a line of description."""
    assert config.far_end is not None
    lm = load(config.far_end)
    rows = []
    for task in tasks(config.questions):
        asked = [with_demonstrations(q, [], description=f"{task.description}\n\n") for q in task.questions]
        found = accuracy(asked, score_options(lm, asked))["per_token"]
        rows.append({"task": task.name, "chance": round(task.chance, 3), "accuracy, with 95 % interval": str(found)})
    return rows


def _means(by_task: dict[str, list[float]]) -> list[float]:
    """The mean over tasks each time."""
    return [statistics.fmean(column) for column in zip(*by_task.values(), strict=True)]


def _spearman(values: list[float]) -> float:
    """Spearman's rank correlation of values with their order; ties share their mean rank.

    >>> _spearman([0.1, 0.2, 0.4])
    1.0
    """
    array = np.array(values)
    ranks = np.array([((array < value).sum() + (array <= value).sum() - 1) / 2 for value in array])
    if ranks.std() == 0:
        return 0.0
    return float(np.corrcoef(np.arange(len(array)), ranks)[0, 1].round(12))


def _by_task(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {"task": task}
        | {
            name: round(statistics.fmean(one["accuracy"][task][-1] for one in values), 3)
            for name, values in found.items()
        }
        for task in found[SHOWN][0]["accuracy"]
    ]


def _figure(report: Report, found: dict[str, list[dict[str, Any]]], means: dict[str, list[list[float]]]) -> None:
    figure, (left, right) = figures.new(11, 4.2, columns=2)
    tokens = found[SHOWN][0]["tokens"]
    for (name, values), color in zip(means.items(), (figures.PALETTE[0], figures.CONTROL), strict=True):
        report.curve(name, tokens, values, x_label="tokens read", y_label="accuracy, mean of tasks")
        figures.band(left, tokens, values, name, color)
    for task in found[SHOWN][0]["accuracy"]:
        values = [one["accuracy"][task] for one in found[SHOWN]]
        report.curve(f"{SHOWN}: {task}", tokens, values, x_label="tokens read", y_label="accuracy")
        figures.band(right, tokens, values, task)
    for axes, title in ((left, "Asked without examples, mean of tasks"), (right, "The treatment, task by task")):
        axes.set_ylim(0, 1.02)
        figures.describe(axes, title=title, x="tokens read", y="accuracy")
        figures.mark(axes, "chance", y=0.25)
        figures.label_ends(axes)
    report.figure(figure, "Accuracy on held-out lines along the training; band: lowest to highest seed.")


def _small(dim: int, num_layers: int) -> Decoder.Config:
    return gpt2.architecture(vocab_size=400, context=128, dim=dim, num_layers=num_layers, num_heads=4)


def _training(steps: int, lr: float = 2e-3) -> Training:
    return Training(
        steps=steps, optimizer=AdamW.Config(lr=lr), schedule=Cosine(warmup=steps // 20), log_every=max(1, steps // 10)
    )


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.3, "laptop": 7},
    sizes={
        "smoke": Config(
            model=_small(16, 1),
            training=_training(12),
            world=Chronicle.Config(words=12),
            characters=4_000,
            rows=4,
            length=32,
            questions=3,
            asked=3,
        ),
        "laptop": Config(
            model=_small(96, 3),
            training=_training(1000, lr=4e-3),
            world=Chronicle.Config(),
            far_end="smollm2-135m-instruct",
        ),
        # Table 2's largest; context 1024 and batches of 512 (sec. 2.3); the rate was tuned by hand and not printed
        "paper": Config(
            model=gpt2.sized("1558M"),
            training=_training(800_000, lr=2.5e-4).replace(precision="bf16"),
            world=Chronicle.Config(words=2000),
            characters=400_000_000,
            rows=512,
            length=1024,
            far_end="smollm2-135m-instruct",
        ),
    },
)
