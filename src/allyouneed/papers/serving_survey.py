"""Towards Efficient Generative Large Language Model Serving: A Survey from Algorithms to Systems (Miao et al., 2023).

arXiv:2312.15234.

Claim   Each of the survey's techniques gains what it is for and costs little where it cannot help (sec. 3 and 4), while
        no answer changes: batches that requests join and leave at any token serve a mixed load at least twice as fast
        as batches that run until their longest answer is done; keys and values in blocks waste less than 4 % of the
        room they take; what prompts have in common is read once and the first token comes at least twice as soon;
        prompts read in chunks shorten the longest pauses of the others by half; tokens guessed from the prompt make
        copying at least a third faster; weights in 4 bits make a token at least twice as fast; keys and values in 8
        bits take less than a third of the room, so that where room is scarce a load is served at least a tenth faster.
Here    One engine (`generate.engine`), one real model (SmolLM2 135M) and one load of real lengths: a prompt is a run of
        paragraphs of the Python reference, its answer as long as the paragraph that follows. Every technique is a pair
        of settings that differ in it alone, given the same requests at the same times, in an order that alternates.
        Requests are open-loop: they arrive at random (Poisson) whether or not earlier ones are answered. Each gain is
        measured on a load that the technique is for, its cost on one that it cannot help. Answers are greedy, and those
        of both settings are compared token for token. 8 bits are given three times the blocks, in less memory.
Apart   One small model on two processor cores instead of large ones on GPUs: what fills a batch here is arithmetic, not
        memory, so that batching gains less and guessing costs more than there. No pipelines, no several machines.
        Keys and values in 8 bits are the one technique here that may change answers: how many it changes is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from allyouneed import core
from allyouneed.evaluate import load
from allyouneed.evaluate.load import Arrival, Served
from allyouneed.evaluate.loads import Alike, AnyLoad, Copied, Interrupted, Mixed, Text, asked
from allyouneed.generate.engine import Engine
from allyouneed.generate.speculation import PromptLookup
from allyouneed.models.checkpoints.loading import as_decoder, load_module, load_tokenizer, open_checkpoint
from allyouneed.nn.paged import bytes_per_block
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report

BATCH = 8  # requests that run together where batches are compared


@dataclass(frozen=True, kw_only=True)
class Setting(core.Config):
    """How an arm serves: `together` is the size of batches that nobody joins, None: requests join and leave."""

    engine: Engine.Config = field(default_factory=Engine.Config)
    together: int | None = None
    speculator: PromptLookup.Config | None = None
    packed: bool = True  # the file's 4-bit blocks as they are, not unpacked to fp32


Measure = Callable[[Sequence[Served]], float]

MEASURES: dict[str, Measure] = {
    "seconds to serve all": lambda served: max(one.times[-1] for one in served),
    "median seconds to the first token": lambda served: float(np.median([one.first for one in served])),
    "longest pause, 99th percentile (s)": lambda served: float(
        np.quantile([p for o in served for p in o.pauses], 0.99)
    ),
    "median seconds between tokens": lambda served: float(np.median([p for one in served for p in one.pauses])),
}
ALL, FIRST, PAUSE, TOKEN = MEASURES


@dataclass(frozen=True, kw_only=True)
class Technique(core.Config):
    """A pair of settings, what the technique shall gain and what it may cost: `measure` on `helps`, on `hurts`."""

    without: Setting
    treated: Setting
    measure: str
    helps: AnyLoad
    gain: float  # the least that the measure is divided by
    cost_measure: str
    hurts: AnyLoad
    cost: float  # the most that the measure is multiplied by
    exact: bool = True  # no answer may change


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The techniques, and the load that batching is shown at."""

    model: str = "smollm2-135m-instruct"
    techniques: dict[str, Technique]
    offered: Mixed
    shares: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5)  # of what the engine can serve
    waste: float = 0.04  # the most of the room in blocks that may lie empty
    smaller: float = 3.0  # the least that 8 bits make keys and values smaller by


