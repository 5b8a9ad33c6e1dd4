"""Layer Normalization (Ba, Kiros & Hinton, 2016).

arXiv:1607.06450.

Claim   Normalising a layer's summed inputs over the units of each single example makes training faster where batch
        norm is hard to apply: an LSTM with layer norm reaches a given loss in markedly fewer steps than one without,
        and no later than one with batch norm. It learns at batch size 1, where batch norm is impossible or falls
        behind. Which changes of weights and data leave outputs as they were differs from norm to norm, as table 1 says.
Here    One LSTM and one Transformer read the same bytes of English prose with the same budget. Only the `norm` part
        changes: layer, root mean square, batch, none. In the LSTM it stands where the paper's supplement has it. Each
        arm trains at the best of several learning rates, chosen in short trials with a seed of their own. Recurrent
        batch norm begins with a gain of 0.1 (Cooijmans et al. 2017) and is read in the better of two ways, with running
        statistics or with those of the tested batch. Two arms are compared at the lowest loss that both reach. The 18
        cells of table 1 are computed in float64.
Apart   Some 0.2 million parameters and 0.4 MB of text instead of the paper's six tasks; the Transformer, which came a
        year later, is not the paper's. Batch norm's running averages are one for all time steps. In the Transformer its
        rows are the tokens of the batch, so in training it sees a little of the future, which testing takes away. The
        runs at batch size 1 have more steps and fewer bytes than the others; they were made longer, and their check
        divided in two, after a trial in which batch norm had not yet fallen behind. How long a step takes is not
        compared: written in Python, an LSTM's norms cost what kernels would not. Where training ends is not shown.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator, seed_everything
from allyouneed.data.batches import Windows
from allyouneed.data.corpora import corpus
from allyouneed.evaluate.perplexity import unigram_nll
from allyouneed.models import gpt2
from allyouneed.models.decoder import Decoder
from allyouneed.models.recurrent import RecurrentModel
from allyouneed.nn.norms import BatchNorm, LayerNorm, NoNorm, Norm, RMSNorm, weight_normalised
from allyouneed.nn.recurrent import LSTM, Recurrent
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine

NORMS: dict[str, Norm] = {
    "layer norm": LayerNorm.Config(),
    "RMS norm": RMSNorm.Config(),
    "batch norm": BatchNorm.Config(),
    "no norm": NoNorm.Config(),
}
COLORS = dict(zip(NORMS, (*figures.PALETTE[:3], figures.CONTROL), strict=True))
RECURRENT_BATCH_NORM = BatchNorm.Config(gain=0.1)

# table 1: what leaves the output as it was
INVARIANT = {
    "batch norm": ("weight matrix scaled", "weight vector scaled", "data scaled", "data shifted"),
    "weight norm": ("weight matrix scaled", "weight vector scaled"),
    "layer norm": ("weight matrix scaled", "weight matrix shifted", "data scaled", "one case scaled"),
}


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """Two models, their training, and the margins of the verdict."""

    lstm: RecurrentModel.Config
    transformer: Decoder.Config
    training: Training
    corpus: str = "python-reference"
    length: int = 64
    rows: int = 32
    single_steps: int = 1000  # of the runs at batch size 1
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    trial: float = 0.25  # of the steps, to choose a rate
    tested: int = 64  # windows
    asked: int = 15  # times during a training
    sooner: float = 0.8  # steps of layer norm over those of no norm, in the LSTM
    not_later: float = 1.0  # the same over batch norm's
    behind: float = 0.10  # nats per byte that batch norm is behind layer norm at batch size 1, in the Transformer
    learns: float = 0.30  # nats per byte below the loss of byte frequencies, of an LSTM at batch size 1
    degrades: float = 0.0  # what of this the full batch does not show


@dataclass(frozen=True)
class Arm:
    """One model with one norm at one batch size."""

    model: RecurrentModel.Config | Decoder.Config
    rows: int
    steps: int


def run(config: Config, report: Report) -> None:
    """Compute table 1, choose rates, train every arm, and hold the ratios and differences against the margins."""
    _table_1(report)
    arms = _arms(config)
    text = corpus(config.corpus)
    train_bytes, valid_bytes = (
        torch.frombuffer(bytearray("\n".join(d.text for d in part).encode()), dtype=torch.uint8)
        for part in (text.train, text.valid)
    )

    def trained(arm: Arm, lr: float, seed: int, folder: Path) -> dict[str, list[float]]:
        return held_out_losses(config, arm, lr, (train_bytes, valid_bytes), seed, folder)

    rates = {name: _best_rate(config, report, name, arm, trained) for name, arm in arms.items()}
    found = report.repeat(
        {name: (arm, rates[name]) for name, arm in arms.items()},
        lambda chosen, seed, folder: trained(*chosen, seed, folder),
    )
    for name, arm in arms.items():
        report.arm(
            name,
            parameters=arm.model.num_parameters(),
            tokens=arm.steps * arm.rows * config.length,
            learning_rate=rates[name],
        )
    _judge(config, report, found, unigram_nll(train_bytes, valid_bytes, vocab_size=256))
    _figure(report, found)


def _judge(config: Config, report: Report, found: dict[str, list[dict[str, list[float]]]], frequencies: float) -> None:
    rows = []
    for kind in ("LSTM", "Transformer"):
        for norm in list(NORMS)[1:]:
            pairs = zip(found[f"{kind}, layer norm"], found[f"{kind}, {norm}"], strict=True)
            shares = [steps_ratio(layer, other) for layer, other in pairs]
            rows.append({"model": kind, "layer norm against": norm, "steps": round(sum(shares) / len(shares), 3)})
            if kind == "LSTM" and norm != "RMS norm":
                below = config.sooner if norm == "no norm" else config.not_later
                report.check(f"LSTM: steps of layer norm over those of {norm}", values=shares, below=below)
    report.table("steps of layer norm over those of another norm, to the lowest loss that both reach", rows)
    behind = {
        size: [
            min(b["loss"]) - min(a["loss"])
            for a, b in zip(
                found[f"Transformer, layer norm{size}"], found[f"Transformer, batch norm{size}"], strict=True
            )
        ]
        for size in ("", ", batch 1")
    }
    single, full = behind[", batch 1"], behind[""]
    report.check("Transformer, batch 1: loss of batch norm minus layer norm", values=single, above=config.behind)
    report.check(
        "Transformer: the same minus what it is at the full batch",
        values=[a - b for a, b in zip(single, full, strict=True)],
        above=config.degrades,
    )
    report.check(
        "LSTM, layer norm, batch 1: loss minus that of byte frequencies",
        values=[min(v["loss"]) - frequencies for v in found["LSTM, layer norm, batch 1"]],
        below=-config.learns,
    )
    report.table(
        "least loss on held-out text (nats per byte), mean of seeds",
        [{"arm": name, "loss": round(sum(min(v["loss"]) for v in vs) / len(vs), 3)} for name, vs in found.items()],
    )
    report.note(f"LSTM with batch norm at batch size 1: impossible ({_refusal(config)}).")


def steps_ratio(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> float:
    """Our steps over theirs, to the lowest loss that both reach; between two measurements losses fall evenly.

    >>> steps_ratio({"steps": [10, 20, 30], "loss": [5, 3, 1]}, {"steps": [10, 20, 40], "loss": [5, 4, 3]})
    0.5
    """
    level = max(min(ours["loss"]), min(theirs["loss"]))
    return _steps_to(level, ours) / _steps_to(level, theirs)


def _steps_to(level: float, curve: dict[str, list[float]]) -> float:
    steps, losses = curve["steps"], curve["loss"]
    at = next(i for i, loss in enumerate(losses) if loss <= level)
    if at == 0:
        return steps[0]
    share = (losses[at - 1] - level) / (losses[at - 1] - losses[at])
    return steps[at - 1] + share * (steps[at] - steps[at - 1])


def _arms(config: Config) -> dict[str, Arm]:
    full = {}
    for name, norm in NORMS.items():
        full[f"LSTM, {name}"] = Arm(_lstm_with(config.lstm, norm), config.rows, config.training.steps)
    for name, norm in NORMS.items():
        model = _transformer_with(config.transformer, norm)
        full[f"Transformer, {name}"] = Arm(model, config.rows, config.training.steps)
    possible = ("LSTM, layer norm", "Transformer, layer norm", "Transformer, batch norm")
    return full | {f"{name}, batch 1": Arm(full[name].model, 1, config.single_steps) for name in possible}


def _lstm_with(model: RecurrentModel.Config, norm: Norm) -> RecurrentModel.Config:
    norm = RECURRENT_BATCH_NORM if isinstance(norm, BatchNorm.Config) else norm
    return model.replace(layers=model.layers.replace(cell=model.layers.cell.replace(norm=norm)))


def _transformer_with(model: Decoder.Config, norm: Norm) -> Decoder.Config:
    return model.replace(blocks=tuple(block.replace(norm=norm) for block in model.blocks), norm=norm)


def _best_rate(
    config: Config,
    report: Report,
    name: str,
    arm: Arm,
    trained: Callable[[Arm, float, int, Path], dict[str, list[float]]],
) -> float:
    """The rate with the least loss after a short training, with a seed that no arm uses."""
    if len(config.rates) == 1:
        return config.rates[0]
    short = Arm(arm.model, arm.rows, max(1, int(config.trial * arm.steps)))
    losses = {}
    for lr in config.rates:
        key = f"rates/{name.replace(', ', '-').replace(' ', '-')}-{lr:g}"
        found = report.job(key, lambda folder, lr=lr: trained(short, lr, len(report.seeds), folder))  # type: ignore[misc]
        losses[lr] = min(found["loss"])
    return min(losses, key=losses.__getitem__)


def held_out_losses(
    config: Config, arm: Arm, lr: float, text: tuple[Tensor, Tensor], seed: int, folder: Path
) -> dict[str, list[float]]:
    """The loss on held-out windows along the training; all along the uniform guess's, if it ceased to be finite."""
    tokens, held_out = text
    starts = torch.linspace(0, len(held_out) - config.length - 1, config.tested).long()
    windows = held_out[starts[:, None] + torch.arange(config.length + 1)].long()

    def evaluate(module: nn.Module) -> dict[str, float]:
        loss = _loss(module, windows)
        if isinstance(module, RecurrentModel) and any(isinstance(part, BatchNorm) for part in module.modules()):
            # not of the Transformer, where a batch's statistics are of later tokens too
            loss = min(loss, _loss(copy.deepcopy(module).train(), windows))
        return {"held out": loss}

    seed_everything(seed)
    every = max(1, arm.steps // config.asked)
    training = config.training.replace(
        steps=arm.steps,
        seed=seed,
        optimizer=config.training.optimizer.replace(lr=lr),
        evaluate_every=every,
    )
    batches = Windows(tokens, batch_size=arm.rows, length=config.length, seed=seed)
    try:
        done = train(
            arm.model.build(), next_token, batches, training, folder=folder, evaluate=evaluate, title="  train"
        )
    except InputError as error:
        if "the loss is" not in str(error):
            raise
        steps = sorted({*range(every, arm.steps, every), arm.steps})
        return {"steps": steps, "loss": [math.log(arm.model.vocab_size)] * len(steps)}
    points = [row for row in done.history if "held out" in row]
    return {"steps": [row["step"] for row in points], "loss": [row["held out"] for row in points]}


def _loss(module: nn.Module, windows: Tensor) -> float:
    """Nats per byte."""
    return next_token(module, {"ids": windows[:, :-1], "targets": windows[:, 1:]}).mean.item()


def _refusal(config: Config) -> str:
    """What batch norm says to a step of one row."""
    module = _lstm_with(config.lstm, BatchNorm.Config()).build()
    try:
        module(torch.zeros(1, config.length, dtype=torch.long))
    except InputError as error:
        return str(error)
    raise AssertionError("batch norm of one row has no variance")


TINY = 1e-12  # added to variances; 1e-5 would break, at 1e-6, what is exact in the equations, and torch forbids 0

METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "batch norm": lambda w, x, gain: gain * BatchNorm.Config(eps=TINY).build(len(w)).double()(x @ w.T),
    "weight norm": lambda w, x, gain: x @ weight_normalised(w, gain).T,
    "layer norm": lambda w, x, gain: gain * LayerNorm.Config(eps=TINY).build(len(w)).double()(x @ w.T),
}
CHANGES: dict[str, Callable[[Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor]]] = {
    "weight matrix scaled": lambda w, x, factor, shift: (factor * w, x),
    "weight matrix shifted": lambda w, x, factor, shift: (w + shift, x),  # the same vector to every row
    "weight vector scaled": lambda w, x, factor, shift: (torch.cat((factor * w[:1], w[1:])), x),
    "data scaled": lambda w, x, factor, shift: (w, factor * x),
    "data shifted": lambda w, x, factor, shift: (w, x + shift),
    "one case scaled": lambda w, x, factor, shift: (w, torch.cat((factor * x[:1], x[1:]))),
}


