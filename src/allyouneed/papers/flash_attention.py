"""FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness (Dao et al., 2022).

arXiv:2205.14135.

Claim   Attention can be computed exactly without its N × N scores ever being stored. In tiles, with a softmax that is
        corrected as it goes and scores computed again for the gradient, it needs memory linear in the length N, where
        attention spelled out needs quadratic; it moves several times fewer numbers between a slow and a fast memory,
        and the fewer the larger the fast memory is, in proportion to 1/M; and as it is exact, a model learns along the
        same curve with either.
Here    The `kernel` of attention is exchanged and nothing else: spelled out, PyTorch's own, in tiles (`nn.tiled`, which
        has the mathematics of the Triton kernel in `nn.flash`). Memory is what PyTorch's allocator has given out at
        the peak of forward and backward, every token seeing every other. Traffic is counted on a simulated machine that
        holds no more than M numbers in its fast memory, for algorithm 0, algorithm 1 and the order of loops that
        today's kernels have; the exponents in M are those of the equations, which the counts must meet exactly. None of
        it has a spread: of the exponents between neighbouring sizes the one nearest its bound is judged, as it is.
Apart   There is no GPU here, so the paper's wall-clock times (15 % for BERT, 3 × for GPT-2, long-range arena) are not
        tested. Times on this machine are reported beside PyTorch's kernel, which works in tiles itself; they say
        something of Python and C++ and nothing of the paper. Traffic is that of the forward pass, and grows with N²
        in either way: what tiles save is a factor. Block-sparse attention (sec. 3.3) and long documents (sec. 4.2) are
        left out. The models that are trained are small.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allyouneed import core
from allyouneed.core.seeds import generator, seed_everything
from allyouneed.data.batches import Windows
from allyouneed.data.corpora import corpus
from allyouneed.evaluate import traffic
from allyouneed.evaluate.memory import peak_allocated
from allyouneed.models import gpt2, llama
from allyouneed.models.decoder import Decoder
from allyouneed.nn.kernels import AnyKernel, Flash, Sdpa, Tiled, attention_weights
from allyouneed.nn.positions import Positions
from allyouneed.nn.sight import whole_rows
from allyouneed.nn.view import View
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine

NAMES: dict[traffic.Algorithm, str] = {
    traffic.Standard: "standard (algorithm 0)",
    traffic.Published: "tiles (algorithm 1)",
    traffic.Exchanged: "tiles, loops exchanged",
}
Kernel = Callable[..., Tensor]  # of queries, keys, values and a view


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """Lengths, the simulated machine, the model that is trained, and the margins of the verdict."""

    model: Decoder.Config
    training: Training
    tiles: Tiled = field(default_factory=lambda: Tiled(queries=256, keys=512))  # whose memory is measured
    trained: AnyKernel = field(default_factory=Tiled)
    corpus: str = "python-reference"
    length: int = 256  # of the rows trained on
    rows: int = 4
    heads: int = 1
    head_dim: int = 64
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)  # whose memory and time are measured
    counted: tuple[int, ...] = (256, 512, 1024, 2048)  # whose traffic is counted
    fast: int = 51_200  # M: 100 KB (sec. 3.2) of 2-byte numbers
    asymptotic: int = 32_768  # N of the exponents in M, where terms in Nd are small
    quadratic: float = 1.8  # exponent of the memory of attention spelled out, at least
    linear: float = 1.1  # and in tiles, at most
    smaller: float = 20.0  # memory spelled out over that in tiles, at the longest
    fewer: float = 4.0  # numbers moved by algorithm 0 over those moved by tiles, the better order, at the longest
    falling: float = -0.9  # exponent of tiles' traffic in M, at most
    steady: float = -0.2  # and of algorithm 0's, at least
    exact: float = 1e-5  # largest error of output and gradients in float32, of elements about 1
    same: float = 1e-3  # largest difference of losses while training, in nats


def run(config: Config, report: Report) -> None:
    """Measure memory and time, count traffic, compare results and trainings, and hold all of it against the margins."""
    for name, lengths in (("lengths", config.lengths), ("counted", config.counted)):
        if len(lengths) < 3 or sorted(set(lengths)) != list(lengths):
            raise core.InputError(f"{name}={lengths}: at least three rising lengths are wanted")
    figure, (left, right) = figures.new(width=11, columns=2)
    _memory(config, report, left)
    _traffic(config, report, right)
    report.figure(figure, "Peak memory of forward and backward, and numbers moved by the forward pass, by length.")
    arms: dict[str, Kernel] = {"tiles": config.tiles, "SDPA": Sdpa()}
    errors = report.repeat(arms, lambda kernel, seed, _: _error(config, kernel, seed))
    report.check("largest error of output and gradients, tiles", values=errors["tiles"], below=config.exact)
    report.table("largest error against float64", [{"kernel": k, "error": max(v)} for k, v in errors.items()])
    _training(config, report)


def _memory(config: Config, report: Report, axes: Any) -> None:
    """Bytes and seconds of each kernel at each length; the exponents of the bytes, and their ratio at the longest."""
    kernels: dict[str, Kernel] = {"spelled out": _spelled_out, "SDPA": Sdpa(), "tiles": config.tiles}
    found = {
        name: [report.job(f"{name.replace(' ', '-')}/{n}", partial(_cost, config, kernel, n)) for n in config.lengths]
        for name, kernel in kernels.items()
    }
    peaks = {name: [cost["bytes"] for cost in costs] for name, costs in found.items()}
    for name, line in peaks.items():
        report.curve(f"memory, {name}", config.lengths, [line], x_label="tokens", y_label="bytes")
        color = figures.CONTROL if name == "spelled out" else None
        figures.band(axes, config.lengths, [[p / 2**20 for p in line]], name, color)
    _log_log(axes, config.lengths, title="Memory", y="peak of forward and backward (MiB)")
    rows = [
        {"tokens": n} | {f"{name}, ms": round(1e3 * costs[i]["seconds"], 1) for name, costs in found.items()}
        for i, n in enumerate(config.lengths)
    ]
    report.table("time of forward and backward (reported, not judged)", rows)
    spelled_out, tiles = peaks["spelled out"], peaks["tiles"]
    _exponent(report, "memory in N, spelled out", config.lengths, spelled_out, above=config.quadratic)
    _exponent(report, "memory in N, tiles", config.lengths, tiles, below=config.linear)
    ratio = spelled_out[-1] / tiles[-1]
    report.check(f"memory, spelled out over tiles, N = {config.lengths[-1]}", ratio, above=config.smaller)


def _traffic(config: Config, report: Report, axes: Any) -> None:
    """Numbers moved by each algorithm: counted by length, their exponents in M, and their ratio at the longest."""
    totals, off = {}, 0
    for algorithm, name in NAMES.items():
        key = f"traffic/{algorithm.__name__}"
        counted = [report.job(f"{key}/{n}", partial(_count, config, algorithm, n)) for n in config.counted]
        equation = [_moved(config, algorithm, n, config.fast) for n in config.counted]
        off = max(off, *(abs(a - b) for a, b in zip(counted, equation, strict=True)))
        totals[algorithm] = counted
        report.curve(f"traffic, {name}", config.counted, [counted], x_label="tokens", y_label="numbers moved")
        color = figures.CONTROL if algorithm is traffic.Standard else None
        figures.band(axes, config.counted, [[c / 1e6 for c in counted]], name, color)
    _log_log(axes, config.counted, title=f"Traffic, M = {config.fast:,}", y="numbers moved (millions)")
    memories = [int(config.fast * factor) for factor in (1, 1.5, 2, 3, 4, 6, 8)]
    for algorithm, name in NAMES.items():
        moved = [_moved(config, algorithm, config.asymptotic, m) for m in memories]
        above, below = (config.steady, None) if algorithm is traffic.Standard else (None, config.falling)
        _exponent(report, f"traffic in M, {name}", memories, moved, above=above, below=below)
    report.check("counted traffic minus the equation's, largest", off, below=0.5)
    ratio = totals[traffic.Standard][-1] / min(totals[traffic.Published][-1], totals[traffic.Exchanged][-1])
    report.check(f"traffic, standard over tiles, N = {config.counted[-1]}", ratio, above=config.fewer)


def _moved(config: Config, algorithm: traffic.Algorithm, length: int, fast: int) -> int:
    """By the equation."""
    return algorithm.traffic(length, config.head_dim, *algorithm.blocks(length, config.head_dim, fast)).total


def _training(config: Config, report: Report) -> None:
    text = "\n".join(document.text for document in corpus(config.corpus).train)
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def work(kernel: AnyKernel, seed: int, folder: Path) -> list[float]:
        seed_everything(seed)
        module = config.model.with_kernel(kernel).build()
        batches = Windows(tokens, batch_size=config.rows, length=config.length, seed=seed)
        done = train(module, next_token, batches, config.training.replace(seed=seed), folder=folder, title="  train")
        return [row["loss"] for row in done.history]

    kernels = {"SDPA": Sdpa(), type(config.trained).__name__: config.trained}
    losses = report.repeat({f"trained with {name}": kernel for name, kernel in kernels.items()}, work)
    for name, lines in losses.items():
        report.arm(name, parameters=config.model.num_parameters())
        report.curve(name, range(1, len(lines[0]) + 1), lines, x_label="log row", y_label="loss (nats)")
    apart = [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in zip(*losses.values(), strict=True)]
    report.check("largest difference of losses while training", values=apart, below=config.same)


def _spelled_out(q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    """Algorithm 0 as PyTorch's users write it."""
    return attention_weights(q, k, view.tile(slice(None), slice(None)) if view.causal else None) @ v