def run(config: Config, report: Report) -> None:
    """Serve with and without each technique, and hold gains and costs to their bounds."""
    for name, technique in config.techniques.items():
        _compare(config, report, name, technique)
    _waste(config, report)
    _offer(config, report)


def _compare(config: Config, report: Report, name: str, technique: Technique) -> None:
    arms = {"without": technique.without, "with": technique.treated}
    key = name.replace(" ", "-")

    def work(seed: int, folder: Path) -> dict[str, Any]:
        return {on: _both(config, arms, getattr(technique, on), seed) for on in ("helps", "hurts")}

    found = [report.job(f"{key}/seed{seed}", partial(work, seed)) for seed in report.seeds]
    gain = [_divided(one["helps"], technique.measure, "without", "with") for one in found]
    cost = [_divided(one["hurts"], technique.cost_measure, "with", "without") for one in found]
    report.check(f"{name}: {technique.measure}, without over with", values=gain, above=technique.gain)
    report.check(
        f"{name}: {technique.cost_measure} where it cannot help, with over without", values=cost, below=technique.cost
    )
    changed = sum(one[on]["changed"] for one in found for on in ("helps", "hurts"))
    if technique.exact:
        report.check(f"{name}: answers changed", float(changed), below=0.5)
    else:
        report.note(f"{name}: {changed} answers changed.")
    _show(report, name, technique, found)


def _both(config: Config, arms: Mapping[str, Setting], given: AnyLoad, seed: int) -> dict[str, Any]:
    """Both arms' measures on one load, in an order that the seed decides, and how many answers differ."""
    order = list(arms) if seed % 2 == 0 else list(arms)[::-1]
    served = {arm: _serve(config.model, arms[arm], given, seed) for arm in order}
    one, other = served.values()
    return {
        "measures": {arm: {name: of(s) for name, of in MEASURES.items()} for arm, s in served.items()},
        "changed": sum(a.tokens != b.tokens for a, b in zip(one, other, strict=True)),
    }


def _divided(found: Mapping[str, Any], measure: str, over: str, under: str) -> float:
    measures = found["measures"]
    return float(measures[over][measure] / measures[under][measure])


def _serve(model: str, setting: Setting, given: AnyLoad, seed: int) -> list[Served]:
    """What became of a load, served by a new engine that has warmed up."""
    module, text = _model(model, setting.packed), _text(model)
    speculator = None if setting.speculator is None else PromptLookup(setting.speculator)
    warm = asked(text.ids[:32], 4)
    engine = Engine(module, config=setting.engine, speculator=speculator)
    load.serve(engine, [Arrival(0.0, warm)])
    admits = load.continuous if setting.together is None else load.Static(setting.together)
    return load.serve(engine, given.arrivals(text, seed), admits)


def _show(report: Report, name: str, technique: Technique, found: Sequence[Mapping[str, Any]]) -> None:
    """What the technique is for at the left, what it costs elsewhere at the right: each arm's mean, lowest, highest."""
    figure, both = figures.new(9.5, 2.6, columns=2)
    rows = []
    for axes, on, measure in zip(both, ("helps", "hurts"), (technique.measure, technique.cost_measure), strict=True):
        values = {arm: [one[on]["measures"][arm][measure] for one in found] for arm in ("without", "with")}
        spans = [(min(v), max(v)) for v in values.values()]
        means = [float(np.mean(v)) for v in values.values()]
        figures.bars(axes, list(values), means, spans, [figures.CONTROL, figures.PALETTE[0]])
        figures.describe(axes, title="What it is for" if on == "helps" else "Where it cannot help", x=measure)
        rows += [
            {"load": on, "measure": measure, "seed": s} | {arm: values[arm][s] for arm in values}
            for s in range(len(found))
        ]
    report.table(name, rows)
    caption = f"{name.capitalize()}: with and without, on the load it is for and on one it cannot help; lines: seeds."
    report.figure(figure, caption, name=name.replace(" ", "-"))


