"""Language Models are Few-Shot Learners (Brown et al., 2020).

arXiv:2005.14165.

Claim   A language model picks up a task from examples in its prompt, without any change of its weights: accuracy on
        tasks it was never tuned for rises with the number of examples k, and it rises because the examples show what
        is asked, not merely because the prompt grows. A model trained from scratch on sequences that must be
        understood from themselves learns to do so: its loss falls along the context.
Here    SmolLM2-135M-Instruct answers seven short tasks by comparing the likelihood of the options, divided by their
        number of tokens (sec. 2.4), after k = 0 … 32 examples. Treatment: examples with right answers. Control: the
        same examples, each answered by one of its options drawn by lot, which keeps their form, topic and labels.
        Every seed asks other questions. Beside it a small model of the paper's architecture, dense and locally banded
        attention in turn (sec. 2.1), is trained on rows of key–value pairs under a mapping new to every row; its
        control has no mapping, and the best possible loss of both is known.
Apart   135 million parameters instead of 175 billion, and a model tuned for chat instead of a raw one; seven tasks of
        our own making instead of some forty data sets. One size only: that larger models profit more from examples,
        the paper's figure 1.2, stays unshown. Examples are drawn once a seed for all questions of a task, not anew for
        each question, so that their tokens are read once. The small model's world has four keys: with eight, or with
        two layers instead of three, it learned nothing in its 800 steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from allyouneed import core
from allyouneed.core.seeds import derive, generator, seed_everything
from allyouneed.data.batches import Generated
from allyouneed.data.packing import Batch
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.data.worlds import Recall
from allyouneed.evaluate.options import correct, relabelled, score_options, with_demonstrations
from allyouneed.evaluate.perplexity import token_nll
from allyouneed.evaluate.tasks import Task, tasks
from allyouneed.generate.language_model import LanguageModel
from allyouneed.generate.load import load
from allyouneed.generate.local import LocalModel
from allyouneed.models import gpt2, gpt3, gpt_neo
from allyouneed.models.decoder import Decoder
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.mesh import mesh_for
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine, Linear
from allyouneed.train.sharding import deferred

# Batch in millions of tokens, peak learning rate (table 2.1); all see 300 B tokens
TRAINED = {
    "125M": (0.5, 6.0e-4),
    "350M": (0.5, 3.0e-4),
    "760M": (0.5, 2.5e-4),
    "1.3B": (1.0, 2.0e-4),
    "2.7B": (1.0, 1.6e-4),
    "6.7B": (2.0, 1.2e-4),
    "13B": (2.0, 1.0e-4),
    "175B": (3.2, 0.6e-4),
}

RIGHT, LOTS = "right answers", "answers by lot"


def training(name: str) -> Training:
    """How a published size was trained (table 2.1 and appendix B): 300 billion tokens, warmed up over 375 million, at
    a tenth of the rate from 260 billion on.
    """
    batch_millions, lr = TRAINED[name]
    steps, warmup, until = (round(tokens / (batch_millions * 1e6)) for tokens in (300e9, 375e6, 260e9))
    schedule = Cosine(warmup=warmup, until=until)
    return Training(steps=steps, optimizer=AdamW.Config(lr=lr), schedule=schedule, precision="bf16")


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """Which model is asked, how often, and the margins of the verdict."""

    lm: str | None = "smollm2-135m-instruct"  # None: a random model, to try the machinery
    shots: tuple[int, ...] = (0, 1, 4, 16, 32)
    questions: int = 9  # per task and seed
    normalisation: str = "per_token"
    world: Recall.Config
    model: Decoder.Config
    training: Training
    rows: int = 32  # per batch
    gain: float = 0.05  # accuracy with most examples minus accuracy with none
    over_lots: float = 0.05  # accuracy with right answers minus that with answers by lot, at most examples
    falls: float = 0.3  # nats by which the loss at the last pairs lies under the control's


def run(config: Config, report: Report) -> None:
    """Ask the model, train the small one, and hold both against the margins."""
    accuracies = _prompted(config, report)
    _figure(config, report, accuracies, _from_scratch(config, report))


def _prompted(config: Config, report: Report) -> dict[str, list[dict[str, list[float]]]]:
    lm = load(config.lm) if config.lm else _random_model()
    if config.lm is None:
        report.evidence = "small world"
    everything = tasks()
    _enough(config, everything, len(report.seeds))

    def work(arm: str, seed: int, folder: Path) -> dict[str, list[float]]:
        return {task.name: _accuracies(config, lm, task, arm, seed) for task in everything}

    found = report.repeat({RIGHT: RIGHT, LOTS: LOTS}, work)
    right, lots = ([_mean(seed) for seed in found[arm]] for arm in (RIGHT, LOTS))
    for name, values in ((RIGHT, right), (LOTS, lots)):
        report.arm(name, model=lm.name, tasks=len(everything), questions_per_task=config.questions)
        report.curve(name, config.shots, values, x_label="examples k", y_label="mean accuracy")
    report.table(
        "accuracy with right answers, by task and k (chance beside it)",
        [
            {"task": task.name, "chance": round(task.chance, 3)}
            | {
                f"k={k}": round(sum(seed[task.name][i] for seed in found[RIGHT]) / len(report.seeds), 3)
                for i, k in enumerate(config.shots)
            }
            for task in everything
        ],
    )
    most = config.shots[-1]
    report.check(f"accuracy at k={most} minus at k=0", values=[a[-1] - a[0] for a in right], above=config.gain)
    report.check(
        f"right answers minus answers by lot, at k={most}",
        values=[a[-1] - b[-1] for a, b in zip(right, lots, strict=True)],
        above=config.over_lots,
    )
    return found


def _enough(config: Config, everything: list[Task], seeds: int) -> None:
    """Whether each task can ask every seed other questions and still has its examples."""
    fewest = min(len(task.questions) for task in everything)
    if seeds * config.questions > fewest or config.questions + max(config.shots) > fewest:
        raise core.InputError(
            f"questions={config.questions}: tasks have {fewest}, too few for {seeds} seeds that ask different ones "
            f"after {max(config.shots)} examples; ask fewer"
        )


def _accuracies(config: Config, lm: LanguageModel, task: Task, arm: str, seed: int) -> list[float]:
    """For each k, the share of the seed's questions answered rightly after k of the task's other questions."""
    first = seed * config.questions
    asked = task.questions[first : first + config.questions]
    others = task.questions[:first] + task.questions[first + config.questions :]
    order = torch.randperm(len(others), generator=generator(seed, "examples", task.name)).tolist()
    examples = [others[i] for i in order]
    if arm == LOTS:
        examples = [relabelled(example, seed) for example in examples]
    prompts = [
        with_demonstrations(question, examples[:k], description=f"{task.description}\n\n")
        for k in config.shots
        for question in asked
    ]
    scores = score_options(lm, prompts, answer_context=None)  # in one call: what prompts share is read once
    right = correct(prompts, scores, config.normalisation).reshape(len(config.shots), len(asked))
    return [float(share) for share in right.mean(1)]


def _from_scratch(config: Config, report: Report) -> dict[str, list[list[float]]]:
    """The loss at each pair of a row, for rows with a mapping and for the control's without."""
    worlds = {"a mapping per row": config.world, "no mapping": config.world.replace(consistent=False)}

    def work(world: Recall.Config, seed: int, folder: Path) -> list[float]:
        made = world.build()

        def make(source: torch.Generator) -> Batch:
            ids, targets = made.sample(config.rows, source)
            return {"ids": ids, "targets": targets}

        seed_everything(seed)
        module = deferred(config.model.build)
        train(
            module,
            next_token,
            Generated(make, seed=seed),
            config.training.replace(seed=seed),
            folder=folder,
            title="  recall",
        )
        with torch.inference_mode():
            ids, targets = made.sample(512, generator(derive(seed, "test"), "rows"))
            loss = token_nll(module.eval()(ids).logits[:, ::2], targets[:, ::2])
        return loss.mean(0).tolist()

    losses = report.repeat(worlds, work)
    for name, values in losses.items():
        report.arm(name, parameters=config.model.num_parameters(), best_last=worlds[name].build().best_loss()[-1])
        pairs = range(1, config.world.pairs + 1)
        report.curve(f"from scratch, {name}", pairs, values, x_label="pair", y_label="loss (nats)")
    last = config.world.pairs // 4
    late = {name: [sum(seed[-last:]) / last for seed in values] for name, values in losses.items()}
    report.check(
        "from scratch: loss late in the row, control minus treatment",
        values=[c - t for t, c in zip(late["a mapping per row"], late["no mapping"], strict=True)],
        above=config.falls,
    )
    return losses


