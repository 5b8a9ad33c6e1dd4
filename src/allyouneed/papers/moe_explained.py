"""Mixture of Experts Explained (Sanseviero et al., 2023).

https://huggingface.co/blog/moe.

Claim   A sparse model has a lower loss than a dense one of the same operations a token, whether a token passes one
        expert (Switch) or two smaller ones (Mixtral); but a dense model that takes the same memory is better
        still, as it uses all of it for every token. An expert's capacity decides how many tokens are dropped: at a
        factor of 1 some are though the balance loss is on, at 2 hardly any (below 2 %). The router z-loss keeps the
        router's logits small: (log Σ exp)² falls below half.
Here    One small LLaMA on text in 16 languages, each a table of word pairs of its own, named by the first token of a
        row. Only the channel part changes: a dense network; eight experts behind a router of Switch with capacity
        factors 1, 1.25 and 2 and with the z-loss; a dense network eight times as wide as one of these; and sixteen
        smaller experts behind Mixtral's router. The last take the most operations, router included: all but the wide
        network are widened until the channel part takes as many FLOPs a token. The switch loss is weighed 0.01, the
        z-loss 0.001. The world's own loss of the same rows is subtracted.
Apart   Thousands of parameters, two layers, three seeds. Tokens a second are reported, not judged: eight small products
        take longer here than one, and a GPU or eight of them would say something else. Nothing is shown of fine-tuning,
        where sparse models are said to overfit, nor of experts spread over machines, which tests do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from allyouneed import core
from allyouneed.core.seeds import generator, seed_everything
from allyouneed.data.batches import Generated
from allyouneed.data.tongues import Tongues
from allyouneed.models import llama, mixtral
from allyouneed.models.decoder import Decoder
from allyouneed.nn.capacity import Factor
from allyouneed.nn.ffn import GatedMLP
from allyouneed.nn.flops import Reading, width_for
from allyouneed.nn.moe import GatedExperts, MoE, active_parameters
from allyouneed.nn.routers import Top1, TopK
from allyouneed.objectives.balanced import balanced, tallied
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine

Channel = GatedMLP.Config | MoE.Config


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The world, the model, its training and the margins of the verdict: losses in nats a token."""

    model: Decoder.Config  # with a network of two of Mixtral's experts' width; the others are widened
    training: Training
    world: Tongues.Config = field(default_factory=lambda: Tongues.Config(languages=16, words=24, spread=3.0))
    num_experts: int = 8
    factors: tuple[float, float, float] = (1.0, 1.25, 2.0)  # of capacity; the second is Switch's own arm
    switch: float = 0.01  # weight of the balance loss (Fedus et al. 2021, sec. 2.2)
    z: float = 0.001  # weight of the z-loss (Zoph et al. 2022, sec. 3.3)
    rows: int = 128  # a batch
    length: int = 16
    tested: int = 1024  # rows
    gain: float = 0.01  # of sparse over dense at equal operations, and of dense over sparse at equal memory
    most_dropped: float = 0.02  # at the largest factor
    smaller: float = 0.5  # (log Σ exp)² with the z-loss, of that without
    as_costly: float = 0.01  # the most that FLOPs a token may differ where they are to be equal


@dataclass(frozen=True)
class Arm:
    """A channel part and the weights of its losses."""

    channel: Channel
    weights: dict[str, float] = field(default_factory=dict)


