"""Pythia: A Suite for Analyzing Large Language Models Across Training and Scaling (Biderman et al., 2023).

arXiv:2304.01373.

Claim   Models of several sizes that see the same data in the same order, kept at many steps, show what one model does
        not: sequences are given back word for word the more often they were shown and the larger the model is; but
        where in the training a sequence stands does not predict whether it is memorised, so that nobody can keep one
        from being memorised by placing it early or late.
Here    Three GPT-NeoX, one order of the data that is asked by step number, thirteen kept steps. Canaries of 64 random
        bytes take the place of rows: some at places drawn from the whole training, 16 to 128 times, others 64 times
        within one eighth of it, which is what "placed" means. A canary is memorised when its first 32 tokens bring
        forth the next 32, greedily and exactly (sec. 4.2). Controls: canaries of the same making that are never shown;
        for the order of arrival, the same canaries with their outcomes exchanged at random.
Apart   0.03 to 0.5 million parameters instead of 70 million to 12 billion, and 800 steps instead of 143,000. The paper
        asks all of its training data, of which few sequences are memorised, mostly such as occur many times; here the
        canaries and their number are known, and they are over a third of all rows. That nobody can place a sequence
        the paper infers from the order of arrival alone; the eighths put it to the test, under a learning rate that
        falls and with fewer steps in which to forget. Term frequencies (sec. 4.3) and the gender intervention
        (sec. 4.1) are not run: the first has its functions in `evaluate.frequency`, the second needs real text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allyouneed import core
from allyouneed.core.seeds import derive, generator
from allyouneed.data.corpora import corpus
from allyouneed.data.replay import FixedOrder, Planted, scattered
from allyouneed.evaluate.memorisation import arrivals, auc, memorised
from allyouneed.evaluate.statistics import bootstrap
from allyouneed.generate.engine import Engine
from allyouneed.models import gpt_neox
from allyouneed.models.checkpoints.loading import as_decoder, load_module, save
from allyouneed.models.decoder import Decoder
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine
from allyouneed.train.suite import Member, kept_steps, train_suite


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The suite, smallest first, what is planted in its data, and the margins of the verdict."""

    names: tuple[str, ...]
    members: tuple[Member, ...]
    corpus: str = "python-reference"
    rows: int = 32
    length: int = 64
    every: int = 200  # kept steps, beside 0 and the powers of two
    shown: tuple[int, ...] = (16, 32, 64, 128)  # times, at places from the whole training
    canaries: int = 24  # for each of `shown`
    bands: int = 8  # equal stretches of the training
    in_band: int = 8  # canaries that stand in one band only, for each band
    times_in_band: int = 64
    never: int = 96  # canaries that are not shown
    asked: int = 32  # k, and l (sec. 4.2)
    repeated: float = 0.30  # share memorised of those shown most often, minus that of those shown least, or never
    larger: float = 0.10  # share memorised by the largest model minus that by the smallest, of all scattered ones
    poisson: float = 0.01  # p of the order of arrival
    place: float = 0.15  # how far from 1/2 the place may tell memorised from not (area under the curve)


def run(config: Config, report: Report) -> None:
    """Train the suite with each seed, ask every kept step for the canaries, and judge the largest model at its end."""
    if len(config.names) != len(config.members) or len({m.training.steps for m in config.members}) != 1:
        raise core.InputError(
            "names and members: a suite has one name for each size, and all sizes train as many steps"
        )
    found = report.repeat({"suite": config}, _suite)["suite"]
    for name, member in zip(config.names, config.members, strict=True):
        tokens = member.training.steps * config.rows * config.length
        assert isinstance(member.model, Decoder.Config)
        report.arm(name, parameters=member.model.num_parameters(), tokens=tokens, planted=found[0]["planted"])
    scattered_ones = slice(0, len(config.shown) * config.canaries)
    shares = {name: [_shares(config, one["last"][name]) for one in found] for name in config.names}
    largest, smallest = config.names[-1], config.names[0]
    report.check(
        f"memorised after {config.shown[-1]} showings minus never shown",
        values=[share[-1] - share[0] for share in shares[largest]],
        above=config.repeated,
    )
    report.check(
        f"memorised after {config.shown[-1]} showings minus after {config.shown[0]}",
        values=[share[-1] - share[1] for share in shares[largest]],
        above=config.repeated,
    )
    report.check(
        f"memorised by {largest} minus by {smallest}",
        values=[
            float(np.mean(one["last"][largest][scattered_ones]) - np.mean(one["last"][smallest][scattered_ones]))
            for one in found
        ],
        above=config.larger,
    )
    _order(config, report, found, largest)
    _record(config, report, found, shares)