@torch.no_grad()
def difference(method: str, change: str, seed: int) -> float:
    """How far the outputs of a layer of 6 units on 8 cases of 5 numbers move at most, in float64 (sec. 5.1)."""
    draw = generator(seed, "table 1")
    w, x, shift = (torch.randn(*shape, generator=draw, dtype=torch.double) for shape in ((6, 5), (8, 5), (5,)))
    gain, factor = torch.randn(6, generator=draw, dtype=torch.double), 2.0 + 2.0 * torch.rand((), generator=draw).item()
    changed = CHANGES[change](w, x, factor, shift)
    return (METHODS[method](*changed, gain) - METHODS[method](w, x, gain)).abs().max().item()


def _table_1(report: Report) -> None:
    rows: list[dict[str, Any]] = []
    as_printed = 0
    for method, kept in INVARIANT.items():
        moves = {change: [difference(method, change, seed) for seed in report.seeds] for change in CHANGES}
        as_printed += sum(max(m) <= 1e-6 if change in kept else min(m) > 1e-3 for change, m in moves.items())
        rows.append(
            {"": method} | {change: "invariant" if max(m) <= 1e-6 else f"{min(m):.2g}" for change, m in moves.items()}
        )
    report.table("table 1: how far outputs move at least (invariant: at most 1e-6)", rows)
    cells = len(INVARIANT) * len(CHANGES)
    report.check(f"cells of table 1 that come out as printed, of {cells}", float(as_printed), above=cells - 0.5)