def run(config: Config, report: Report) -> None:
    """Train every arm with each seed and hold losses, drops and logits against the margins."""
    if sorted(config.factors) != list(config.factors):
        raise core.InputError(f"factors={config.factors}: rising capacity factors are wanted")
    arms = arms_of(config)
    found = report.repeat(arms, lambda arm, seed, folder: _measured(config, arm, seed, folder))
    for name, arm in arms.items():
        model = _with(config.model, arm.channel)
        module, per_token = model.build(), model.flops(1, config.length) // config.length
        sizes = {"parameters": sum(p.numel() for p in module.parameters()), "active": active_parameters(module)}
        report.arm(name, **sizes, flops_per_token=per_token)
    values = {name: {key: [v[key] for v in runs] for key in runs[0]} for name, runs in found.items()}
    loss = {name: of["loss"] for name, of in values.items()}
    for name in ("switch", "mixtral"):
        report.check(
            f"loss of dense minus {name}, equal operations", values=_less(loss["dense"], loss[name]), above=config.gain
        )
    wide = _less(loss["switch"], loss["dense, equal memory"])
    report.check("loss of switch minus dense, equal memory", values=wide, above=config.gain)
    names = [_at(config, factor) for factor in config.factors]
    fewer = _less(values[names[0]]["dropped"], values[names[1]]["dropped"])
    report.check(f"dropped at {config.factors[0]:g} minus at {config.factors[1]:g}", values=fewer, above=0.0)
    report.check(f"dropped at {config.factors[2]:g}", values=values[names[2]]["dropped"], below=config.most_dropped)
    squares = zip(values["switch, z-loss"]["squares"], values["switch"]["squares"], strict=True)
    report.check(
        "(log sum exp)² with z-loss over that without", values=[a / b for a, b in squares], below=config.smaller
    )
    _record(config, report, values)


