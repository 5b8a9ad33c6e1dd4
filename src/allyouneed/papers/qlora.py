"""QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al., 2023).

arXiv:2305.14314.

Claim   Weights stored as 4-bit NormalFloat in blocks of 64, the scales in 8 bits, take 4.127 bits each. A model stored
        so predicts text better than one stored as FP4 or as 4-bit integers; storing the scales in 8 bits costs nothing;
        and LoRA over the frozen 4-bit model learns what LoRA over the unquantised one learns.
Here    Only how the linear layers are stored changes (`adapt.quantise`): float32, NF4 with and without double
        quantisation, bitsandbytes' FP4, Int4 (symmetric, absolute maxima), and 8-bit integers for comparison; blocks of
        64 throughout. Three grounds: numbers drawn from a normal distribution, whose expected error has a closed form;
        decoders trained here on English prose, which were never rounded before, judged on held-out prose and then, with
        the same LoRA on every base, on Python code; and SmolLM2, judged on prose, tuned on code.
Apart   0.4 and 135 million parameters instead of 125 million to 65 billion; float32 stands for 16 bits. SmolLM2 is at
        hand only in a 4-bit format of its own (GGUF's Q4_1: a grid of 16 steps to each 32 weights), so its arms are
        about rounding a second time, to other grids: they show what is lost from there on and not what NF4 does to
        weights as they were trained, nor are the scales of such weights those of normal numbers. The small decoders
        stand in for that, whose weights are nearer to normal than those of large models with outliers. Perplexity only:
        nothing of instruction tuning, Guanaco or its judges. In the paper's table 2 FP4 is better than Int4; of normal
        numbers in blocks of 64 the closed form has it the other way round, and the tables here say where it stands.
        The paged optimizer is a matter of memory and tested elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from allyouneed import core
from allyouneed.adapt.layers import Lora
from allyouneed.adapt.lora import adapt
from allyouneed.adapt.quantise import Quantise, quantise
from allyouneed.core.seeds import generator, seed_everything
from allyouneed.data.batches import Windows
from allyouneed.data.corpora import Document, corpus
from allyouneed.evaluate.perplexity import last_tokens_nll
from allyouneed.evaluate.rounding import gaussian_error
from allyouneed.models import llama
from allyouneed.models.checkpoints.loading import load_decoder, load_tokenizer
from allyouneed.models.decoder import Decoder
from allyouneed.nn.blockwise import blockwise
from allyouneed.nn.codebooks import BOOKS
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Constant, Cosine

BASE, NF4, FP4, INT4 = "float32", "NF4 + DQ", "FP4 + DQ", "Int4 + DQ"
PLAIN = "NF4"
ARMS: dict[str, Quantise.Config | None] = {
    BASE: None,
    "Int8 + DQ": Quantise.Config(kind="int8"),
    PLAIN: Quantise.Config(kind="nf4", double=False),
    NF4: Quantise.Config(kind="nf4"),
    FP4: Quantise.Config(kind="fp4"),
    INT4: Quantise.Config(kind="int4"),
}
TUNED = (BASE, NF4, FP4, INT4)
# The paper's other two small floats, for the closed form alone: signs, exponents and mantissas over their largest.
FLOATS = {
    "E2M1": torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6,
    "E3M0": torch.tensor([0, *(2.0**-e for e in range(7))]),
}


@dataclass(frozen=True, kw_only=True)
class Ground(core.Config):
    """A model to be stored and tuned: what it is judged on and how it is tuned."""

    length: int  # tokens of a window, in training and in judgement
    windows: int  # that it is judged by
    rows: int  # of a batch
    tuning: Training
    tuned: tuple[str, ...] = TUNED
    lora: Lora.Config = Lora.Config(rank=8, targets="all-linear")  # noqa: RUF009 (frozen)


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The grounds and the margins of the verdict, in nats a token."""

    numbers: int = 1 << 20  # drawn from N(0, 1) with each seed
    model: Decoder.Config
    training: Training
    small: Ground
    real: Ground | None  # None: without SmolLM2
    checkpoint: str = "smollm2-135m-instruct"
    prose: str = "python-reference"
    code: str = "python-code"
    bits: float = 4.13  # at most, of a number in NF4 with double quantisation
    not_worse: float = 0.01  # double quantisation against scales in float32; of tuned models, NF4 against float32
    learns: float = 0.05  # what tuning gains at least, else it shows nothing
    agrees: float = 0.01  # relative, of errors drawn and in closed form


