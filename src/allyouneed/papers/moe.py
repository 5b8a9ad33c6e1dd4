"""Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer (Shazeer et al., 2017).

arXiv:1701.06538.

Claim   With the operations a token costs held fixed, a language model grows better with the number of its experts, of
        which each token passes the same few: 32 have a lower loss than 8, and 8 a lower one than a dense network of
        equal operations. That needs the importance and the load loss: without them the router comes to prefer some
        experts (the coefficient of variation of their importance is above 0.5), with them it does not (below 0.25).
Here    The paper's model: LSTM, mixture of experts behind a sigmoid, LSTM, each with a residual connection; noisy top-k
        gating. Only what stands between the LSTMs changes: a dense network, or 8 or 32 experts of which k = 2 are
        passed. At this size a router of 32 experts, its noise included, costs as much as the experts that a token
        passes; so the dense network and each of the 8 experts are widened until the layer takes as many FLOPs a token,
        as trained, as with 32. Text in 16 languages, each a table of word pairs of its own, named by the first token of
        a row, so that what a model lacks is room for the tables; the world's own loss of the same rows is subtracted. A
        second pair of arms reads English prose as bytes, beside the verdict.
Apart   Thousands of parameters instead of billions, k = 2 instead of 4, three seeds instead of one. The hierarchy is
        built and tested, but adds nothing at 32 experts. That experts take no more time is not shown: on one processor
        they do. In evaluation there is no noise, and the sparse arms take fewer operations than the dense one. The text
        is made to need capacity; of prose, as little as is read here, it may not be so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from allyouneed import core
from allyouneed.core.seeds import generator, seed_everything
from allyouneed.data.batches import Generated, Windows
from allyouneed.data.corpora import Document, corpus
from allyouneed.data.tongues import Tongues
from allyouneed.models.recurrent import RecurrentModel
from allyouneed.nn.ffn import MLP
from allyouneed.nn.flops import Reading, width_for
from allyouneed.nn.moe import Experts, MoE, active_parameters
from allyouneed.nn.noisy_routers import NoisyTopK
from allyouneed.nn.recurrent import LSTM
from allyouneed.nn.sandwich import Sandwich
from allyouneed.objectives.balanced import balanced, statistics, tallied
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Batches, Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The world, the model, its training and the margins of the verdict: losses in nats a token."""

    training: Training
    world: Tongues.Config = field(default_factory=lambda: Tongues.Config(languages=16, words=24, spread=3.0))
    prose: str = "python-reference"
    dim: int = 32
    hidden_dim: int = 16  # of one of many experts; the others are widened to as many operations
    k: int = 2
    experts: tuple[int, int] = (8, 32)
    weight: float = 0.1  # of importance and load loss (app. C.1)
    rows: int = 128  # a batch
    length: int = 16
    tested: int = 1024  # rows
    gain: float = 0.01  # few experts over the dense network, many over few
    collapsed: float = 0.5  # CV of importance without the losses, at least
    balanced: float = 0.25  # with them, at most
    as_costly: float = 0.01  # the most that FLOPs a token may differ


@dataclass(frozen=True)
class Arm:
    """What stands between the LSTMs, and on which text."""

    experts: int  # 0: a dense network
    hidden_dim: int  # of an expert or of the dense network
    weight: float = 0.0
    prose: bool = False


class _Text(Protocol):
    """Batches to learn from, rows to be tested on, and the least loss that these can have."""

    def batches(self, seed: int) -> Batches: ...

    tested: dict[str, Tensor]
    floor: float
    vocab_size: int


