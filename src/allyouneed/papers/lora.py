"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021).

arXiv:2106.09685.

Claim   A trained model is adapted to a task by products BA of very low rank beside its frozen matrices of queries and
        values as well as by training all of its weights, rank 1 or 8 doing what rank 64 does, with less than a
        hundredth of the weights trained; merged into the weights they cost nothing. The directions that rank 8 and rank
        64 find share the most important one, the others hardly.
Here    SmolLM2 learns to file sentences about purchases as lines of a form that it has never seen (`data.forms`); the
        same examples, batches and steps for ranks 1, 8 and 64 and for all weights, and once for 2 and 4. Judged by the
        loss of held-out lines, in nats a token, and by how many lines are right from the first token to the last, which
        is what greedy decoding would write. α is the same for all ranks, as in the paper; full fine-tuning has a rate
        of its own, chosen as the adapters' one was, by single runs with another seed and on other held-out lines than
        those that judge here. What is shared beyond the most important direction is told as the mean of the next seven.
Apart   135 million parameters instead of 125 million to 175 billion, one task of form instead of GLUE, WikiSQL and
        SAMSum, a minute of training. So few steps leave A near the random matrix it begins as, so directions are those
        of the change BA and not of A; and more steps might part the ranks. Memory is counted (weights, gradients and
        moments) and not that of a GPU. A first run of three seeds left one check undecided (whether rank 1 gets as many
        lines right as rank 64: 0.06 more, interval -0.07 to 0.20, bound -0.05); the seeds became six, the rules stayed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from allyouneed import core
from allyouneed.adapt import lora
from allyouneed.adapt.layers import Lora, LoraLinear
from allyouneed.core.seeds import derive, seed_everything
from allyouneed.data import forms
from allyouneed.data.batches import Epochs
from allyouneed.data.instructions import piece
from allyouneed.data.packing import IGNORED, pad_right
from allyouneed.data.tokenizers import Tokenizer, byte_tokenizer
from allyouneed.evaluate.subspaces import directions, overlaps
from allyouneed.evaluate.timing import in_turn
from allyouneed.models import llama
from allyouneed.models.checkpoints.loading import load_decoder, load_tokenizer
from allyouneed.models.decoder import Decoder
from allyouneed.objectives.likelihood import token_logprobs
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Linear

