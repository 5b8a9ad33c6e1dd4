"""LLaMA: Open and Efficient Foundation Language Models (Touvron et al., 2023).

arXiv:2302.13971.

Claim   For a wanted level of loss, the model that is cheapest to run is not the one that is cheapest to train: a
        smaller model, trained on far more tokens than a training budget alone would give it, reaches the loss of a
        larger one that was trained less, at a lower cost for every token it will ever produce; and it is still
        improving by then.
Here    Two models of the paper's architecture that differ in width and depth, on a small world whose own entropy is
        known exactly, so that the loss is told as the excess over what no model can go below. Treatment: the small
        model, trained long. Controls: the large model, trained on a sixth of the tokens, which costs less arithmetic;
        and the small model trained half as long, with a schedule of its own, for whether the second half still pays.
        Each size's learning rate is the best of three, tried with another seed. Generation speed is measured here.
Apart   0.09 and 0.4 million parameters instead of 7 to 65 billion, and a Markov text in place of 1.4 trillion tokens of
        the web. At a sixth of the tokens the large model is far from what more training would give it, which makes the
        comparison an easy one. That fewer and narrower layers generate faster is no finding; how much faster depends on
        the machine, here on the number of layers. Downstream benchmarks stay unshown.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allyouneed import core
from allyouneed.core.seeds import derive, generator, seed_everything
from allyouneed.data.batches import Generated
from allyouneed.data.packing import Batch
from allyouneed.data.worlds import Markov
from allyouneed.evaluate.laws import training_flops
from allyouneed.evaluate.perplexity import token_nll
from allyouneed.evaluate.statistics import median
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.models import llama
from allyouneed.models.decoder import Decoder
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.mesh import mesh_for
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine
from allyouneed.train.sharding import deferred

SMALL_LONG, SMALL_HALF, LARGE_SHORT = "small, trained long", "small, half as long", "large, trained short"


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The two models, how long each arm trains, and the margins of the verdict."""

    small: Decoder.Config
    large: Decoder.Config
    world: Markov.Config
    training: Training  # of the long arm; its learning rate is one of `rates`
    shorter: float  # the large model's share of its steps
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    rows: int = 32
    length: int = 96
    tested: int = 256  # rows held out
    generated: int = 128  # tokens, to measure speed
    timings: int = 15
    reaches: float = 0.0  # excess of large, short minus that of small, long: above
    dearer: float = 1.0  # training FLOPs, small, long over large, short: above
    faster: float = 1.2  # tokens a second, small over large: above
    improving: float = 0.0  # excess of small, half as long minus that of small, long: above


def run(config: Config, report: Report) -> None:
    """Choose the rates, train the three arms, and compare their excess loss, their cost and their speed."""
    world = config.world.build()
    short = _shortened(config.training, config.shorter)
    rates = {
        name: _best_rate(config, report, world, name, model, short)
        for name, model in (("small", config.small), ("large", config.large))
    }
    arms = {
        SMALL_LONG: (config.small, _with_rate(config.training, rates["small"])),
        SMALL_HALF: (config.small, _with_rate(_shortened(config.training, 0.5), rates["small"])),
        LARGE_SHORT: (config.large, _with_rate(short, rates["large"])),
    }

    def work(arm: tuple[Decoder.Config, Training], seed: int, folder: Path) -> dict[str, Any]:
        return _trained(config, world, *arm, seed, folder)

    found = report.repeat(arms, work)
    speeds = report.job("speed", lambda folder: _speeds(config))
    flops = {name: _record(config, report, name, *arm) for name, arm in arms.items()}
    medians = {name: round(statistics.median(row[name] for row in speeds), 2) for name in speeds[0]}
    report.table("tokens generated per second, one prompt at a time, in turn: medians", [medians])
    excess = {name: [one["excess"][-1] for one in values] for name, values in found.items()}
    report.check(
        f"excess loss, {LARGE_SHORT} minus {SMALL_LONG}",
        values=[a - b for a, b in zip(excess[LARGE_SHORT], excess[SMALL_LONG], strict=True)],
        above=config.reaches,
    )
    report.check(
        f"training FLOPs, {SMALL_LONG} over {LARGE_SHORT}", flops[SMALL_LONG] / flops[LARGE_SHORT], above=config.dearer
    )
    report.check(
        f"excess loss, {SMALL_HALF} minus {SMALL_LONG}",
        values=[a - b for a, b in zip(excess[SMALL_HALF], excess[SMALL_LONG], strict=True)],
        above=config.improving,
    )
    ratio = median([row["ratio"] for row in speeds])
    report.check(
        "tokens generated per second, small over large",
        ratio.estimate,
        interval=(ratio.low, ratio.high),
        method=f"95 % interval of the median of {len(speeds)} timings on one machine",
        above=config.faster,
    )
    _figure(report, found)


def _shortened(training: Training, share: float) -> Training:
    """The same training with fewer steps, its warm-up shortened alike."""
    steps, warmup = round(training.steps * share), round(training.schedule.warmup * share)
    return training.replace(steps=steps, schedule=training.schedule.replace(warmup=warmup))


def _with_rate(training: Training, lr: float) -> Training:
    return training.replace(optimizer=training.optimizer.replace(lr=lr))


def _best_rate(
    config: Config, report: Report, world: Markov, name: str, model: Decoder.Config, training: Training
) -> float:
    """The learning rate with the least loss after a short training, with a seed that no arm uses."""
    seed = len(report.seeds)
    losses = {}
    for lr in config.rates:
        found = report.job(
            f"rates/{name}-{lr:g}",
            lambda folder, lr=lr: _trained(config, world, model, _with_rate(training, lr), seed, folder),  # type: ignore[misc]
        )
        losses[lr] = found["excess"][-1]
    best = min(losses, key=losses.__getitem__)
    rows = [{"rate": f"{lr:g}", "excess loss": round(loss, 4), "chosen": lr == best} for lr, loss in losses.items()]
    report.table(f"learning rates tried for the {name} model", rows)
    return best