def _cost(config: Config, kernel: Kernel, length: int, folder: Path) -> dict[str, float]:
    """The peak memory and the median time of one forward and backward."""
    q, k, v, gradient = _drawn(config, length, seed=0)

    def work() -> None:
        torch.autograd.grad(kernel(q, k, v, _view(q, causal=False)), (q, k, v), gradient)

    taken = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return {"bytes": peak_allocated(work), "seconds": statistics.median(taken)}


def _count(config: Config, algorithm: traffic.Algorithm, length: int, _: Path) -> int:
    """What the simulated machine counts while it computes the right result."""
    q, k, v = np.random.default_rng(0).standard_normal((3, length, config.head_dim)) / config.head_dim**0.25
    out, machine = traffic.measured(algorithm, q, k, v, capacity=config.fast)
    weights = np.exp(q @ k.T)
    assert np.abs(out - weights @ v / weights.sum(1, keepdims=True)).max() < 1e-9, "the simulated algorithm is wrong"
    return machine.traffic.total


def _error(config: Config, kernel: Kernel, seed: int) -> float:
    """The largest error of output and gradients at the shortest length, against attention spelled out in float64."""
    given = _drawn(config, config.lengths[0], seed)
    results = []
    for attend, dtype in ((kernel, torch.float32), (_spelled_out, torch.float64)):
        q, k, v, gradient = (x.detach().to(dtype).requires_grad_(x.requires_grad) for x in given)
        out = attend(q, k, v, _view(q, causal=True))
        results.append([out, *torch.autograd.grad(out, (q, k, v), gradient)])
    return max((a - b).detach().abs().max().item() for a, b in zip(*results, strict=True))