FULL, LOW, HIGH, LEAST = "all weights", 8, 64, 1
DIRECTIONS, EVERY = 8, 5  # of every so many blocks


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The model, the examples, the training, and the margins of the verdict."""

    model: str | None = "smollm2-135m-instruct"  # None: a small random one, to try the machinery
    ranks: tuple[int, ...] = (LEAST, 2, 4, LOW, HIGH)
    alpha: float = 16.0
    training: Training
    full_rate: float  # of training all weights
    examples: int = 240
    held: int = 48
    batch: int = 8
    not_worse: float = 0.05  # nats a token that rank 1 or 8 may lose against rank 64, and 8 against all weights
    not_fewer: float = 0.05  # share of right lines that rank 1 may lose against rank 64
    learned: float = 0.5  # nats a token that the adapted model gains on the one it was
    right: float = 0.25  # share of lines that rank 1 has right at least
    trained: float = 0.01  # share of the weights that rank 8 trains: below
    shared: float = 0.5  # φ(1, 1) of rank 8 and 64 (sec. 7.2)
    unshared: float = 0.25  # what the directions after the first share on average: below
    exact: float = 1e-4  # logits of the merged model, the largest difference over the largest logit


def run(config: Config, report: Report) -> None:
    """Adapt with each rank and train all weights, with each seed, and hold the differences against the margins."""
    if not {LEAST, LOW, HIGH} <= set(config.ranks):
        raise core.InputError(f"ranks={config.ranks}: {LEAST}, {LOW} and {HIGH} are compared, and belong among them")
    world = _World(config)

    def work(rank: int | None, seed: int, folder: Path) -> dict[str, Any]:
        return world.adapted(rank, seed + 1)  # 0 was the seed that chose the rates

    arms = {f"r = {rank}": rank for rank in config.ranks} | {FULL: None}
    compared = {name: rank for name, rank in arms.items() if rank in (LEAST, LOW, HIGH, None)}
    found = report.repeat(compared, work)
    others = report.repeat({name: rank for name, rank in arms.items() if name not in compared}, work, report.seeds[:1])
    found = {name: (found | others)[name] for name in arms}
    before = report.job("before", lambda folder: world.judged(world.base))
    merging = report.job("merging", lambda folder: world.merged())
    shared = [_shared(one, other) for one, other in zip(found[f"r = {LOW}"], found[f"r = {HIGH}"], strict=True)]
    _record(config, report, found, before, merging)
    _check(config, report, found, before, merging, shared)
    _figure(config, report, found, before, shared)


class _World:
    """The model as it was, and examples to learn from and to judge by."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.base, tokenizer = _loaded(config)
        held = forms.drawn(config.held, seed=-2)  # those of −1 chose the rates
        self.held = [piece(tokenizer, one) for one in held]
        self.tokenizer, self.avoided = tokenizer, frozenset(str(one.prompt) for one in held)

    def adapted(self, rank: int | None, seed: int) -> dict[str, Any]:
        """What a model that learned with one seed is worth, and what it took."""
        config, module = self.config, copy.deepcopy(self.base)
        training = config.training.replace(seed=seed)
        if rank is None:
            training = training.replace(optimizer=training.optimizer.replace(lr=config.full_rate))
        else:
            lora.adapt(module, Lora.Config(rank=rank, alpha=config.alpha), seed=derive(seed, "rank", rank))
        seed_everything(seed)
        learned = [piece(self.tokenizer, one) for one in forms.drawn(config.examples, seed=seed, without=self.avoided)]
        batches = Epochs(learned, batch_size=config.batch, collate=pad_right, seed=seed)
        trained = train(module, next_token, batches, training, title="  train")
        counted = {"trained": sum(p.numel() for p in module.parameters() if p.requires_grad)}
        counted |= {"all": sum(p.numel() for p in module.parameters())}
        losses = [row["loss"] for row in trained.history]
        found = self.judged(module.eval()) | counted | {"losses": losses, "seconds": trained.seconds / trained.step}
        return found | {"directions": _directions(module) if rank in (LOW, HIGH) else []}

    @torch.inference_mode()
    def judged(self, module: Decoder) -> dict[str, float]:
        """Loss of the held-out lines, in nats a token, and the share that is right as a whole."""
        nll, tokens, right = 0.0, 0, 0
        for start in range(0, len(self.held), 16):
            batch = pad_right(self.held[start : start + 16])
            counted = batch["targets"] != IGNORED
            logits = module.head(module.hidden(batch["ids"], batch["segments"])[counted])
            nll -= token_logprobs(logits[None], batch["targets"][counted][None]).sum().item()
            wrong = torch.zeros_like(batch["ids"], dtype=torch.bool)
            wrong[counted] = logits.argmax(-1) != batch["targets"][counted]
            tokens, right = tokens + int(counted.sum()), right + int((~wrong.any(1)).sum())
        return {"loss": nll / tokens, "right": right / len(self.held)}

    @torch.inference_mode()
    def merged(self) -> dict[str, float]:
        """How far logits move when an adapter of random matrices is merged, and what reading takes before and after."""
        module = copy.deepcopy(self.base)
        lora.adapt(module, Lora.Config(rank=LOW, alpha=self.config.alpha))
        draw = torch.Generator().manual_seed(0)
        for p in lora.parameters(module).values():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.02)
        ids = pad_right(self.held[:4])["ids"]
        beside = module(ids).logits
        apart = copy.deepcopy(module)
        lora.merge(module)
        lora.unload(module)
        moved = (module(ids).logits - beside).abs().max() / beside.abs().max()
        models = {"base": self.base, "beside": apart, "merged": module}
        cases = {name: partial(one, ids) for name, one in models.items()}
        times = in_turn(cases, rounds=5, repeats=2, warm_up=1)
        return {"moved": moved.item()} | {name: min(seconds) for name, seconds in times.items()}


def _loaded(config: Config) -> tuple[Decoder, Tokenizer]:
    if config.model is not None:
        return load_decoder(config.model), load_tokenizer(config.model)
    seed_everything(0)
    tokenizer = byte_tokenizer()
    small = llama.architecture(
        vocab_size=tokenizer.vocab_size, context=256, dim=64, num_layers=2, num_heads=2, hidden_dim=96
    )
    return small.build().eval(), tokenizer


def _directions(module: Decoder) -> list[Any]:
    """The first directions of the change of some adapted layers, the largest first: (layers, directions, K)."""
    layers = [part for block in module.blocks[::EVERY] for part in block.modules() if isinstance(part, LoraLinear)]
    pairs: list[Any] = [layer.adapters[lora.DEFAULT] for layer in layers]
    return [directions(pair.B.detach(), pair.A.detach(), DIRECTIONS).tolist() for pair in pairs]


def _shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[list[float]]:
    """φ(i, j), the mean over layers."""
    pairs = zip(one["directions"], other["directions"], strict=True)
    found = [overlaps(*(torch.tensor(side, dtype=torch.double) for side in pair)) for pair in pairs]
    mean: list[list[float]] = torch.stack(found).mean(0).tolist()
    return mean


def _beyond(shared: Sequence[Sequence[float]]) -> float:
    """What the directions after the first share, a direction: (n·φ(n, n) − φ(1, 1)) / (n − 1), from 0 to about 1."""
    n = len(shared)
    return (n * shared[-1][-1] - shared[0][0]) / (n - 1)


