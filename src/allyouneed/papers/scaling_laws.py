"""Scaling Laws for Neural Language Models (Kaplan et al., 2020).

arXiv:2001.08361.

Claim   Loss falls as a power of parameters N and of data D. One formula of both describes runs of all sizes,
        L(N, D) = [(N_c/N)^(α_N/α_D) + D_c/D]^α_D, and so the loss of a larger run can be foretold from small ones.
Here    A ladder of decoders of GPT-2's block, six sizes on four amounts of data, each run with a cosine of its own.
        They learn words that follow Zipf's law and are spelled by lot (`data.lexicon`), whose entropy is known exactly;
        the formula is fitted to what loss there is beyond it. A run four times as dear as the dearest of the ladder,
        larger than all and longer than all, is held out. Errors are of the logarithm of the loss beyond the entropy.
        Each run of the ladder is foretold from all others: without its term in N or its term in D the formula must be
        wrong by twice as much, and the control, a plane in the same logarithms (a power of N times a power of D, with
        no end to what either buys), by more. N leaves embeddings out. A second, small ladder reads Python's own sources
        as bytes; of these the entropy is not known, and the formula is fitted to the loss itself, as in the paper.
Apart   A hundred thousand parameters for the paper's 1.5 billion, one decade of either instead of six. The paper's loss
        has no floor in sight; that of this source is most of its loss, and without knowing it the formula would bend.
        The critical batch, L(N, S_min) and N_opt ∝ C^0.73, which the paper derives from them, are fitted and tested on
        made data (`evaluate.fits`), not measured here; `chinchilla` measures N_opt. Sizes and amounts of data were
        chosen by single runs with the first of the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator
from allyouneed.data.batches import Windows
from allyouneed.data.corpora import Document, corpus
from allyouneed.data.lexicon import Lexicon
from allyouneed.evaluate import fits
from allyouneed.evaluate.laws import KAPLAN, KaplanLoss
from allyouneed.evaluate.perplexity import batch_nll
from allyouneed.evaluate.statistics import Interval
from allyouneed.models import gpt2
from allyouneed.models.decoder import Decoder
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures, ladders
from allyouneed.papers.base import Paper, Report
from allyouneed.train import ladder
from allyouneed.train.loop import Training
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine
from allyouneed.train.suite import Member

Loss = Callable[[float, float], float]  # nats, of N and D
WORDS, SOURCES = "words, beyond the entropy", "Python's sources"


@dataclass(frozen=True, kw_only=True)
class Config(ladders.Words):
    """The ladders, the run that is held out, and the margins of the verdict."""

    sizes: tuple[Member, ...]
    budgets: tuple[float, ...]  # tokens
    largest: Member  # held out
    largest_tokens: float
    prose_sizes: tuple[Member, ...]
    prose_budgets: tuple[float, ...]
    prose: str = "python-code"
    resamples: int = 200
    # All errors are of the logarithm of the loss beyond the entropy.
    share: float = 0.5  # residual of the law, of what it is without N or without D: below
    residual: float = 0.10  # of the law, root mean square: below
    error: float = 0.10  # of the foretold largest run: below; twice the size and data should bring about twice this
    worse: float = 0.05  # that error, more than the plane's: below


def run(config: Config, report: Report) -> None:
    """Train both ladders and the held-out run, fit the law to each seed's ladder, and see what it foretells."""
    world, text = config.world.build(), corpus(config.prose)
    train_bytes, valid_bytes = _bytes(text.train), _bytes(text.valid)

    def work(member: Member, seed: int, folder: Path) -> dict[str, Any]:
        return ladders.learn(config, world, member, seed, folder)

    def read(member: Member, seed: int, folder: Path) -> dict[str, Any]:
        return vars(_read(config, train_bytes, valid_bytes, member, seed, folder))

    runs = _grid(config, config.sizes, config.budgets)
    held = _grid(config, (config.largest,), (config.largest_tokens,), "largest, ")
    found = report.repeat(runs | held, work)
    prose = _grid(config, config.prose_sizes, config.prose_budgets, "sources, ")
    told = report.repeat(prose, read, report.seeds[:1])
    for name, member in (runs | held | prose).items():
        report.arm(name, parameters=_size(member), tokens=_tokens(config, member), rate=member.training.optimizer.lr)
    (largest,) = held
    N, D, measured = _size(held[largest]), _tokens(config, held[largest]), [one["losses"][-1] for one in found[largest]]
    by_seed = [_columns(config, runs, {name: [found[name][i]] for name in runs}) for i in range(len(measured))]
    every, of_prose = np.concatenate(by_seed), _columns(config, prose, told)
    laws = _laws(config, report, {WORDS: (every, world.entropy), SOURCES: (of_prose, 0.0)})
    judge(config, report, by_seed, np.array([(N, D, loss) for loss in measured]), world.entropy)
    figure, (left, right) = figures.new(10, 4.2, columns=2)
    _lines(report, left, every, laws.get(WORDS), world.entropy, WORDS)
    _star(left, N, D, np.array(measured) - world.entropy, laws.get(WORDS))
    _lines(report, right, of_prose, laws.get(SOURCES), 0.0, SOURCES)
    report.figure(figure, "Points: runs; lines: the fitted L(N, D). The star was not fitted; the circle foretells it.")