def _drawn(config: Config, length: int, seed: int) -> list[Tensor]:
    """Queries, keys, values and a gradient, each (1, H, N, d)."""
    source = generator(seed, "attention")
    shape = (1, config.heads, length, config.head_dim)
    q, k, v, gradient = (torch.randn(shape, generator=source) for _ in range(4))
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), gradient]


def _view(q: Tensor, *, causal: bool) -> View:
    """Every token sees every other, or those before it."""
    part = Positions.Config().build(dim=q.shape[1] * q.shape[3], num_heads=q.shape[1], head_dim=q.shape[3], context=1)
    return whole_rows(part, q.transpose(1, 2), causal=causal).view(None)


def _exponent(
    report: Report,
    name: str,
    x: Sequence[float],
    y: Sequence[float],
    *,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Of all local slopes the one nearest its bound: counts and equations have no spread, so the worst is to hold."""
    slopes = local_slopes(x, y)
    report.check(
        f"exponent of {name}, nearest its bound",
        min(slopes) if below is None else max(slopes),
        above=above,
        below=below,
    )
    spans = zip(x, x[1:], slopes, strict=False)
    report.table(f"exponent of {name}", [{"from": a, "to": b, "exponent": slope} for a, b, slope in spans])


def local_slopes(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """b of y = a·x^b between each point and the next.

    >>> local_slopes([1, 2, 4], [2, 8, 16])
    [2.0, 1.0]
    """
    slopes: list[float] = (np.diff(np.log2(y)) / np.diff(np.log2(x))).tolist()
    return slopes


def _log_log(axes: Any, lengths: Sequence[int], *, title: str, y: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, list(map(str, lengths)))
    figures.describe(axes, title=title, x="length N (tokens)", y=y)
    figures.label_ends(axes)


def _small(dim: int) -> Decoder.Config:
    return llama.architecture(vocab_size=256, context=256, dim=dim, num_layers=2, num_heads=2, hidden_dim=2 * dim)


def _schooling(steps: int) -> Training:
    return Training(
        steps=steps, optimizer=AdamW.Config(lr=3e-3), schedule=Cosine(warmup=steps // 10), log_every=max(1, steps // 20)
    )


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="closed form",
    minutes={"smoke": 0.2, "laptop": 4},
    sizes={
        "smoke": Config(
            model=_small(16),
            training=_schooling(6),
            length=64,
            rows=2,
            lengths=(128, 256, 512),
            counted=(64, 128, 256),
            tiles=Tiled(queries=32, keys=64),
        ),
        "laptop": Config(model=_small(64), training=_schooling(100)),
        # sec. 4.1: GPT-2 medium on rows of 1024; without dropout of the attention weights, which the kernel has not
        "paper": Config(
            model=gpt2.with_dropout(gpt2.sized("355M"), branches=0.1, attention=0.0, embeddings=0.1),
            training=Training(
                steps=400_000, optimizer=AdamW.Config(lr=1.5e-4), schedule=Cosine(warmup=4_000), precision="bf16"
            ),
            trained=Flash(),
            length=1024,
            rows=512,
            lengths=(1024, 2048, 4096, 8192, 16_384),
            counted=(512, 1024, 2048, 4096),
            same=0.05,
        ),
    },
)