def run(config: Config, report: Report) -> None:
    """Train every arm with each seed and hold losses and balance against the margins."""
    few, many = config.experts
    arms = arms_of(config)
    texts: dict[bool, Callable[[], Any]] = {False: lambda: _World(config), True: lambda: _Prose(config)}

    def work(arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
        return _measured(config, arm, texts[arm.prose](), seed, folder)

    found = report.repeat(arms, work)
    for name, arm in arms.items():
        _, model = model_of(config, arm, 256 if arm.prose else config.world.vocab_size)
        sizes = {"parameters": sum(p.numel() for p in model.parameters()), "active": active_parameters(model)}
        report.arm(name, **sizes, flops_per_token_between=flops(config, arm))
    loss = {name: [value["loss"] for value in values] for name, values in found.items()}
    steps = ("dense", f"{few} experts", f"{many} experts")
    for more, fewer in zip(steps[1:], steps, strict=False):
        gains = [a - b for a, b in zip(loss[fewer], loss[more], strict=True)]
        report.check(f"loss of {fewer} minus {more}", values=gains, above=config.gain)
    for name, bound in ((f"{many} experts, no balance losses", "above"), (f"{many} experts", "below")):
        limit: Any = {bound: config.collapsed if bound == "above" else config.balanced}
        report.check(f"CV of importance, {name}", values=[v["importance_cv"] for v in found[name]], **limit)
    _record(config, report, found)


def arms_of(config: Config) -> dict[str, Arm]:
    """All arms, of as many FLOPs a token between the LSTMs as many experts take.

    Raises:
        InputError: no whole width comes so near, or the numbers of experts do not rise from k on.
    """
    few, many = config.experts
    if not config.k <= few < many:
        raise core.InputError(f"experts={config.experts}: two rising numbers from k={config.k} on are wanted")
    sparse = Arm(many, config.hidden_dim)
    most = flops(config, sparse)

    def widened(experts: int) -> Arm:
        return Arm(experts, width_for(lambda width: flops(config, Arm(experts, width)), most))

    arms = {
        "dense": widened(0),
        f"{few} experts": replace(widened(few), weight=config.weight),
        f"{many} experts": replace(sparse, weight=config.weight),
        f"{many} experts, no balance losses": sparse,
        "prose, dense": replace(widened(0), prose=True),
        f"prose, {many} experts": replace(sparse, weight=config.weight, prose=True),
    }
    costs = {name: flops(config, arm) for name, arm in arms.items()}
    if max(costs.values()) > (1 + config.as_costly) * min(costs.values()):
        raise core.InputError(f"FLOPs a token {costs}: the arms are to have as many, within {config.as_costly:.0%}")
    return arms


def flops(config: Config, arm: Arm) -> int:
    """What a token costs between the LSTMs, forward and as trained: router, noise and all."""
    with torch.device("meta"):
        return int(_between(config, arm).build(config.dim).flops(Reading(tokens=1)))


def _record(config: Config, report: Report, found: dict[str, list[dict[str, Any]]]) -> None:
    few, many = config.experts
    columns = ("loss", "importance_cv", "load_cv", "busiest")
    means = {name: {c: sum(v[c] for v in values) / len(values) for c in columns} for name, values in found.items()}
    report.table("means over seeds", [{"arm": name} | row for name, row in means.items()])
    figure, (left, right) = figures.new(9.5, 3.8, columns=2)
    named = ["dense", f"{few} experts", f"{many} experts", f"{many} experts, no balance losses"]
    losses = [[v["loss"] for v in found[name]] for name in named]
    labels = [name.replace(", no", ",\nno") for name in named]
    figures.bars(left, labels, [sum(x) / len(x) for x in losses], [(min(x), max(x)) for x in losses])
    figures.describe(left, title="Equal operations a token", x="loss beyond the world's own (nats)")
    for name in named[2:]:
        shares = [v["shares"] for v in found[name]]
        x = list(range(1, many + 1))
        report.curve(name, x, shares, x_label="expert, by its share", y_label="share of choices")
        figures.band(
            right, x, shares, "with" if name == named[2] else "without", style="-" if name == named[2] else "--"
        )
    figures.mark(right, "even", y=1 / many)
    figures.describe(right, title="Balance losses", x="expert, the busiest first", y="share of all choices")
    figures.label_ends(right)
    report.figure(figure, "Left: loss, lowest to highest seed. Right: how choices fall to experts, with and without.")
    gain = means["prose, dense"]["loss"] - means[f"prose, {many} experts"]["loss"]
    report.note(
        f"On prose the same experts win {gain:+.3f} nats a byte over the dense network, of which no check asks."
    )


def _measured(config: Config, arm: Arm, text: _Text, seed: int, folder: Path) -> dict[str, Any]:
    seed_everything(seed)
    objective, module = model_of(config, arm, text.vocab_size)
    train(module, objective, text.batches(seed), config.training.replace(seed=seed), folder=folder, title="  train")
    module.eval()
    with torch.no_grad(), tallied(module) as tallies:
        loss = next_token(module, text.tested).mean.item() - text.floor
    if not tallies:
        return {"loss": loss, "importance_cv": 0.0, "load_cv": 0.0, "busiest": 1.0, "shares": [1.0]}
    shares = (tallies[0].counts / tallies[0].counts.sum()).sort(descending=True).values.tolist()
    return {"loss": loss, "shares": shares} | {name: value.item() for name, value in statistics(tallies).items()}


def model_of(config: Config, arm: Arm, vocab_size: int) -> tuple[Any, RecurrentModel]:
    """The arm's objective and a new model of it."""
    objective = balanced(next_token, importance=arm.weight, load=arm.weight) if arm.experts else next_token
    layers = Sandwich.Config(cell=LSTM.Config(), between=_between(config, arm))
    return objective, RecurrentModel.Config(vocab_size=vocab_size, dim=config.dim, layers=layers).build()


def _between(config: Config, arm: Arm) -> MoE.Config | MLP.Config:
    if not arm.experts:
        return MLP.Config(hidden_dim=arm.hidden_dim, activation="relu", bias=False)
    bank = Experts.Config(num_experts=arm.experts, hidden_dim=arm.hidden_dim)
    return MoE.Config(router=NoisyTopK.Config(k=config.k), experts=bank)


class _World:
    def __init__(self, config: Config) -> None:
        self.config, self.world, self.vocab_size = config, config.world.build(), config.world.vocab_size
        self.tested = self.world.batch(config.tested, config.length, generator(0, "tested"))
        whole = torch.cat((self.tested["ids"], self.tested["targets"][:, -1:]), 1)
        self.floor = self.world.nll(whole).mean().item()

    def batches(self, seed: int) -> Batches:
        rows, length = self.config.rows, self.config.length
        return Generated(lambda source: self.world.batch(rows, length, source), seed=seed)


class _Prose:
    vocab_size, floor = 256, 0.0

    def __init__(self, config: Config) -> None:
        self.config, text = config, corpus(config.prose)
        self.train, valid = _bytes(text.train), _bytes(text.valid)
        self.tested = next(Windows(valid, batch_size=config.tested, length=config.length, seed=0))

    def batches(self, seed: int) -> Batches:
        return Windows(self.train, batch_size=self.config.rows, length=self.config.length, seed=seed)


def _bytes(documents: Any) -> Tensor:
    parts: list[Document] = list(documents)
    return torch.frombuffer(bytearray("\n".join(part.text for part in parts).encode()), dtype=torch.uint8)


def _training(steps: int, lr: float) -> Training:
    schedule = Cosine(warmup=steps // 20)
    return Training(steps=steps, optimizer=AdamW.Config(lr=lr), schedule=schedule, log_every=max(1, steps // 10))


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 13},
    sizes={
        "smoke": Config(training=_training(8, 2e-2), dim=16, experts=(4, 8), rows=16, length=8, tested=32),
        "laptop": Config(training=_training(400, 2e-2)),
        # app. C.1: MoE-32 and MoE-256 of four experts a token beside MoE-1-Wide
        "paper": Config(
            training=_training(100_000, 1e-3),
            world=Tongues.Config(languages=256, words=500, spread=3.0),
            dim=512,
            hidden_dim=1024,
            k=4,
            experts=(32, 256),
            rows=1024,
            length=64,
        ),
    },
)