def _less(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _at(config: Config, factor: float) -> str:
    return "switch" if factor == config.factors[1] else f"switch, factor {factor:g}"


def arms_of(config: Config) -> dict[str, Arm]:
    """All arms, of as many FLOPs a token as Mixtral's but for the dense network of equal memory.

    Raises:
        InputError: no whole width comes so near.
    """
    given: Any = config.model.blocks[0].channel
    E, weights = config.num_experts, {"switch": config.switch}
    halves = GatedExperts.Config(num_experts=2 * E, hidden_dim=given.hidden_dim // 2)
    mixtral = MoE.Config(router=TopK.Config(k=2), experts=halves)
    dense = given.replace(hidden_dim=_width(config, mixtral, lambda width: given.replace(hidden_dim=width)))
    width = _width(config, mixtral, lambda width: _switch(E, width, config.factors[1]))
    switch = {_at(config, factor): Arm(_switch(E, width, factor), weights) for factor in config.factors}
    return {
        "dense": Arm(dense),
        "dense, equal memory": Arm(given.replace(hidden_dim=E * width)),
        **switch,
        "switch, z-loss": Arm(switch["switch"].channel, {**weights, "z": config.z}),
        "mixtral": Arm(mixtral, weights),
    }


def _switch(num_experts: int, hidden_dim: int, factor: float) -> MoE.Config:
    bank = GatedExperts.Config(num_experts=num_experts, hidden_dim=hidden_dim)
    return MoE.Config(router=Top1.Config(capacity=Factor(factor=factor)), experts=bank)


def _width(config: Config, costly: Channel, channel: Callable[[int], Channel]) -> int:
    """That at which a channel part takes as many operations as the `costly` one."""
    most = flops(config, costly)
    width = width_for(lambda width: flops(config, channel(width)), most)
    found = flops(config, channel(width))
    if abs(found / most - 1) > config.as_costly:
        raise core.InputError(
            f"FLOPs a token {found} and {most}: the arms are to have as many, within {config.as_costly:.0%}"
        )
    return width


def flops(config: Config, channel: Channel) -> int:
    """What a token costs in one channel part, forward: router and all."""
    with torch.device("meta"):
        return int(channel.build(config.model.dim).flops(Reading(tokens=1)))


def _with(model: Decoder.Config, channel: Channel) -> Decoder.Config:
    return model.replace(blocks=(model.blocks[0].replace(channel=channel),))


def _measured(config: Config, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
    """What one model loses beyond the world, drops at the end of training, and how large its router's logits are."""
    seed_everything(seed)
    world, module = config.world.build(), _with(config.model, arm.channel).build()
    objective = balanced(next_token, **arm.weights) if arm.weights else next_token
    batches = Generated(lambda source: world.batch(config.rows, config.length, source), seed=seed)
    began = time.perf_counter()
    trained = train(module, objective, batches, config.training.replace(seed=seed), folder=folder, title="  train")
    speed = trained.seen / (time.perf_counter() - began)
    tested = world.batch(config.tested, config.length, generator(0, "tested"))
    floor = world.nll(torch.cat((tested["ids"], tested["targets"][:, -1:]), 1)).mean().item()
    with torch.no_grad(), tallied(module.eval()) as tallies:
        loss = next_token(module, tested).mean.item() - floor
    squares = sum((t.squares / t.tokens).item() for t in tallies) / max(len(tallies), 1)
    last = trained.history[-1]
    busiest = {"dropped": float(last.get("dropped", 0.0)), "busiest": float(last.get("busiest", 1.0))}
    return {"loss": loss, "squares": squares, "tokens a second": speed} | busiest


def _record(config: Config, report: Report, values: dict[str, dict[str, list[float]]]) -> None:
    means = {name: {key: sum(v) / len(v) for key, v in of.items()} for name, of in values.items()}
    report.table("means over seeds", [{"arm": name} | row for name, row in means.items()])
    figure, (left, right) = figures.new(9.5, 3.8, columns=2)
    named = ["dense", "switch", "mixtral", "dense, equal memory"]
    losses = [values[name]["loss"] for name in named]
    labels = ["dense", "Switch", "Mixtral", "dense, as\nmuch memory"]
    figures.bars(left, labels, [sum(x) / len(x) for x in losses], [(min(x), max(x)) for x in losses])
    figures.describe(left, title="Equal operations; equal memory", x="loss beyond the world's own (nats)")
    seeds = range(len(losses[0]))
    dropped = [[values[_at(config, factor)]["dropped"][seed] for factor in config.factors] for seed in seeds]
    report.curve("dropped", config.factors, dropped, x_label="capacity factor", y_label="share of choices dropped")
    figures.band(right, config.factors, dropped, "dropped")
    right.set_ylim(bottom=0.0)
    figures.mark(right, "the most that the claim allows at the last", y=config.most_dropped)
    figures.describe(right, title="Capacity and dropping", x="capacity factor", y="share of choices dropped")
    report.figure(figure, "Left: loss, lowest to highest seed. Right: choices dropped at the end of training.")


def _small(dim: int, num_layers: int, hidden_dim: int, world: Tongues.Config) -> Decoder.Config:
    return llama.architecture(
        vocab_size=world.vocab_size,
        context=64,
        dim=dim,
        num_layers=num_layers,
        num_heads=2,
        hidden_dim=hidden_dim,
        tied=False,
    )


def _training(steps: int, lr: float) -> Training:
    schedule = Cosine(warmup=steps // 20)
    return Training(steps=steps, optimizer=AdamW.Config(lr=lr), schedule=schedule, log_every=max(1, steps // 10))


SMALL, LARGE = Tongues.Config(languages=16, words=24, spread=3.0), Tongues.Config(languages=256, words=500, spread=3.0)
MIXTRAL = mixtral.sized("8x7B")

PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 8},
    sizes={
        "smoke": Config(
            model=_small(16, 1, 8, SMALL), training=_training(8, 1e-2), num_experts=5, rows=16, length=8, tested=32
        ),
        "laptop": Config(model=_small(32, 2, 16, SMALL), training=_training(400, 1e-2)),
        "paper": Config(
            model=_small(MIXTRAL.dim, MIXTRAL.num_layers, 14336, LARGE).replace(context=MIXTRAL.context),
            training=_training(100_000, 3e-4),
            world=LARGE,
            rows=1024,
            length=512,
        ),
    },
)
