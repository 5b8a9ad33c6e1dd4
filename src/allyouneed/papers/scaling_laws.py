"""Scaling Laws for Neural Language Models (Kaplan et al., 2020).

arXiv:2001.08361.

Claim   Loss falls as a power of parameters N and of data D. One formula of both describes runs of all sizes,
        L(N, D) = [(N_c/N)^(α_N/α_D) + D_c/D]^α_D, and so the loss of a larger run can be foretold from small ones.
Here    A ladder of decoders of GPT-2's block, six sizes on four amounts of data, each run with a cosine of its own.
        They learn words that follow Zipf's law and are spelled by lot (`data.lexicon`), whose entropy is known exactly;
        the formula is fitted to what loss there is beyond it. A run four times as dear as the dearest of the ladder,
        larger than all and longer than all, is held out. The control foretells it by a plane in log N and log D. N
        leaves embeddings out. A second, small ladder reads Python's own sources as bytes; of these the entropy is not
        known, and the formula is fitted to the loss itself, as in the paper.
Apart   A hundred thousand parameters for the paper's 1.5 billion, one decade of either instead of six. The paper's loss
        has no floor in sight; that of this source is most of its loss, and without knowing it the formula would bend.
        The critical batch, L(N, S_min) and N_opt ∝ C^0.73, which the paper derives from them, are fitted and tested on
        made data (`evaluate.fits`), not measured here; `chinchilla` measures N_opt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
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
    error: float = 0.03  # of the foretold loss of the held-out run, relative: below
    residual: float = 0.03  # of the ladder's own losses, root mean square in log L: below
    better: float = 0.0  # error of the control minus that of the law: above


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
    try:
        _check(config, report, by_seed, N, D, measured, world.entropy)
    except InputError as error:  # no law at all
        report.note(f"{error}.")
        report.check("share of ladders that the law can be fitted to", 0.0, above=0.99)
    figure, (left, right) = figures.new(10, 4.2, columns=2)
    _lines(report, left, every, laws.get(WORDS), world.entropy, WORDS)
    _star(left, N, D, np.array(measured) - world.entropy, laws.get(WORDS))
    _lines(report, right, of_prose, laws.get(SOURCES), 0.0, SOURCES)
    report.figure(figure, "Points: runs; lines: the fitted L(N, D). The star was not fitted; the circle foretells it.")


def _laws(config: Config, report: Report, ladders: Mapping[str, tuple[np.ndarray, float]]) -> dict[str, KaplanLoss]:
    """The law of each ladder's runs beyond its floor, where there is one; its exponents as a table, and checked."""
    found, rows = {}, []
    for name, (runs, floor) in ladders.items():
        try:
            found[name], exponents = _law(config, runs, floor)
        except InputError as error:
            report.note(f"{name}: {error}.")
            continue
        rows.append(_exponents(name, found[name], exponents))
        for key, one in exponents.items() if name == WORDS else ():
            report.check(
                key,
                one.estimate,
                interval=(one.low, one.high),
                method="95 % bootstrap interval over runs",
                above=0.0,
            )
    report.table("exponents of L(N, D)", [*rows, _exponents("Kaplan et al. 2020, table 2", KAPLAN, {})])
    return found


def _check(
    config: Config,
    report: Report,
    by_seed: Sequence[np.ndarray],
    N: int,
    D: int,
    measured: Sequence[float],
    entropy: float,
) -> None:
    """Each seed's ladder foretells that seed's largest run."""
    rows: list[dict[str, Any]] = []
    residuals = []
    for runs, loss in zip(by_seed, measured, strict=True):
        law = fits.kaplan(runs[:, 0], runs[:, 1], runs[:, 2] - entropy)
        own = [law(n, d) + entropy for n, d, _ in runs]
        residuals.append(float(np.sqrt(np.mean(np.log(own / runs[:, 2]) ** 2))))
        foretold, plane = law(N, D) + entropy, _plane(runs, N, D)
        rows.append({"measured": round(loss, 4), "law": round(foretold, 4), "plane": round(plane, 4)})
    report.table(f"loss of the held-out run, N = {N:,}, D = {D:,}, one row a seed", rows)
    errors = {name: [abs(row[name] / row["measured"] - 1) for row in rows] for name in ("law", "plane")}
    report.check("error of the foretold loss of the largest run", values=errors["law"], below=config.error)
    report.check(
        "that error, of a plane in log N and log D minus of the law",
        values=[plane - law for plane, law in zip(errors["plane"], errors["law"], strict=True)],
        above=config.better,
    )
    report.check("residual of the law in log L, root mean square", values=residuals, below=config.residual)


def _law(config: Config, runs: np.ndarray, floor: float) -> tuple[KaplanLoss, dict[str, Interval]]:
    """The law of all runs (n, 3) beyond a floor, and its exponents with their intervals."""
    whole = fits.kaplan(runs[:, 0], runs[:, 1], runs[:, 2] - floor)

    def fit(some: np.ndarray) -> dict[str, float]:
        law = fits.kaplan(some[:, 0], some[:, 1], some[:, 2] - floor, start=whole)
        return {"α_N": law.alpha_N, "α_D": law.alpha_D}

    return whole, fits.intervals(runs, fit, resamples=config.resamples)


def _plane(runs: np.ndarray, N: float, D: float) -> float:
    """What a loss that falls evenly with log N and log D would come to."""
    given = np.stack((np.ones(len(runs)), np.log(runs[:, 0]), np.log(runs[:, 1])), 1)
    plane, *_ = np.linalg.lstsq(given, runs[:, 2], rcond=None)
    return float(plane @ [1.0, math.log(N), math.log(D)])


def _exponents(name: str, law: KaplanLoss, found: Mapping[str, Interval]) -> dict[str, Any]:
    shown = {f"{key}, 95 %": found.get(key) for key in ("α_N", "α_D")}
    between = {key: f"{one.low:.3f} … {one.high:.3f}" if one else "–" for key, one in shown.items()}
    return {"of": name, "α_N": round(law.alpha_N, 3), "α_D": round(law.alpha_D, 3)} | between


def _grid(config: Config, sizes: Sequence[Member], budgets: Sequence[float], prefix: str = "") -> dict[str, Member]:
    named = {f"{prefix}N={ladder.short(_size(member))}": member for member in sizes}
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
    minutes={"smoke": 0.2, "laptop": 28},
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
            sizes=tuple(ladders.small(dim) for dim in (16, 24, 32, 40, 48, 64)),
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