def _waste(config: Config, report: Report) -> None:
    """How much of the room taken for keys and values lies empty, by three ways to take it; and what 8 bits save."""
    text, engine = _text(config.model), Engine.Config()
    module = _model(config.model, packed=True)
    lengths = [
        (len(arrival.request.ids), arrival.request.sampling.max_new_tokens)
        for seed in report.seeds
        for arrival in config.offered.arrivals(text, seed)
    ]
    ways: dict[str, Callable[[int, int, int], int]] = {
        "the whole context": lambda prompt, answer, held: module.config.context,
        "prompt and longest answer": lambda prompt, answer, held: prompt + config.offered.longest,
        f"blocks of {engine.block_size}": lambda prompt, answer, held: (
            -(-held // engine.block_size) * engine.block_size
        ),
    }
    empty = {way: _empty(lengths, room) for way, room in ways.items()}
    report.table("room that lies empty", [{"taken for": way, "share": share} for way, share in empty.items()])
    report.check("blocks: share of the room that lies empty", list(empty.values())[-1], below=config.waste)
    like = module.new_cache(1, 0)
    plain, eight = (bytes_per_block(like, engine.block_size, eight_bits=bits) for bits in (False, True))
    report.check("8 bits: bytes of a block, 32 bits over 8", plain / eight, above=config.smaller)


def _empty(lengths: Sequence[tuple[int, int]], room: Callable[[int, int, int], int]) -> float:
    """The share of the room that lies empty, summed over all tokens of all answers.

    >>> _empty([(3, 2)], lambda prompt, answer, held: 8)
    0.5625
    """
    spans = [(p, a, held) for p, a in lengths for held in range(p, p + a)]
    return 1 - sum(held for _, _, held in spans) / sum(room(*span) for span in spans)


def _offer(config: Config, report: Report) -> None:
    """Seconds to a whole answer by how much is asked for, in batches that are joined and in batches that are not."""
    engine = Engine.Config(max_batch=BATCH)
    arms = {"joined": Setting(engine=engine), "not joined": Setting(engine=engine, together=BATCH)}
    at_once = report.job("offered/all", partial(_seconds_of_all, config))
    capacity = config.offered.requests / at_once

    def work(setting: Setting, seed: int, folder: Path) -> list[list[float]]:
        loads = [config.offered.replace(rate=share * capacity) for share in config.shares]
        return [[one.whole for one in _serve(config.model, setting, given, seed)] for given in loads]

    found = report.repeat(arms, work, seeds=report.seeds[:1])
    figure, (axes,) = figures.new()
    for name, (waits,) in found.items():
        offered = [share * capacity for share in config.shares]
        for q, style in ((0.5, "-"), (0.95, ":")):
            line = [float(np.quantile(wait, q)) for wait in waits]
            label = f"{name}, {'median' if q == 0.5 else '95th percentile'}"
            color = figures.CONTROL if name == "not joined" else figures.PALETTE[0]
            figures.band(axes, offered, [line], label, color, style=style)
            report.curve(label, offered, [line], x_label="requests a second", y_label="seconds to the whole answer")
    figures.describe(axes, title="Waiting", x="requests a second, offered", y="seconds to the whole answer")
    figures.label_ends(axes)
    report.figure(figure, "How long a whole answer takes by how much is asked for.", name="offered")


def _seconds_of_all(config: Config, folder: Path) -> float:
    return MEASURES[ALL](
        _serve(config.model, Setting(engine=Engine.Config(max_batch=BATCH)), config.offered.replace(rate=None), 0)
    )


@cache
def _model(model: str, packed: bool) -> Any:
    return as_decoder(load_module(open_checkpoint(model), packed=packed), model)


@cache
def _text(model: str) -> Text:
    return Text.of(load_tokenizer(open_checkpoint(model)))


def _techniques(
    *, mixed: Mixed, streams: int, copies: int, common: int, length: int, answer: int, scarce: int
) -> dict[str, Technique]:
    """The bounds are those of the claim; `scarce` blocks hold a few of the mixed load's requests at once."""
    few, batch = mixed.replace(requests=copies), Engine.Config(max_batch=BATCH)
    one = Engine.Config(max_batch=1)
    return {
        "continuous batching": Technique(
            without=Setting(engine=batch, together=BATCH),
            treated=Setting(engine=batch),
            measure=ALL,
            helps=mixed,
            gain=2.0,
            cost_measure=ALL,
            hurts=Alike(requests=streams, common=1, answer=answer),
            cost=1.1,
        ),
        "prefix sharing": Technique(
            without=Setting(engine=Engine.Config(share_prefixes=False)),
            treated=Setting(),
            measure=FIRST,
            helps=Alike(requests=streams, common=common),
            gain=2.0,
            cost_measure=ALL,
            hurts=mixed,
            cost=1.1,
        ),
        "chunked prefill": Technique(
            without=Setting(engine=Engine.Config(chunk=8192)),
            treated=Setting(engine=Engine.Config(chunk=128)),
            measure=PAUSE,
            helps=Interrupted(streams=streams // 2, answer=answer, prompts=4, length=length, every=answer / 400),
            gain=2.0,
            cost_measure=ALL,
            hurts=mixed,
            cost=1.25,
        ),
        "tokens guessed from the prompt": Technique(
            without=Setting(engine=one),
            treated=Setting(engine=one, speculator=PromptLookup.Config()),
            measure=ALL,
            helps=Copied(requests=copies, answer=answer),
            gain=1.33,
            cost_measure=ALL,
            hurts=few,
            cost=1.05,
        ),
        "weights in 4 bits": Technique(
            without=Setting(engine=one, packed=False),
            treated=Setting(engine=one),
            measure=TOKEN,
            helps=few,
            gain=2.0,
            cost_measure=FIRST,
            hurts=Alike(requests=1, common=common, answer=2),
            cost=1.1,
        ),
        "keys and values in 8 bits": Technique(
            without=Setting(engine=Engine.Config(blocks=scarce)),
            treated=Setting(engine=Engine.Config(blocks=3 * scarce, kv8=True)),
            measure=ALL,
            helps=mixed,
            gain=1.1,
            cost_measure=ALL,
            hurts=few,
            cost=1.1,
            exact=False,
        ),
    }


def _smoke() -> dict[str, Technique]:
    """Some of them, on as little as shows that they run."""
    little = Mixed(requests=2, longest=4, paragraphs=2)
    every = _techniques(mixed=little, streams=2, copies=1, common=16, length=32, answer=4, scarce=32)
    return {name: every[name] for name in ("continuous batching", "tokens guessed from the prompt")}


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="real weights",
    minutes={"smoke": 0.3, "laptop": 12},
    seeds={"smoke": 1, "laptop": 5, "paper": 3},
    sizes={
        "smoke": Config(
            techniques=_smoke(),
            offered=Mixed(requests=2, longest=4, paragraphs=2),
            shares=(1.0,),
        ),
        "laptop": Config(
            techniques=_techniques(
                mixed=Mixed(requests=24), streams=12, copies=4, common=256, length=1024, answer=96, scarce=64
            ),
            offered=Mixed(requests=24),
        ),
        "paper": Config(
            model="HuggingFaceTB/SmolLM2-1.7B-Instruct",
            techniques=_techniques(
                mixed=Mixed(requests=512, longest=512),
                streams=64,
                copies=32,
                common=2048,
                length=4096,
                answer=256,
                scarce=256,
            ),
            offered=Mixed(requests=512, longest=512),
        ),
    },
)