def _figure(report: Report, found: dict[str, list[dict[str, list[float]]]]) -> None:
    figure, axes = figures.new(10.5, 4.2, columns=2)
    for axis, kind in zip(axes, ("LSTM", "Transformer"), strict=True):
        for norm, color in COLORS.items():
            for size, style in (("", "-"), (", batch 1", ":")):
                name = f"{kind}, {norm}{size}"
                if name not in found:
                    continue
                steps, losses = found[name][0]["steps"], [one["loss"] for one in found[name]]
                report.curve(name, steps, losses, x_label="step", y_label="loss (nats per byte)")
                figures.band(axis, steps, losses, f"{norm}{size}", color, style=style)
        axis.set_ylim(top=min(axis.get_ylim()[1], 6.0))  # the uniform guess is 5.5; what is far worse is cut off
        figures.describe(axis, title=kind, x="step", y="loss on held-out text (nats per byte)")
        figures.label_ends(axis)
    report.figure(figure, "Loss on held-out text by training step, each norm at its best rate; band: all seeds.")


def _lstm(dim: int) -> RecurrentModel.Config:
    return RecurrentModel.Config(vocab_size=256, dim=dim, layers=Recurrent.Config(cell=LSTM.Config()))


def _transformer(dim: int, num_layers: int) -> Decoder.Config:
    return gpt2.architecture(vocab_size=256, context=128, dim=dim, num_layers=num_layers, num_heads=4)


def _training(steps: int) -> Training:
    return Training(steps=steps, schedule=Cosine(warmup=steps // 20), log_every=steps)


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 10},
    sizes={
        "smoke": Config(
            lstm=_lstm(16),
            transformer=_transformer(16, 1),
            training=_training(6),
            length=8,
            rows=4,
            single_steps=6,
            rates=(3e-3,),
            tested=8,
            asked=3,
        ),
        "laptop": Config(lstm=_lstm(128), transformer=_transformer(64, 3), training=_training(250)),
        # the handwriting model's 3 layers of 400 (sec. 6.5), on text; gpt2's smallest beside it
        "paper": Config(
            lstm=RecurrentModel.Config(
                vocab_size=256, dim=400, layers=Recurrent.Config(cell=LSTM.Config(), num_layers=3)
            ),
            transformer=gpt2.architecture(vocab_size=256, context=1024, dim=768, num_layers=12, num_heads=12),
            training=Training(steps=50_000, optimizer=AdamW.Config(), schedule=Cosine(warmup=500)),
            corpus="shakespeare",
            length=700,
            rows=128,
            single_steps=100_000,
            rates=(1e-4, 3e-4, 1e-3),
        ),
    },
)