def run(config: Config, report: Report) -> None:
    """Store in every way what was drawn, trained and found, tune the latter two, and compare."""
    _numbers(config, report)
    found = report.repeat({"small decoder": config.small}, lambda ground, *job: _small(config, ground, *job))
    if config.real is not None:
        found |= report.repeat({"SmolLM2": config.real}, lambda ground, seed, _: _real(config, ground, seed))
    figure, panels = figures.new(5.5 * len(found), 4.2, columns=len(found))
    for axes, (name, losses) in zip(panels, found.items(), strict=True):
        _judge(config, report, name, losses)
        _draw(axes, name, losses)
    caption = "What storing the linear layers costs on held-out prose. Bars: mean; lines: lowest to highest seed."
    report.figure(figure, caption)


def _numbers(config: Config, report: Report) -> None:
    """Errors of normal numbers, drawn and in closed form; bits of one."""
    kinds = {name: arm for name, arm in ARMS.items() if arm is not None}
    found = report.repeat(kinds, lambda arm, seed, _: _drawn(config.numbers, arm, seed))
    expected = {name: gaussian_error(BOOKS[arm.kind].values, arm.block) for name, arm in kinds.items()}
    rows = [
        {
            "stored as": name,
            "squared error": f"{sum(e for e, _ in found[name]) / len(found[name]):.5f}",
            "closed form": f"{expected[name]:.5f}",
            "bits a number": f"{found[name][0][1]:.3f}",
        }
        for name in kinds
    ]
    for name, half in FLOATS.items():
        error = gaussian_error(torch.cat((-half, half)), 64)
        rows.append({"stored as": name, "squared error": "", "closed form": f"{error:.5f}", "bits a number": ""})
    report.table("Numbers of N(0, 1) in blocks of 64", rows)
    report.check("bits of a number in NF4 + DQ", found[NF4][0][1], below=config.bits)
    apart = [error / expected[PLAIN] - 1 for error, _ in found[PLAIN]]
    report.check("error of NF4 over its closed form, less 1", values=apart, above=-config.agrees, below=config.agrees)
    for name in (FP4, INT4):
        ratios = [a / b for (a, _), (b, _) in zip(found[NF4], found[name], strict=True)]
        report.check(f"error of normal numbers, NF4 over {name}", values=ratios, below=1.0)


def _drawn(count: int, arm: Quantise.Config, seed: int) -> list[float]:
    """The mean squared error of numbers from N(0, 1) as stored, and the bits of one."""
    x = torch.randn(count, generator=generator(seed, "numbers"))
    blocks = blockwise(x, arm.kind, arm.block, double=arm.double)
    return [(blocks.dequantised() - x).double().square().mean().item(), blocks.nbytes * 8 / count]


