"""RWKV: Reinventing RNNs for the Transformer Era (Peng et al., 2023).

arXiv:2305.13048.

Claim   A layer that keeps two decaying sums of what it read in place of all keys and values trains in parallel like
        attention, and yet runs as a recurrent net: what a model of such layers keeps of a text, and what one more token
        costs, stay within 2 % from 128 to 8,192 tokens of context, where a Transformer's grow; and with as many
        parameters and as much read, its loss is at most a little worse than the Transformer's.
Here    Two decoders of the same number of parameters: RWKV-4 (time mixing and channel mixing, `nn.rwkv`) and Pythia's
        block (attention with rotary positions, `models.gpt_neox`), which the paper measures itself by. Both generate
        through the same engine, whose cache holds keys and values of the one and states of the other. What is kept of a
        text is what PyTorch's allocator still has given out once the engine has read it. A token's time is the fastest
        of eight in a row, all lengths of both models in turn, again and again; growth is the ratio of the
        longest context to the shortest within a round, and its median over rounds is judged by its interval. Both learn
        English prose as bytes, at the rate that was better for either of two tried before.
        Beside the verdict, the weak point that the paper names (sec. 9): what a value read long ago is worth to a state
        of fixed size. Both learn to recall the values of keys, and are asked by how many pairs ago a key was last seen.
Apart   0.2 million parameters instead of 169 million to 14 billion, 0.3 MB of text instead of the Pile; no downstream
        tasks. In so short a training the Transformer is slow to begin, so that the comparison of losses is an easy one
        and its margin says only that RWKV does not fall behind; it says nothing about the paper's sizes. Times are of
        one row on one processor, whose caches hold weights of this size, so that attention's share of a token is larger
        than in a large model. Timings on a machine that is busy with something else have wide intervals: the check is
        then undecided, seldom wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from allyouneed import core
from allyouneed.core.seeds import derive, generator, seed_everything
from allyouneed.data.batches import Generated, Windows
from allyouneed.data.corpora import Document, corpus
from allyouneed.data.packing import Batch
from allyouneed.data.worlds import Recall
from allyouneed.evaluate.memory import kept_allocated
from allyouneed.evaluate.statistics import median
from allyouneed.evaluate.timing import in_turn
from allyouneed.models import gpt_neox, rwkv
from allyouneed.models.decoder import Decoder
from allyouneed.nn.initialise import Normal
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine

RWKV, TRANSFORMER = "RWKV", "Transformer"
PIECE = 4096  # tokens of a context read in one pass, which bounds the memory that reading a long one takes


@dataclass(frozen=True, kw_only=True)
class Arm(core.Config):
    """A model and how it learns to read prose, and to recall."""

    model: Decoder.Config
    prose: Training
    recall: Training


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """Both arms, what they read, the contexts that tokens are timed at, and the margins of the verdict."""

    rwkv: Arm
    transformer: Arm
    corpus: str = "python-reference"
    length: int = 256  # bytes of a row
    batch_tokens: int = 4096
    windows: int = 256  # of held-out text
    world: Recall.Config
    recall_tokens: int = 2048  # of a batch
    contexts: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    rounds: int = 61  # of timings
    flat: float = 0.02  # the most that RWKV's token and state grow from the shortest to the longest context
    grows: float = 0.25  # the least that the Transformer's do
    margin: float = 0.05  # nats per byte that RWKV may be worse by
    as_large: float = 0.01  # the most that the numbers of parameters may differ

    @property
    def arms(self) -> dict[str, Arm]:
        """Treatment and control."""
        return {RWKV: self.rwkv, TRANSFORMER: self.transformer}


def run(config: Config, report: Report) -> None:
    """Time tokens at every context, train both arms to read and to recall, and hold the numbers to the margins."""
    sizes = {name: arm.model.num_parameters() for name, arm in config.arms.items()}
    if abs(sizes[RWKV] / sizes[TRANSFORMER] - 1) > config.as_large:
        raise core.InputError(f"{sizes}: the arms are to have as many parameters, within {config.as_large:.0%}")
    if len(config.contexts) < 2 or list(config.contexts) != sorted(config.contexts):
        raise core.InputError(f"contexts={config.contexts}: at least two, rising, are wanted")
    for name, size in sizes.items():
        report.arm(name, parameters=size, tokens=config.arms[name].prose.steps * config.batch_tokens)
    _costs(config, report)
    text = corpus(config.corpus)
    training_bytes, held_out = _bytes(text.train), _windows(_bytes(text.valid), config)

    def work(arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
        return {
            "loss": _read(config, arm, training_bytes, held_out, seed, folder / "prose"),
            "recalled": _recall(config, arm, seed, folder / "recall"),
        }

    found = report.repeat(config.arms, work)
    losses = {name: [one["loss"] for one in values] for name, values in found.items()}
    differences = [r - t for r, t in zip(losses[RWKV], losses[TRANSFORMER], strict=True)]
    report.check("loss of RWKV minus the Transformer's (nats per byte)", values=differences, below=config.margin)
    rows = [{"model": name, "seed": s, "nats per byte": loss} for name in losses for s, loss in enumerate(losses[name])]
    report.table("loss on held-out prose", rows)
    _show_recall(config, report, {name: [one["recalled"] for one in values] for name, values in found.items()})


def _costs(config: Config, report: Report) -> None:
    """What a token costs at each context, and what the model keeps of the text."""
    found = report.job("costs", lambda folder: _measured(config))
    shortest, longest = config.contexts[0], config.contexts[-1]
    rows: list[dict[str, Any]] = []
    for name in config.arms:
        held, seconds = found[name]["bytes"], found[name]["seconds"]  # by context; by context and round
        bound: dict[str, Any] = {"below": config.flat} if name == RWKV else {"above": config.grows}
        report.check(f"{name}: growth of what is kept, {shortest} to {longest}", held[-1] / held[0] - 1, **bound)
        growth = median([last / first - 1 for first, last in zip(seconds[0], seconds[-1], strict=True)])
        report.check(
            f"{name}: growth of a token's time, {shortest} to {longest}",
            growth.estimate,
            interval=(growth.low, growth.high),
            method=f"95 % interval of the median of {config.rounds} rounds on one machine, in turn",
            **bound,
        )
        for context, size, at in zip(config.contexts, held, map(median, seconds), strict=True):
            times = {"ms": 1e3 * at.estimate, "least ms": 1e3 * at.low, "most ms": 1e3 * at.high}
            rows.append({"model": name, "context": context, "bytes kept": size} | times)
    report.table("one more token: median over rounds, and its interval", rows)
    _show_costs(config, report, rows)


def _show_costs(config: Config, report: Report, rows: Sequence[dict[str, Any]]) -> None:
    figure, (times, sizes) = figures.new(9.5, 4.0, columns=2)
    for axes, key, scale, unit in ((times, "ms", 1.0, "ms"), (sizes, "bytes kept", 1e-3, "kB")):
        for name in config.arms:
            values = [scale * row[key] for row in rows if row["model"] == name]
            report.curve(f"{name}: {key}", config.contexts, [values], x_label="context (tokens)", y_label=unit)
            figures.band(axes, config.contexts, [values], name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(config.contexts, list(map(str, config.contexts)), rotation=45)
        axes.set_yscale("log")
    figures.describe(times, title="Time of one more token", x="context (tokens)", y="ms")
    figures.describe(sizes, title="Kept of the text", x="context (tokens)", y="kB")
    for axes in (times, sizes):
        figures.label_ends(axes)
    report.figure(figure, "What one more token takes, and what is kept of those before it, at ever longer contexts.")


def _measured(config: Config) -> dict[str, Any]:
    """Of each arm the bytes kept at each context, and the seconds of a token by context and round."""
    places = [(name, context) for name in config.arms for context in config.contexts]
    readings = {place: _Reading(config.arms[place[0]].model, place[1]) for place in places}
    seconds = in_turn(readings, rounds=config.rounds)
    return {
        name: {
            "bytes": [readings[name, context].kept for context in config.contexts],
            "seconds": [seconds[name, context] for context in config.contexts],
        }
        for name in config.arms
    }


class _Reading:
    """A model that has read `context` tokens, for which `kept` bytes stay allocated; called, it reads one more and goes
    back.
    """

    def __init__(self, model: Decoder.Config, context: int) -> None:
        seed_everything(0)
        self.model = model.replace(context=context + 1).build().eval()
        self.context = context
        self.kept = kept_allocated(self._read)  # measured, not asked of the cache, which might keep more than it says
        self.cache.mark()

    @torch.inference_mode()
    def _read(self) -> None:
        ids = torch.randint(self.model.config.vocab_size, (1, self.context), generator=generator(0, "context"))
        self.cache = self.model.new_cache(1, self.context + 1)
        for piece in ids.split(PIECE, 1):
            self.model.hidden(piece, cache=self.cache)

    @torch.inference_mode()
    def __call__(self) -> None:
        self.model(torch.zeros(1, 1, dtype=torch.long), cache=self.cache)
        self.cache.rewind(self.context)


def _read(config: Config, arm: Arm, tokens: Tensor, held_out: Tensor, seed: int, folder: Path) -> float:
    """Learn to read prose; the loss on held-out windows in nats per byte."""
    batches = Windows(tokens, batch_size=config.batch_tokens // config.length, length=config.length, seed=seed)
    module = _trained(arm.model, batches, arm.prose, seed, folder)
    with torch.no_grad():
        nats = [
            F.cross_entropy(module(part[:, :-1]).logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
            for part in held_out.split(16)
        ]
    return sum(nats) / held_out[:, 1:].numel()


def _recall(config: Config, arm: Arm, seed: int, folder: Path) -> list[float]:
    """Learn to recall; the share of values given rightly by how many pairs ago their key was last seen."""
    world: Recall = config.world.build()
    rows = config.recall_tokens // (2 * world.pairs)

    def make(source: torch.Generator) -> Batch:
        ids, targets = world.sample(rows, source)
        return {"ids": ids, "targets": targets}

    model = arm.model.replace(vocab_size=world.vocab_size)
    module = _trained(model, Generated(make, seed=derive(seed, "recall")), arm.recall, seed, folder)
    ids, targets = world.sample(512, generator(seed, "recall", "held out"))
    with torch.no_grad():
        right = module(ids).logits.argmax(-1)[:, ::2] == targets[:, ::2]
    ago = _pairs_ago(ids[:, ::2])
    return [right[ago == distance].float().mean().item() for distance in _distances(world)]


def _distances(world: Recall) -> range:
    return range(1, min(world.pairs, 3 * world.symbols))


def _pairs_ago(keys: Tensor) -> Tensor:
    """How many pairs ago each key was last seen, 0 where it was not: (B, pairs) -> (B, pairs).

    >>> _pairs_ago(torch.tensor([[5, 6, 5, 5]])).tolist()
    [[0, 0, 2, 1]]
    """
    place = torch.arange(keys.shape[1])
    earlier = (keys[:, :, None] == keys[:, None, :]) & (place[:, None] > place)
    last = torch.where(earlier, place, -1).amax(2)
    return torch.where(last >= 0, place - last, 0)


def _trained(model: Decoder.Config, batches: Any, training: Training, seed: int, folder: Path) -> Decoder:
    seed_everything(seed)
    module: Decoder = model.build()
    train(module, next_token, batches, training.replace(seed=seed), folder=folder, title=f"  {folder.name}")
    return module.eval()


def _show_recall(config: Config, report: Report, found: dict[str, list[list[float]]]) -> None:
    distances = list(_distances(config.world.build()))
    figure, (axes,) = figures.new()
    for name, values in found.items():
        label = "pairs since the key was last seen"
        report.curve(f"{name}: recall", distances, values, x_label=label, y_label="share right")
        figures.band(axes, distances, values, name)
    figures.mark(axes, "chance", y=1 / config.world.symbols)
    figures.describe(axes, title="Recall at a distance", x="pairs since the key was last seen", y="share right")
    figures.label_ends(axes)
    caption = "Values recalled by how long ago their key was last seen (no check asks); band: lowest to highest seed."
    report.figure(figure, caption, name="recall")


def _windows(tokens: Tensor, config: Config) -> Tensor:
    """Evenly spread windows of a row's length, each with the byte after it: (windows, T + 1)."""
    starts = torch.linspace(0, len(tokens) - config.length - 1, config.windows).long()
    return tokens[starts[:, None] + torch.arange(config.length + 1)].long()