def _laws(config: Config, report: Report, ladders: Mapping[str, tuple[np.ndarray, float]]) -> dict[str, KaplanLoss]:
    """The law of each ladder's runs beyond its floor, where there is one; its exponents as a table."""
    found, rows = {}, []
    for name, (runs, floor) in ladders.items():
        try:
            found[name], exponents, refused = _law(config, _beyond(runs, floor))
        except InputError as error:
            report.note(f"{name}: {error}.")
            continue
        rows.append(_exponents(name, found[name], exponents, refused))
    report.table("exponents of L(N, D)", [*rows, _exponents("Kaplan et al. 2020, table 2", KAPLAN, {}, None)])
    return found


def judge(config: Config, report: Report, by_seed: Sequence[np.ndarray], largest: np.ndarray, entropy: float) -> None:
    """Each seed's ladder foretells its own runs, each from all others, and that seed's largest run."""
    try:
        own, held = _foretold(report, by_seed, largest, entropy)
    except InputError as error:  # no law at all
        report.note(f"{error}.")
        report.check("share of ladders that the law can be fitted to", 0.0, above=0.99)
        return
    for name, what in (("D alone", "N"), ("N alone", "D")):
        shares = [row["law"] / row[name] for row in own]
        report.check(f"residual of the law over that of a law without {what}", values=shares, below=config.share)
    bent = [row["law"] / row["plane"] for row in own]
    report.check("residual of the law over that of a plane in log N and log D", values=bent, below=1.0)
    report.check("residual of the law", values=[row["law"] for row in own], below=config.residual)
    errors = [abs(row["law"]) for row in held]
    report.check("error of the foretold loss of the largest run", values=errors, below=config.error)
    worse = [abs(row["law"]) - abs(row["plane"]) for row in held]
    report.check("that error, of the law minus of the plane", values=worse, below=config.worse)