def _small(config: Config, ground: Ground, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Train a decoder on prose; its losses as stored in each way, and once each was tuned on code."""
    prose, code = corpus(config.prose), corpus(config.code)
    seed_everything(seed)
    base = config.model.build()
    batches = Windows(_bytes(prose.train), batch_size=ground.rows, length=ground.length, seed=seed)
    train(base, next_token, batches, config.training.replace(seed=seed), folder=folder, title="  train")
    texts = _bytes(prose.valid), _bytes(code.train), _bytes(code.valid)
    return _losses(ground, lambda: copy.deepcopy(base), texts, seed)


def _real(config: Config, ground: Ground, seed: int) -> dict[str, dict[str, float]]:
    """The same of SmolLM2, each seed with other windows; its float32 weights are those of its file's blocks."""
    tokenizer = load_tokenizer(config.checkpoint)

    def ids(documents: Sequence[Document]) -> Tensor:
        some = "\n".join(document.text for document in documents)[: 1 << 18]
        return torch.tensor(tokenizer.encode(some))

    prose, code = corpus(config.prose), corpus(config.code)
    texts = ids(prose.valid), ids(code.train), ids(code.valid)
    return _losses(ground, lambda: load_decoder(config.checkpoint, packed=True), texts, seed)


def _losses(
    ground: Ground, make: Callable[[], Decoder], texts: tuple[Tensor, Tensor, Tensor], seed: int
) -> dict[str, dict[str, float]]:
    """Of each arm the loss on prose as it is stored, and that on code after tuning, before it too."""
    prose, learned, code = texts
    judged, tested = (_windows(text, ground, seed) for text in (prose, code))
    found: dict[str, dict[str, float]] = {}
    for name, arm in ARMS.items():
        module = make()
        if arm is not None:
            quantise(module, arm)
        found[name] = {"prose": _loss(module.eval(), judged)}
        if name in ground.tuned:
            found[name]["code"] = _loss(module, tested)
            _tune(ground, module, learned, seed)
            found[name]["tuned"] = _loss(module.eval(), tested)
    return found


def _tune(ground: Ground, module: nn.Module, text: Tensor, seed: int) -> None:
    """LoRA over a frozen base, with the same first adapters, batches and steps whatever the base is stored in."""
    adapt(module, ground.lora, seed=seed)
    batches = Windows(text, batch_size=ground.rows, length=ground.length, seed=seed)
    train(module, next_token, batches, ground.tuning.replace(seed=seed), title="  tune")


def _loss(module: Decoder, windows: Tensor) -> float:
    context = windows.shape[1] - 1
    with torch.inference_mode():
        return last_tokens_nll(module, windows, context=context, last=context, batch=8).mean().item()


def _windows(text: Tensor, ground: Ground, seed: int) -> Tensor:
    """Windows and the token after each, at random places: (windows, T + 1)."""
    places = torch.randint(len(text) - ground.length, (ground.windows,), generator=generator(seed, "windows"))
    return text[places[:, None] + torch.arange(ground.length + 1)].long()


def _judge(config: Config, report: Report, ground: str, found: Sequence[dict[str, dict[str, float]]]) -> None:
    """The table and the checks of one ground; every difference is between arms of one seed."""

    def differences(what: str, a: str, b: str) -> list[float]:
        return [losses[a][what] - losses[b][what] for losses in found]

    def mean(what: str, name: str) -> str:
        values = [losses[name][what] for losses in found if what in losses[name]]
        return f"{sum(values) / len(values):.4f}" if values else ""

    rows = [
        {
            "stored as": name,
            "prose": mean("prose", name),
            "code": mean("code", name),
            "code, tuned": mean("tuned", name),
        }
        for name in ARMS
    ]
    report.table(f"Loss of the {ground}, nats a token", rows)
    for name in (FP4, INT4):
        report.check(f"{ground}: {name} minus NF4 + DQ", values=differences("prose", name, NF4), above=0.0)
    report.check(f"{ground}: DQ minus none", values=differences("prose", NF4, PLAIN), below=config.not_worse)
    tuned = differences("tuned", NF4, BASE)
    report.check(f"{ground}, tuned: NF4 + DQ minus float32", values=tuned, below=config.not_worse)
    gains = [losses[NF4]["code"] - losses[NF4]["tuned"] for losses in found]
    report.check(f"{ground}: what tuning gains over NF4 + DQ", values=gains, above=config.learns)


def _draw(axes: Axes, title: str, found: Sequence[dict[str, dict[str, float]]]) -> None:
    """What each way of storing costs on prose."""
    names = [name for name in ARMS if name != BASE]
    costs = [[losses[name]["prose"] - losses[BASE]["prose"] for losses in found] for name in names]
    means = [sum(values) / len(values) for values in costs]
    figures.bars(axes, names, means, [(min(values), max(values)) for values in costs])
    figures.describe(axes, title=title, x="loss beyond float32 (nats a token)")


def _bytes(documents: Sequence[Document]) -> Tensor:
    text = "\n".join(document.text for document in documents)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _decoder(dim: int, num_layers: int) -> Decoder.Config:
    return llama.architecture(
        vocab_size=256, context=256, dim=dim, num_layers=num_layers, num_heads=4, hidden_dim=3 * dim, tied=True
    )


def _training(steps: int, lr: float) -> Training:
    schedule = Cosine(warmup=max(1, steps // 20))
    return Training(steps=steps, optimizer=AdamW.Config(lr=lr), schedule=schedule, log_every=max(1, steps // 20))


def _tuning(steps: int, lr: float) -> Training:
    """A constant rate after some warm-up, gradients of at most 0.3, no decay (app. B.2)."""
    optimizer = AdamW.Config(lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    return Training(steps=steps, optimizer=optimizer, schedule=Constant(warmup=steps // 30), clip=0.3)


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="real weights",
    minutes={"smoke": 0.2, "laptop": 34},
    seeds={"smoke": 1, "laptop": 4, "paper": 1},
    sizes={
        "smoke": Config(
            numbers=1 << 14,
            model=_decoder(64, 1),
            training=_training(12, 3e-3),
            small=Ground(length=32, windows=8, rows=8, tuning=_tuning(8, 3e-3)),
            real=None,
        ),
        "laptop": Config(
            model=_decoder(128, 2),
            training=_training(600, 3e-3),
            small=Ground(length=128, windows=256, rows=32, tuning=_tuning(80, 2e-3)),
            real=Ground(length=128, windows=32, rows=2, tuning=_tuning(20, 1e-3), tuned=(BASE, NF4)),
        ),
        # LLaMA-7B on the paper's C4 excerpt and OASST1, rank 64 on all linear layers, 1,875 steps of 16 (app. B.2)
        "paper": Config(
            model=_decoder(512, 8),
            training=_training(20_000, 3e-4),
            small=Ground(length=512, windows=1024, rows=64, tuning=_tuning(1875, 2e-4)),
            real=Ground(
                length=512,
                windows=1024,
                rows=16,
                tuning=_tuning(1875, 2e-4),
                lora=Lora.Config(rank=64, alpha=16, dropout=0.1, targets="all-linear"),
            ),
            checkpoint="huggyllama/llama-7b",
        ),
    },
)