def _check(
    config: Config,
    report: Report,
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    before: Mapping[str, float],
    merging: Mapping[str, float],
    shared: Sequence[Sequence[Sequence[float]]],
) -> None:
    def differences(one: str, other: str, key: str) -> list[float]:
        return [a[key] - b[key] for a, b in zip(found[one], found[other], strict=True)]

    low, high, least = (f"r = {rank}" for rank in (LOW, HIGH, LEAST))
    gains = [before["loss"] - one["loss"] for one in found[low]]
    report.check(f"loss before minus {low}", values=gains, above=config.learned)
    report.check(f"loss, {low} minus {high}", values=differences(low, high, "loss"), below=config.not_worse)
    report.check(f"loss, {least} minus {high}", values=differences(least, high, "loss"), below=config.not_worse)
    report.check(f"loss, {low} minus {FULL}", values=differences(low, FULL, "loss"), below=config.not_worse)
    fewer = differences(least, high, "right")
    report.check(f"right lines, {least} minus {high}", values=fewer, above=-config.not_fewer)
    report.check(f"right lines, {least}", values=[one["right"] for one in found[least]], above=config.right)
    share = max(one["trained"] / one["all"] for one in found[low])
    report.check(f"share of the weights that {low} trains", share, below=config.trained)
    report.check(f"φ(1, 1) of {low} and {high}", values=[one[0][0] for one in shared], above=config.shared)
    report.check(
        f"shared by the directions of {low} after the first, a direction",
        values=[_beyond(one) for one in shared],
        below=config.unshared,
    )
    report.check("logits moved by merging, relative", merging["moved"], below=config.exact)


def _record(
    config: Config,
    report: Report,
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    before: Mapping[str, float],
    merging: Mapping[str, float],
) -> None:
    rows = []
    for name, values in found.items():
        trained, every = values[0]["trained"], values[0]["all"]
        report.arm(name, parameters=every, trained=trained, tokens=None)
        rows.append(
            {
                "arm": name,
                "trained": trained,
                "share": trained / every,
                "MB to train (weights, gradients, moments)": (4 * every + 12 * trained) / 1e6,
                "s a step": min(value["seconds"] for value in values),
                "loss": sum(value["loss"] for value in values) / len(values),
                "right lines": sum(value["right"] for value in values) / len(values),
            }
        )
        steps = [config.training.log_every * (i + 1) for i in range(len(values[0]["losses"]))]
        lines = [value["losses"] for value in values]
        report.curve(name, steps, lines, x_label="step", y_label="training loss (nats per token)")
    report.table("What each arm trains, takes and learns", rows)
    ratios = {f"{name}, time over the base's": merging[name] / merging["base"] for name in ("beside", "merged")}
    report.table("Reading four lines, fastest of ten", [{"before": before["loss"], "right": before["right"]} | ratios])


def _figure(
    config: Config,
    report: Report,
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    before: Mapping[str, float],
    shared: Sequence[Sequence[Sequence[float]]],
) -> None:
    figure, (left, right) = figures.new(9.0, 4.0, columns=2)
    means = [[sum(one["loss"] for one in found[f"r = {rank}"]) / len(found[f"r = {rank}"]) for rank in config.ranks]]
    figures.band(left, config.ranks, means, "LoRA")
    for rank in config.ranks:
        each = [one["loss"] for one in found[f"r = {rank}"]]
        left.plot([rank] * len(each), each, "o", color=figures.PALETTE[0], markersize=4)
    left.set_xscale("log", base=2)
    left.set_xticks(config.ranks, list(map(str, config.ranks)))
    every = [value["loss"] for value in found[FULL]]
    figures.mark(left, f"{FULL} trained", y=sum(every) / len(every))
    figures.describe(left, title="Loss by rank", x="rank of queries' and values' adapters", y="held-out loss (nats)")
    names = [str(i + 1) for i in range(DIRECTIONS)]
    figures.grid(right, torch.tensor(shared).mean(0).numpy(), names, names)
    figures.describe(right, title=f"φ(i, j) of r = {LOW} and r = {HIGH}", x=f"j, of r = {HIGH}", y=f"i, of r = {LOW}")
    caption = "Left: a point a seed, and their mean. Right: shared directions, mean over layers and seeds."
    report.figure(figure, caption)


def _training(steps: int, lr: float, *, warmup: int | None = None, weight_decay: float = 0.0) -> Training:
    optimizer = AdamW.Config(lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    schedule = Linear(warmup=max(1, steps // 10) if warmup is None else warmup)
    return Training(steps=steps, optimizer=optimizer, schedule=schedule, log_every=max(1, steps // 15))


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="real weights",
    minutes={"smoke": 0.1, "laptop": 32},
    seeds={"smoke": 1, "laptop": 6, "paper": 1},
    sizes={
        "smoke": Config(
            model=None,
            ranks=(LEAST, LOW, HIGH),
            training=_training(4, 1e-3),
            full_rate=1e-3,
            examples=16,
            held=16,
            batch=4,
            trained=0.05,  # the small model has few weights beside
        ),
        "laptop": Config(training=_training(60, 5e-3), full_rate=1e-4, examples=240, batch=4),
        "paper": Config(  # GPT-2 medium as of table 11, five epochs of the 42 thousand examples of E2E
            model="openai-community/gpt2-medium",
            alpha=32.0,
            training=_training(26_000, 2e-4, warmup=500, weight_decay=0.01),
            full_rate=2e-5,
            examples=42_000,
            held=4000,
            batch=8,
        ),
    },
)