def _bytes(documents: Sequence[Document]) -> Tensor:
    text = "\n".join(document.text for document in documents)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _training(steps: int, lr: float) -> Training:
    return Training(
        steps=steps,
        optimizer=AdamW.Config(lr=lr),
        schedule=Cosine(warmup=steps // 20),
        log_every=max(1, steps // 20),
    )


def _arms(*, dim: int, num_layers: int, prose: int, recall: int) -> dict[str, Any]:
    """Time mixing has as many matrices as attention, channel mixing one more, which the Transformer has as width. Its
    weights begin as those of a narrow model should, not with the 0.02 of 768 dimensions.
    """
    size: dict[str, Any] = {"vocab_size": 256, "context": 256, "dim": dim, "num_layers": num_layers}
    transformer = gpt_neox.architecture(num_heads=4, hidden_dim=9 * dim // 2, **size)
    transformer = transformer.replace(initialise=Normal(std=dim**-0.5))
    training = {"prose": _training(prose, 1e-2), "recall": _training(recall, 4e-3)}
    return {
        "rwkv": Arm(model=rwkv.architecture(**size), **training),
        "transformer": Arm(model=transformer, **training),
    }


def _published() -> dict[str, Any]:
    """The paper's smallest model beside a Pythia with a little more width, so that both have as many parameters; the
    rate of app. G.
    """
    training = _training(81_000, 6e-4)
    recall = _training(10_000, 6e-4)
    control = gpt_neox.architecture(
        vocab_size=50277, context=1024, dim=768, num_layers=12, num_heads=12, hidden_dim=3456
    )
    return {
        "rwkv": Arm(model=rwkv.sized("169M"), prose=training, recall=recall),
        "transformer": Arm(model=control, prose=training, recall=recall),
    }


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.3, "laptop": 10},
    sizes={
        "smoke": Config(
            **_arms(dim=32, num_layers=1, prose=8, recall=8),
            length=32,
            batch_tokens=512,
            recall_tokens=512,
            windows=16,
            world=Recall.Config(symbols=4, pairs=16),
            contexts=(16, 32, 64),
            rounds=7,
        ),
        "laptop": Config(
            **_arms(dim=64, num_layers=3, prose=500, recall=600), world=Recall.Config(symbols=4, pairs=32)
        ),
        "paper": Config(
            **_published(),
            length=1024,
            batch_tokens=1024 * 1024,
            recall_tokens=64 * 1024,
            world=Recall.Config(symbols=64, pairs=512),
        ),
    },
)
