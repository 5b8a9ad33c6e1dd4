"""Emergent Abilities of Large Language Models (Wei et al., 2022).

arXiv:2206.07682. With the answer to it: Are Emergent Abilities of Large Language Models a Mirage? (Schaeffer et al.,
2023), arXiv:2304.15004.

Claim   Two. Wei et al.: along a ladder of models, answers that count only as a whole are near chance up to some scale
        and far above it beyond. Schaeffer et al.: the suddenness is the metric's. The same answers graded token by
        token, or by edit distance, have risen all along the stretch that looked flat; the longer the answer, the later
        and the more abruptly it is right as a whole, which it is p^k of the time, p being the accuracy of one token
        and k the answer's length. Ours to the second: that is so where tokens do not hang on one another. Where an
        error is carried on, the grades of written tokens are powers of p too, and bend; p itself rises evenly.
Here    Eight or nine sizes of one decoder, trained from nothing on as many questions each. Sums of sixteen digits:
        tokens do not hang on one another and ask for about as much each (the lowest, without a carry, for less).
        Products of sixteen permutations: each moves what the last one left. The first k tokens are the answer to the
        question of length k, so that exact match of k tokens, token accuracy and edit similarity are read off one and
        the same greedily generated answers. p is measured apart from them, with the right tokens before each. How
        late a grade rises is the area between its curve over log compute and the chord (`evaluate.grades.bend`): 0 for
        an even rise, towards 1 for flat and then a jump. "Near chance" is an exact match of at most 0.05; chance
        itself is 20⁻¹⁶ and 32⁻¹⁶.
Apart   Three hundred to seventy thousand parameters and two tasks of our making, whose every step shows in a token of
        the answer; where it hangs on steps that do not, as in Wei et al.'s word problems, no grade of its tokens would
        show the way there. Trained on the tasks alone, while the abilities of the paper come with training on text.
        Compute differs by parameters only, and the sizes are those between which the tasks are learned. No ladder of
        pretrained models: of the real weights at hand, SmolLM2 has one size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allyouneed import core
from allyouneed.core.seeds import generator, seed_everything
from allyouneed.data.batches import Generated
from allyouneed.data.reckoning import Products, Reckoning, Sums
from allyouneed.evaluate import grades
from allyouneed.evaluate.answers import read, weighed, written
from allyouneed.evaluate.statistics import student_t
from allyouneed.models import gpt3, llama
from allyouneed.models.decoder import Decoder
from allyouneed.nn.initialise import Normal
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine
from allyouneed.train.suite import Member

TOKENS, EDITS, CHOICE = "token accuracy", "edit similarity", "multiple choice"
GRADED = (TOKENS, EDITS, "probability of a token", CHOICE, "1 − Brier score")
GIVEN = "token accuracy after the right tokens"  # p

Found = dict[str, list[list[float]]]  # by grade: one curve over the ladder a seed


@dataclass(frozen=True, kw_only=True)
class Ladder(core.Config):
    """A world and the sizes that are trained in it, smallest first, whose vocabulary is the world's."""

    world: Sums.Config | Products.Config
    names: tuple[str, ...]
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        """Refuse a ladder on which no curve can bend."""
        if len(self.names) != len(self.members) or len(self.names) < 3:
            raise core.InputError(f"{len(self.names)} names, {len(self.members)} members; three sizes at least")


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The ladders, what is asked, and the margins of the verdict."""

    ladders: tuple[Ladder, ...]
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16)  # k; the last is that of the answers
    rows: int = 64  # questions a step
    questions: int = 1024  # of the test
    options: int = 4  # of multiple choice, the wrong ones with one token exchanged
    near: float = 0.05  # exact match that counts as near chance
    flat: float = 0.25  # at least this share of the ladder, in log compute, is near chance
    far: float = 0.5  # exact match of the largest
    hidden: float = 0.4  # share of that metric's rise that is made on the stretch near chance
    straighter: float = 0.3  # bend of exact match minus that of a graded metric that should rise evenly
    longer: float = 0.2  # bend of exact match at the longest answers minus at the shortest but one
    power: float = 0.1  # how far a grade may be from the power of p that it should be, anywhere on the ladder

    def __post_init__(self) -> None:
        """Refuse lengths that cannot be judged."""
        if sorted(set(self.lengths)) != list(self.lengths) or len(self.lengths) < 3 or self.lengths[0] < 1:
            raise core.InputError(f"lengths={self.lengths}: at least three rising lengths are wanted")
        if any(ladder.world.length != self.lengths[-1] for ladder in self.ladders):
            raise core.InputError(f"ladders: answers are not as long as the last of lengths={self.lengths}")


def run(config: Config, report: Report) -> None:
    """Train every size in every world with each seed, grade the same answers in every way, compare the curves."""
    arms = {
        f"{_name(ladder.world)}, {name}": (ladder.world, member)
        for ladder in config.ladders
        for name, member in zip(ladder.names, ladder.members, strict=True)
    }
    found = report.repeat(arms, lambda arm, seed, folder: _graded(config, *arm, seed, folder))
    figure, panels = figures.new(11, 4.2 * len(config.ladders), columns=2, rows=len(config.ladders))
    for ladder, pair in zip(config.ladders, zip(panels[::2], panels[1::2], strict=True), strict=True):
        world = ladder.world
        names = [f"{_name(world)}, {name}" for name in ladder.names]
        compute = [_record(config, report, name, *arms[name]) for name in names]
        curves = {
            grade: [[found[name][seed][grade] for name in names] for seed in range(len(report.seeds))]
            for grade in found[names[0]][0]
        }
        _judge(config, report, world, np.log10(compute).tolist(), curves)
        _draw(config, report, _name(world), compute, curves, pair)
    report.figure(
        figure,
        "Left: exact match of the first k tokens of the answers (dots: p^k). Right: graded metrics of the same models, "
        "of the same answers where they are answers. Band: lowest to highest seed.",
    )
    report.note("Every exact match, token accuracy and edit similarity is of the same greedily generated answers.")


def _name(world: core.Config) -> str:
    assert world.owner is not None
    return world.owner.__name__.lower()


def _graded(config: Config, world: Any, member: Member, seed: int, folder: Path) -> dict[str, float]:
    """Train one size in one world; every grade of its answers to questions that every size is asked."""
    asked: Reckoning = world.build()
    seed_everything(seed)
    module = _sized(config, member, asked).build()
    batches = Generated(lambda source: asked.batch(config.rows, source), seed=seed)
    train(module, next_token, batches, member.training.replace(seed=seed), folder=folder, title="  train")
    return _grades(config, module.eval(), asked, generator(0, "questions", _name(world)))


def _sized(config: Config, member: Member, world: Reckoning) -> Decoder.Config:
    model = member.model
    assert isinstance(model, Decoder.Config)
    return model.replace(vocab_size=world.vocab_size, context=max(model.context, 2 * world.length + 1))


def _grades(config: Config, module: Decoder, world: Reckoning, source: Any) -> dict[str, float]:
    prompts, answers = world.sample(config.questions, source)
    options, first = world.options(answers, config.options, source), np.zeros(config.questions, dtype=np.int64)
    said, right = written(module, prompts, world.length), answers.tolist()
    logprobs, likeliest = read(module, prompts, answers)
    scores = weighed(module, prompts, options).double().numpy()
    found = {_exact(k): grades.exact_match([s[:k] for s in said], [r[:k] for r in right]) for k in config.lengths}
    found |= {
        TOKENS: grades.token_accuracy(said, right),
        EDITS: grades.edit_similarity(said, right),
        "probability of a token": logprobs.double().mean(1).exp().numpy(),
        CHOICE: grades.multiple_choice_grade(scores, first),
        "1 − Brier score": 1 - grades.brier(scores, first),
        GIVEN: likeliest.double().mean(1).numpy(),
        "log-probability of the answer": logprobs.double().sum(1).numpy(),
    }
    return {name: float(values.mean()) for name, values in found.items()}


def _exact(k: int) -> str:
    return f"exact match, k = {k}"


def _record(config: Config, report: Report, name: str, world: Any, member: Member) -> float:
    """Put down what an arm had at its disposal; its training FLOPs, 6 · parameters · tokens (Kaplan et al. 2020)."""
    asked: Reckoning = world.build()
    parameters = _sized(config, member, asked).num_parameters()
    tokens = member.training.steps * config.rows * asked.batch(1, generator(0))["ids"].shape[1]
    flops = 6.0 * parameters * tokens
    report.arm(name, parameters=parameters, tokens=tokens, training_gflop=round(flops / 1e9, 1))
    return flops


def _judge(config: Config, report: Report, world: Any, compute: list[float], curves: Found) -> None:
    """Hold the curves of one world against the margins, and put down how each bends."""
    k, least, name = config.lengths[-1], config.lengths[1], _name(world)
    whole, given = curves[_exact(k)], curves[GIVEN]
    even = (GIVEN,) if world.owner.chained else (TOKENS, EDITS)
    bends = {grade: [grades.bend(compute, curve) for curve in ys] for grade, ys in curves.items()}

    def check(what: str, values: Sequence[float], *, above: float | None = None, below: float | None = None) -> None:
        report.check(f"{name}: {what}", values=values, above=above, below=below)

    leaves = [grades.crossing(compute, curve, config.near) for curve in whole]
    check("exact match of the largest", [curve[-1] for curve in whole], above=config.far)
    spans = [(x - compute[0]) / (compute[-1] - compute[0]) for x in leaves]
    check("share of the ladder near chance", spans, above=config.flat)
    risen = [_risen(compute, curve, x) for curve, x in zip(curves[even[0]], leaves, strict=True)]
    check(f"share of its rise made there, {even[0]}", risen, above=config.hidden)
    for grade in even:
        values = _less(bends[_exact(k)], bends[grade])
        check(f"bend, exact match − {grade}", values, above=config.straighter)
    values = _less(bends[_exact(k)], bends[_exact(least)])
    check(f"bend, exact match at k = {k} − at k = {least}", values, above=config.longer)
    check("exact match, furthest from p^k", _furthest(whole, given, lambda p: p**k), below=config.power)
    if world.owner.chained:
        values = _furthest(curves[TOKENS], given, lambda p: grades.unbroken(p, k))
        check("token accuracy, furthest from the mean of p, p² … p^k", values, below=config.power)
    report.table(f"{name}: how each grade rises", [_row(grade, curves[grade], bends[grade]) for grade in curves])


def _furthest(ys: list[list[float]], given: list[list[float]], law: Callable[[float], float]) -> list[float]:
    """By how much at most the curves differ from a law of p."""
    return [max(abs(y - law(p)) for y, p in zip(*pair, strict=True)) for pair in zip(ys, given, strict=True)]


def _risen(compute: Sequence[float], curve: Sequence[float], at: float) -> float:
    """The share of a curve's rise that is made where it has come so far; a curve that hardly rises has none."""
    return (float(np.interp(at, compute, curve)) - curve[0]) / max(curve[-1] - curve[0], 0.05)