def _figure(
    config: Config, report: Report, found: dict[str, list[dict[str, list[float]]]], losses: dict[str, list[list[float]]]
) -> None:
    figure, (left, right) = figures.new(11, 4.2, columns=2)
    places = range(len(config.shots))
    for name in found[RIGHT][0]:
        mean = [sum(seed[name][i] for seed in found[RIGHT]) / len(found[RIGHT]) for i in places]
        left.plot(places, mean, color="#BBBBBB", linewidth=1, label="_")
    for name, color in ((RIGHT, figures.PALETTE[0]), (LOTS, figures.CONTROL)):
        figures.band(left, list(places), [_mean(seed) for seed in found[name]], name, color)
    left.set_xticks(list(places), list(map(str, config.shots)))
    figures.describe(left, title="Answering after k examples", x="examples in the prompt", y="accuracy, mean of tasks")
    figures.label_ends(left)
    pairs = list(range(1, config.world.pairs + 1))
    for (name, values), color in zip(losses.items(), (figures.PALETTE[0], figures.CONTROL), strict=True):
        figures.band(right, pairs, values, name, color)
    right.plot(pairs, config.world.build().best_loss(), ":", color=figures.PALETTE[0], label="the best possible")
    figures.describe(right, title="Trained from scratch", x="pair in the row", y="loss on the value (nats)")
    figures.label_ends(right)
    report.figure(figure, "Left: accuracy after k examples; grey, single tasks. Right: loss along the context.")