def _record(config: Config, report: Report, name: str, model: Decoder.Config, training: Training) -> float:
    """Put down what an arm had at its disposal; its training FLOPs, 6 · parameters · tokens (Kaplan et al. 2020)."""
    tokens, parameters = training.steps * config.rows * config.length, model.num_parameters()
    flops = training_flops(parameters, tokens)
    report.arm(
        name,
        parameters=parameters,
        tokens=tokens,
        tokens_per_parameter=round(tokens / parameters, 1),
        training_tflop=round(flops / 1e12, 3),
        learning_rate=training.optimizer.lr,
    )
    return flops


def _trained(
    config: Config, world: Markov, model: Decoder.Config, training: Training, seed: int, folder: Path
) -> dict[str, Any]:
    """The excess loss on held-out rows at every tenth of the training, in nats a token."""
    held_out = world.sample(config.tested, config.length, generator(derive(seed, "test"), "rows"))
    own = world.nll(held_out).mean().item()

    @torch.inference_mode()
    def evaluate(module: torch.nn.Module) -> dict[str, float]:
        total = 0.0
        for rows in held_out.split(64):
            total += token_nll(module(rows[:, :-1]).logits[:, 1:], rows[:, 2:]).sum().item()
        return {"excess": total / (held_out.shape[0] * (held_out.shape[1] - 2)) - own}

    def make(source: torch.Generator) -> Batch:
        rows = world.sample(config.rows, config.length + 1, source)
        return {"ids": rows[:, :-1], "targets": rows[:, 1:]}

    seed_everything(seed)
    done = train(
        deferred(model.build),
        next_token,
        Generated(make, seed=seed),
        training.replace(seed=seed, evaluate_every=max(1, training.steps // 10)),
        folder=folder,
        evaluate=evaluate,
        title="  train",
    )
    points = [row for row in done.history if "excess" in row]
    return {
        "tokens": [row["step"] * config.rows * config.length for row in points],
        "excess": [row["excess"] for row in points],
    }


def _speeds(config: Config) -> list[dict[str, float]]:
    """Tokens a second that each model generates, one prompt at a time, in turn; and their ratio each time.

    The first time is to warm up.
    """
    engines = {name: Engine(model.build().eval()) for name, model in (("small", config.small), ("large", config.large))}
    sampling = Sampling(max_new_tokens=config.generated, seed=0)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(1 + config.timings):
        for name, engine in engines.items():
            started = time.perf_counter()
            produced = sum(1 for _ in engine.steps([[0, 1, 2]], [sampling]))
            rates[name].append(produced / (time.perf_counter() - started))
    return [
        {"small": round(small, 1), "large": round(large, 1), "ratio": round(small / large, 3)}
        for small, large in zip(rates["small"][1:], rates["large"][1:], strict=True)
    ]


def _figure(report: Report, found: dict[str, list[dict[str, Any]]]) -> None:
    figure, (axes,) = figures.new()
    colors = {SMALL_LONG: figures.PALETTE[0], LARGE_SHORT: figures.PALETTE[1], SMALL_HALF: figures.CONTROL}
    for name, values in found.items():
        tokens, excess = values[0]["tokens"], [one["excess"] for one in values]
        report.curve(name, tokens, excess, x_label="training tokens", y_label="excess loss (nats per token)")
        figures.band(axes, tokens, excess, name, colors[name])
    axes.set_xscale("log")
    axes.set_yscale("log")
    figures.describe(
        axes,
        title="Small and long, or large and short",
        x="training tokens",
        y="loss beyond the world's own entropy (nats)",
    )
    figures.label_ends(axes)
    report.figure(figure, "Loss beyond the world's entropy along the training; band: lowest to highest seed.")


def _model(dim: int, num_layers: int, num_heads: int, vocab_size: int) -> Decoder.Config:
    return llama.architecture(
        vocab_size=vocab_size,
        context=192,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_dim=3 * dim,
        tied=True,
    )


def _training(steps: int) -> Training:
    """The paper's optimiser (sec. 2.3) with a rate for small models."""
    return Training(
        steps=steps, optimizer=AdamW.Config(lr=4e-3), schedule=Cosine(warmup=steps // 20), log_every=max(1, steps // 10)
    )


def _published(steps: int, lr: float) -> Training:
    """Sec. 2.3: AdamW (0.9, 0.95), decay 0.1, clipping 1, 2000 steps of warm-up, cosine to a tenth."""
    return Training(steps=steps, optimizer=AdamW.Config(lr=lr), schedule=Cosine(warmup=2000), precision="bf16")


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 9},
    sizes={
        "smoke": Config(
            small=_model(16, 1, 2, 16),
            large=_model(24, 2, 2, 16),
            world=Markov.Config(vocab_size=16),
            training=_training(20),
            shorter=0.2,
            rows=4,
            length=16,
            rates=(4e-3,),
            tested=8,
            generated=8,
            timings=6,
        ),
        "laptop": Config(
            small=_model(48, 3, 4, 32),
            large=_model(80, 5, 4, 32),
            world=Markov.Config(vocab_size=32),
            training=_training(1200),
            shorter=1 / 6,
        ),
        "paper": Config(
            small=llama.sized("7B"),
            large=llama.sized("13B"),
            world=Markov.Config(vocab_size=512),
            training=_published(250_000, 3e-4).replace(mesh=mesh_for(13e9)),
            shorter=1 / 6,
            rates=(3e-4,),
            rows=2048,
            length=2048,
        ),
    },
)