def _less(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(ones, others, strict=True)]


def _row(name: str, ys: list[list[float]], bends: list[float]) -> dict[str, Any]:
    mean = np.mean(ys, 0)
    return {
        "grade": name,
        "smallest": round(float(mean[0]), 3),
        "middle": round(float(mean[len(mean) // 2]), 3),
        "largest": round(float(mean[-1]), 3),
        "bend": round(float(np.mean(bends)), 3),
        "95 % interval": str(student_t(bends)) if len(bends) > 1 else "one seed",
        "range over median step": str(round(grades.emergence_score(mean), 2)),
    }


def _draw(
    config: Config, report: Report, world: str, compute: list[float], curves: Found, panels: Sequence[Any]
) -> None:
    left, right = panels
    gigaflop = [flops / 1e9 for flops in compute]
    labels = {"x_label": "training FLOPs, 10⁹", "y_label": "grade"}
    for k in config.lengths:
        report.curve(f"{world}: {_exact(k)}", gigaflop, curves[_exact(k)], **labels)
        figures.band(left, gigaflop, curves[_exact(k)], f"k = {k}")
        color = left.get_lines()[-1].get_color()
        left.plot(gigaflop, np.mean(np.power(curves[GIVEN], k), 0), ".", color=color, label="_p^k")
    for grade in (GIVEN, *GRADED):
        report.curve(f"{world}: {grade}", gigaflop, curves[grade], **labels)
        figures.band(right, gigaflop, curves[grade], grade)
    for axes, title in ((left, "right as a whole"), (right, "graded")):
        axes.set_xscale("log")
        axes.set_ylim(-0.02, 1.02)
        figures.describe(axes, title=f"{world.capitalize()}, {title}", x="training FLOPs, 10⁹", y="grade")
        figures.label_ends(axes)


def _member(dim: int, steps: int) -> Member:
    """LLaMA's block, two layers. Rates fall with the width, as trials had it: at one rate for all, large ones trail."""
    config = llama.architecture(
        vocab_size=2, context=16, dim=dim, num_layers=2, num_heads=max(1, dim // 16), hidden_dim=3 * dim, tied=True
    )
    training = Training(
        steps=steps,
        optimizer=AdamW.Config(lr=min(0.02, 0.24 / dim)),
        schedule=Cosine(warmup=steps // 20),
        log_every=max(1, steps // 10),
    )
    return Member(model=config.replace(initialise=Normal(std=dim**-0.5)), training=training)


def _published(name: str, lr: float) -> Member:
    """A size of GPT-3, on whose ladder the paper's figure 2 stands, at its rate (Brown et al. 2020, table 2.1)."""
    training = Training(steps=300_000, optimizer=AdamW.Config(lr=lr), schedule=Cosine(warmup=375), precision="bf16")
    return Member(model=gpt3.sized(name), training=training)


def _ladder(world: Sums.Config | Products.Config, dims: tuple[int, ...], steps: int) -> Ladder:
    names = tuple(f"{dim} wide" for dim in dims)
    return Ladder(world=world, names=names, members=tuple(_member(dim, steps) for dim in dims))


def _large(world: Sums.Config | Products.Config) -> Ladder:
    """GPT-3's ladder but for its largest size."""
    rates = {"125M": 6e-4, "350M": 3e-4, "760M": 2.5e-4, "1.3B": 2e-4, "2.7B": 1.6e-4, "6.7B": 1.2e-4, "13B": 1e-4}
    return Ladder(world=world, names=tuple(rates), members=tuple(_published(*one) for one in rates.items()))


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 11},
    sizes={
        "smoke": Config(
            ladders=(
                _ladder(Sums.Config(length=4, base=5), (2, 4, 8), steps=12),
                _ladder(Products.Config(length=4, things=5, letters=4), (2, 4, 8), steps=12),
            ),
            lengths=(1, 2, 4),
            rows=8,
            questions=32,
        ),
        "laptop": Config(
            ladders=(
                _ladder(Sums.Config(length=16), (2, 4, 6, 8, 12, 16, 24, 32), steps=600),
                _ladder(Products.Config(length=16), (2, 4, 6, 8, 12, 16, 24, 32, 48), steps=500),
            ),
        ),
        "paper": Config(
            ladders=(
                _large(Sums.Config(length=16, base=100)),
                _large(Products.Config(length=16, things=4096, letters=16384)),
            ),
            rows=16384,
            questions=16384,
        ),
    },
)