def _mean(by_task: dict[str, list[float]]) -> list[float]:
    """The mean over tasks at each k."""
    return [sum(column) / len(by_task) for column in zip(*by_task.values(), strict=True)]


def _random_model() -> LanguageModel:
    seed_everything(0)
    module = gpt2.architecture(vocab_size=257, context=2048, dim=16, num_layers=1, num_heads=2).build().eval()
    return LocalModel(module, byte_tokenizer(), "a random model")


def _small(dim: int, num_layers: int, world: Recall.Config) -> Decoder.Config:
    vocab_size, context = world.build().vocab_size, 2 * world.pairs
    return gpt_neo.architecture(
        vocab_size=vocab_size, context=context, dim=dim, num_layers=num_layers, num_heads=4, window=8
    )


def _recall(steps: int) -> Training:
    return Training(
        steps=steps,
        optimizer=AdamW.Config(lr=3e-3),
        schedule=Linear(warmup=max(1, steps // 20)),
        log_every=max(1, steps // 20),
    )


_TINY, _WORLD = Recall.Config(symbols=3, pairs=6), Recall.Config(symbols=4, pairs=16)

PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="real weights",
    minutes={"smoke": 0.2, "laptop": 5},
    sizes={
        "smoke": Config(
            lm=None, shots=(0, 2), questions=3, world=_TINY, model=_small(16, 2, _TINY), training=_recall(8), rows=8
        ),
        "laptop": Config(world=_WORLD, model=_small(64, 3, _WORLD), training=_recall(800)),
        # GPT-3's weights are not public; GPT-Neo's are those of its 2.7B, trained by others on the Pile
        "paper": Config(
            lm="EleutherAI/gpt-neo-2.7B",
            questions=40,
            world=_WORLD,
            model=gpt3.sized("175B"),
            training=training("175B").replace(mesh=mesh_for(175e9), recompute=True),
            rows=1600,
        ),
    },
    seeds={"smoke": 1, "laptop": 4, "paper": 1},
)