def _foretold(
    report: Report, by_seed: Sequence[np.ndarray], largest: np.ndarray, entropy: float
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Of each of `FITS`, one row a seed: its residual on the ladder, its error on the largest run; as tables too."""
    own, held = [], []
    for runs, last in zip(by_seed, largest, strict=True):
        given, wanted = _beyond(runs, entropy), _beyond(last[None], entropy)
        ways = FITS | {"law": partial(_of_both, start=_of_both(given))}
        own.append({name: _left_out(given, fit) for name, fit in ways.items()})
        held.append({name: float(_errors(fit(given), wanted)[0]) for name, fit in ways.items()})
    for title, rows in (
        ("root mean square, of runs left out of the fit one by one", own),
        ("of the largest run", held),
    ):
        shown = [{name: round(value, 4) for name, value in row.items()} for row in rows]
        report.table(f"error of log (L − entropy), {title}, one row a seed", shown)
    return own, held


def _law(config: Config, runs: np.ndarray) -> tuple[KaplanLoss, dict[str, Interval], int]:
    """The law of all runs, its exponents with their intervals, and how many resamples had no law."""
    whole = _of_both(runs)

    def fit(some: np.ndarray) -> dict[str, float]:
        law = _of_both(some, start=whole)
        return {"α_N": law.alpha_N, "α_D": law.alpha_D}

    return whole, *fits.intervals(runs, fit, resamples=config.resamples)


# What may be fitted to runs (n, 3) of N, D and the loss beyond a floor. All take the same logarithms.


def _of_both(runs: np.ndarray, start: KaplanLoss | None = None) -> KaplanLoss:
    return fits.kaplan(*runs.T, start=start)


def _plane(runs: np.ndarray) -> Loss:
    """A plane in log N, log D and log L: a power of either, and no end to what one of them buys."""
    logs = np.log(runs)
    given = np.column_stack((np.ones(len(runs)), logs[:, :2]))
    (level, n, d), *_ = np.linalg.lstsq(given, logs[:, 2], rcond=None)
    return lambda N, D: math.exp(level + n * math.log(N) + d * math.log(D))


def _of_size(runs: np.ndarray) -> Loss:
    law = fits.power_law(runs[:, 0], runs[:, 2])
    return lambda N, D: law(N)


def _of_data(runs: np.ndarray) -> Loss:
    law = fits.power_law(runs[:, 1], runs[:, 2])
    return lambda N, D: law(D)


FITS: dict[str, Callable[[np.ndarray], Loss]] = {
    "law": _of_both,
    "plane": _plane,
    "N alone": _of_size,
    "D alone": _of_data,
}


def _beyond(runs: np.ndarray, floor: float) -> np.ndarray:
    """The same runs (n, 3), their losses less the floor."""
    return runs - [0.0, 0.0, floor]


def _errors(law: Loss, runs: np.ndarray) -> np.ndarray:
    """Of the logarithm of each foretold loss."""
    return np.log([law(N, D) for N, D, _ in runs]) - np.log(runs[:, 2])


def _left_out(runs: np.ndarray, fit: Callable[[np.ndarray], Loss]) -> float:
    """Root mean square of the errors of runs that are each foretold from all others."""
    errors = [_errors(fit(np.delete(runs, i, axis=0)), runs[i : i + 1]) for i in range(len(runs))]
    return float(np.sqrt(np.mean(np.square(errors))))


def _exponents(name: str, law: KaplanLoss, found: Mapping[str, Interval], refused: int | None) -> dict[str, Any]:
    shown = {f"{key}, 95 %": found.get(key) for key in ("α_N", "α_D")}
    between = {key: f"{one.low:.3f} … {one.high:.3f}" if one else "–" for key, one in shown.items()}
    exponents = {"α_N": round(law.alpha_N, 3), "α_D": round(law.alpha_D, 3)}
    return {"of": name} | exponents | between | {"resamples refused": refused}


def _grid(config: Config, sizes: Sequence[Member], budgets: Sequence[float], prefix: str = "") -> dict[str, Member]:
    named = ladder.named((f"{prefix}N={ladder.short(_size(member))}", member) for member in sizes)
    return ladder.grid(named, budgets, batch_tokens=config.batch_tokens)


def _columns(
    config: Config, runs: Mapping[str, Member], found: Mapping[str, Sequence[Mapping[str, Any]]]
) -> np.ndarray:
    """N, D and L of every run: (n, 3)."""
    return np.array(
        [(_size(m), _tokens(config, m), one["losses"][-1]) for name, m in runs.items() for one in found[name]]
    )


def _size(member: Any) -> int:
    return _parameters(member.model)


@cache
def _parameters(model: Decoder.Config) -> int:
    return model.num_parameters(embeddings=False)


def _tokens(config: Config, member: Member) -> int:
    return member.training.steps * config.batch_tokens


def _read(config: Config, text: Tensor, valid: Tensor, member: Member, seed: int, folder: Path) -> ladder.Run:
    starts = torch.randint(len(valid) - config.length, (config.held_out, 1), generator=generator(0, "held out"))
    windows = valid[starts + torch.arange(config.length + 1)].long()
    return ladder.climb(
        member,
        next_token,
        Windows(text, batch_size=config.rows, length=config.length, seed=seed),
        lambda module: batch_nll(module, windows[:, :-1], windows[:, 1:]),
        batch_tokens=config.batch_tokens,
        seed=seed,
        folder=folder,
    )


def _bytes(documents: Sequence[Document]) -> Tensor:
    text = "\n".join(document.text for document in documents)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _star(axes: Any, N: int, D: int, measured: np.ndarray, law: KaplanLoss | None) -> None:
    """The run that was held out, and what was foretold of it."""
    axes.plot([N] * len(measured), measured, "*", color="#222222", markersize=9, label="held out")
    if law is not None:
        axes.plot([N], [law(N, D)], "o", mfc="none", color="#222222", markersize=11, label="foretold")
    axes.legend(fontsize=8)


def _lines(report: Report, axes: Any, runs: np.ndarray, law: KaplanLoss | None, floor: float, name: str) -> None:
    for i, D in enumerate(np.unique(runs[:, 1])):
        here, color = runs[runs[:, 1] == D], figures.PALETTE[i % len(figures.PALETTE)]
        axes.scatter(here[:, 0], here[:, 2] - floor, s=12, color=color)
        sizes = np.geomspace(runs[:, 0].min(), runs[:, 0].max(), 40)
        fitted = [law(n, D) if law else np.nan for n in sizes]
        axes.plot(sizes, fitted, color=color, label=f"{ladder.short(D)} tokens")
        each = np.unique(here[:, 0])
        means = [float(here[here[:, 0] == n, 2].mean()) for n in each]
        label = f"{name}, {ladder.short(D)} tokens"
        report.curve(label, each, [means], x_label="parameters without embeddings", y_label="loss (nats per token)")
    y = "loss beyond the entropy (nats per token)" if floor else "loss (nats per byte)"
    figures.describe(axes, title=name, x="parameters without embeddings", y=y)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=8)


def _published(num_layers: int, dim: int) -> Member:
    """A size of the paper's: contexts of 1024 tokens, BPE of 50257, the rate of eq. D.1 for its N; batches of half a
    million tokens, 3000 steps of warm-up in 250,000, a cosine to zero (sec. 2.2 and D.6).
    """
    model = gpt2.architecture(dim=dim, num_layers=num_layers, num_heads=dim // 64)
    lr = 0.003239 - 0.0001395 * math.log(12 * num_layers * dim**2)
    schedule = Cosine(warmup=3000, floor=0.0)
    return Member(model=model, training=Training(steps=250_000, optimizer=AdamW.Config(lr=lr), schedule=schedule))


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 69},
    sizes={
        "smoke": Config(
            sizes=tuple(ladders.small(dim, 1, vocab_size=8, length=12) for dim in (4, 12, 32)),
            budgets=(600, 1800, 5400),
            largest=ladders.small(48, 1, vocab_size=8, length=12),
            largest_tokens=10_000,
            world=Lexicon.Config(letters=8, length=3, words=200, exponent=1.3),
            prose_sizes=tuple(ladders.small(dim, 1, vocab_size=256, length=12) for dim in (4, 12, 32)),
            prose_budgets=(600, 1800, 5400),
            prose="python-reference",
            rows=4,
            length=12,
            held_out=16,
            resamples=2,
        ),
        "laptop": Config(
            sizes=tuple(ladders.small(dim) for dim in (16, 20, 24, 32, 48, 64)),
            budgets=(2e5, 4e5, 8e5, 1.6e6),
            largest=ladders.small(96),
            largest_tokens=3.2e6,
            world=Lexicon.Config(letters=32, length=6, words=2**17, exponent=1.3),
            prose_sizes=tuple(ladders.small(dim, vocab_size=256) for dim in (16, 24, 32, 48)),
            prose_budgets=(2e5, 4e5, 8e5),
        ),
        "paper": Config(
            sizes=tuple(
                _published(*shape) for shape in ((2, 128), (3, 256), (6, 384), (12, 512), (12, 768), (24, 1024))
            ),
            budgets=(22e6, 230e6, 2.3e9, 22e9),  # sec. 3: from 22 million to 23 billion tokens
            largest=_published(48, 1600),
            largest_tokens=22e9,
            world=Lexicon.Config(letters=50_257, length=4, words=10**7, exponent=1.1),
            prose_sizes=tuple(_published(*shape) for shape in ((2, 128), (3, 256), (6, 384))),
            prose_budgets=(22e6, 230e6, 2.3e9),
            rows=512,
            length=1024,
        ),
    },
)