def _suite(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    """Which canaries each size has memorised, at its end and how many along the way, and where they stand."""
    text = "\n".join(document.text for document in corpus(config.corpus).train)
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    order = FixedOrder(tokens, batch_size=config.rows, length=config.length, seed=seed)
    canaries = torch.randint(256, (_planted(config) + config.never, 2 * config.asked), generator=generator(seed, "c"))
    plan = _plan(config, seed)
    train_suite(
        {
            name: member.replace(training=member.training.replace(seed=seed))
            for name, member in zip(config.names, config.members, strict=True)
        },
        next_token,
        lambda: Planted(order, canaries, plan),
        folder,
        save=save,
        every=config.every,
        seed=seed,
    )
    steps = kept_steps(config.members[0].training.steps, config.every)
    asked = {name: [_ask(config, folder / name, step, canaries) for step in steps] for name in config.names}
    places: list[list[int]] = [[] for _ in canaries]
    for place, which in sorted(plan.items()):
        places[which].append(place)
    return {
        "planted": len(plan),
        "steps": steps,
        "memorised": {name: [sum(one[: _planted(config)]) for one in asked[name]] for name in config.names},
        "last": {name: asked[name][-1] for name in config.names},
        "places": places,
    }


def _planted(config: Config) -> int:
    return len(config.shown) * config.canaries + config.bands * config.in_band


def _plan(config: Config, seed: int) -> dict[int, int]:
    """Scattered canaries first, by how often they are shown, then those of the first band, the second, …"""
    end = _end(config)
    counts = [times for times in config.shown for _ in range(config.canaries)]
    stretches = [(0, end)] * len(counts)
    for band in range(config.bands):
        counts += [config.times_in_band] * config.in_band
        stretches += [(band * end // config.bands, (band + 1) * end // config.bands)] * config.in_band
    return scattered(counts, stretches, seed=seed)


def _end(config: Config) -> int:
    """How many rows the training has."""
    return config.members[0].training.steps * config.rows


def _ask(config: Config, folder: Path, step: int, canaries: Tensor) -> list[bool]:
    engine = Engine(as_decoder(load_module(folder, step=step), folder), config=Engine.Config(max_batch=256))
    found: list[bool] = memorised(engine, canaries, prompt=config.asked, continuation=config.asked).tolist()
    return found


def _shares(config: Config, outcome: list[bool]) -> list[float]:
    """Shares memorised of those never shown, then of those shown each number of times."""
    n = config.canaries
    groups = [outcome[_planted(config) :], *(outcome[i * n : (i + 1) * n] for i in range(len(config.shown)))]
    return [float(np.mean(group)) for group in groups]


def _order(config: Config, report: Report, found: list[dict[str, Any]], name: str) -> None:
    """Whether a place tells memorised from not, among canaries shown equally often by one and the same seed."""
    scattered_count, planted = len(config.shown) * config.canaries, _planted(config)
    rows = [
        (seed * 1000 + i // config.canaries if i < scattered_count else -1 - seed, np.mean(one["places"][i]), memory, i)
        for seed, one in enumerate(found)
        for i, memory in enumerate(one["last"][name][:planted])
    ]
    data = np.array(rows)
    anywhere, placed = data[data[:, 0] >= 0], data[data[:, 0] < 0]
    _tells(config, report, f"mean place of scattered canaries, {name}", anywhere)
    _tells(config, report, f"eighth of those placed, {name}", placed)
    check = f"p of the order of arrival (Poisson), {name}"
    if not anywhere[:, 2].any():
        report.check(check, 0.5, interval=(0.0, 1.0), method="nothing was memorised", above=config.poisson)
        return
    most = max(config.shown)
    places = [one["places"][i] + [-1] * (most - len(one["places"][i])) for one in found for i in range(scattered_count)]
    arrived = arrivals(anywhere[:, 2] > 0, np.array(places), end=_end(config), bins=config.bands, groups=anywhere[:, 0])
    report.check(check, arrived.p, above=config.poisson)
    report.table(
        f"arrival of memorised canaries in the order, {name}",
        [
            {"stretch": number + 1, "showings": count, "expected": round(expected, 1)}
            for number, (count, expected) in enumerate(zip(arrived.counts, arrived.expected, strict=True))
        ],
    )
    report.note(f"Dispersion of the arrivals: {arrived.dispersion:.2f}, 1 for a Poisson process.")


def _tells(config: Config, report: Report, name: str, data: np.ndarray) -> None:
    """Hold how well places tell memorised from not, 1/2 being not at all, against the margin on both sides."""
    name, above, below = f"area under the curve by {name}", 0.5 - config.place, 0.5 + config.place
    if _area(data) is None:
        report.check(
            name, 0.5, interval=(0.0, 1.0), method="nothing, or everything, was memorised", above=above, below=below
        )
        return

    def statistic(samples: np.ndarray) -> np.ndarray:
        return np.array([0.5 if (area := _area(sample)) is None else area for sample in samples])

    area = bootstrap(data, statistic, resamples=2000, seed=derive(0, name))
    method = "95 % interval, bootstrap over canaries"
    report.check(name, area.estimate, interval=(area.low, area.high), method=method, above=above, below=below)


def _area(data: np.ndarray) -> float | None:
    """The area under the curve within groups, each weighted by its pairs: rows (group, place, memorised, …)."""
    areas, pairs = [], []
    for group in np.unique(data[:, 0]):
        events = data[data[:, 0] == group, 2] > 0
        if events.any() and not events.all():
            areas.append(auc(data[data[:, 0] == group, 1], events))
            pairs.append(int(events.sum()) * int((~events).sum()))
    return float(np.average(areas, weights=pairs)) if areas else None


def _record(config: Config, report: Report, found: list[dict[str, Any]], shares: dict[str, list[list[float]]]) -> None:
    figure, (left, middle, right) = figures.new(13, 4.2, columns=3)
    showings, first = [0, *config.shown], len(config.shown) * config.canaries
    bands = list(range(1, config.bands + 1))
    for name in config.names:
        report.curve(name, showings, shares[name], x_label="times shown", y_label="share memorised")
        figures.band(left, list(range(len(showings))), shares[name], name)
        along = [[count / _planted(config) for count in one["memorised"][name]] for one in found]
        report.curve(f"{name}, along the training", found[0]["steps"], along, x_label="step", y_label="share memorised")
        figures.band(middle, found[0]["steps"], along, name)
        placed = [
            np.mean(np.reshape(one["last"][name][first : _planted(config)], (config.bands, -1)), 1).tolist()
            for one in found
        ]
        report.curve(f"{name}, placed", bands, placed, x_label="stretch of the order", y_label="share memorised")
        figures.band(right, bands, placed, name)
    left.set_xticks(range(len(showings)), list(map(str, showings)))
    figures.describe(left, title="How often", x="times shown, anywhere", y="share memorised")
    figures.describe(middle, title="How long", x="step", y="share of all planted memorised")
    figures.describe(right, title="Where", x=f"stretch of the order, shown {config.times_in_band} times in it")
    for axes in (left, middle, right):
        axes.set_ylim(-0.02, 1.02)
        figures.label_ends(axes)
    report.figure(figure, "Canaries given back exactly, by showings, step and place; band: lowest to highest seed.")


def _member(dim: int, num_layers: int, steps: int, lr: float = 4e-3) -> Member:
    """Heads of 16, of which 4 dimensions are turned."""
    return Member(
        model=gpt_neox.architecture(vocab_size=256, context=64, dim=dim, num_layers=num_layers, num_heads=dim // 16),
        training=_training(steps, lr),
    )


def _training(steps: int, lr: float) -> Training:
    """A hundredth of warm-up and a cosine to a tenth, as the published runs are configured; their betas, decay and
    clipping are the defaults of `AdamW` and `Training`.
    """
    schedule = Cosine(warmup=max(1, steps // 100))
    return Training(steps=steps, optimizer=AdamW.Config(lr=lr), schedule=schedule, log_every=max(1, steps // 20))


def _published(name: str, lr: float) -> Member:
    """143,000 steps of 1024 rows of 2048 tokens (sec. 2.3) and each size's peak rate (table 1). Weights begin as
    GPT-2's do; the published runs used two other ways for inner and for last matrices.
    """
    return Member(model=gpt_neox.sized(name), training=_training(143_000, lr).replace(save_every=1000))


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.1, "laptop": 12},
    sizes={
        "smoke": Config(
            names=("small", "large"),
            members=(_member(16, 1, 12), _member(32, 1, 12)),
            rows=8,
            every=8,
            shown=(1, 2),
            canaries=2,
            bands=2,
            in_band=2,
            times_in_band=2,
            never=4,
        ),
        "laptop": Config(
            names=("small", "medium", "large"), members=(_member(32, 1, 800), _member(64, 2, 800), _member(128, 2, 800))
        ),
        "paper": Config(
            names=("70M", "410M", "1.4B"),
            members=(_published("70M", 1e-3), _published("410M", 3e-4), _published("1.4B", 2e-4)),
            rows=1024,
            length=2048,
            every=1000,
        ),
    },
)
