"""Direct Preference Optimization: Your Language Model is Secretly a Reward Model (Rafailov et al., 2023).

arXiv:2305.18290.

Claim   A policy trained on preferences by one classification loss, −log σ(β·log-ratio of the preferred answer minus
        β·log-ratio of the other), reaches as much reward for its divergence from the reference as one trained by PPO
        against a reward model of the same preferences, or more; and more than one trained on the preferred answers.
Here    A world of 16 tokens in which every text of five can be written out (`data.enumerated`): rewards, divergences
        and the best policy π* ∝ π_ref·exp(r/β) are sums, not estimates. A small LLaMA learns how people write there
        and is the reference; pairs drawn from it are labelled by Bradley and Terry's chances. DPO, IPO, PPO with a
        reward model, PPO with the true reward and fine-tuning on the preferred texts begin from that reference, the
        first four once for every β. What each gains within a divergence is told as a share of what π* gains within
        it. Between two trained policies it is read off a line over the root of the divergence; nothing is read
        before an arm's first policy or beyond its last: both arms are then judged at the nearest divergence that
        lies within. Judged are DPO against PPO with the reward model, and DPO against fine-tuning, the latter at the
        divergence that it comes to. PPO with the true reward, of which the paper found DPO to be the better too, IPO
        and the best of n are shown and not judged.
Apart   0.1 million parameters instead of GPT-2 large and GPT-J, texts of five tokens after one prompt instead of
        reviews and summaries, simulated labellers whose model is the one that DPO assumes. Nothing is shown about
        judges, about prompts that were not trained on, or about answers of many lengths. A first run had no β above 1:
        fine-tuning was judged at a divergence of 0.05, between the reference and DPO's nearest policy at 0.17 to 0.24,
        where the root gave DPO 0.06 more and a straight line would have given it less; and PPO at 1.0 beyond its last
        policy. After it, and before the run told here, β = 2, 4 and 8 came to DPO and 0.125 to PPO with the reward
        model, with the same seeds. The margins stayed.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allyouneed import core
from allyouneed.align import references
from allyouneed.align.exact import Point, Truth, reached, text_logprobs
from allyouneed.align.language_ppo import LanguagePPO
from allyouneed.align.policies import LanguagePolicy
from allyouneed.align.rollouts import Rollouts
from allyouneed.align.samplers import LocalSampler
from allyouneed.core.seeds import generator, seed_everything
from allyouneed.data.batches import Epochs, Generated
from allyouneed.data.enumerated import PROMPT, Enumerated
from allyouneed.data.packing import IGNORED, Batch, take
from allyouneed.models import llama
from allyouneed.models.decoder import Decoder
from allyouneed.models.heads import Classifier
from allyouneed.objectives import preference, reward
from allyouneed.objectives.next_token import next_token
from allyouneed.objectives.policy import FixedKl
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine

ARMS = ("DPO", "IPO", "PPO, reward model", "PPO, true reward", "preferred texts")
COUNTS = (2, 4, 8, 16, 32, 64)  # n of best-of-n
BETAS = tuple(10 ** (2 - place / 50) for place in range(201))  # at which the frontier is told: 100 to 0.01


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The world, the model, how each arm is trained, and the margins of the verdict, in shares of what π* gains."""

    world: Enumerated.Config
    model: Decoder.Config
    pretraining: Training
    pairs: int = 8192
    preferring: Training  # DPO, IPO, the reward model and fine-tuning, on the pairs
    batch: int = 64  # pairs a step
    acting: Training  # PPO
    rollouts: Rollouts.Config
    ppo: LanguagePPO = field(default_factory=LanguagePPO)
    betas: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)  # of DPO
    acted: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)  # β of PPO with the reward model
    shown: tuple[float, ...] = (1.0, 0.5, 0.25)  # of the arms that are not judged
    parts: tuple[float, ...] = (0.25, 1.0)  # of the steps, after which fine-tuning is looked at; the last is judged
    divergences: tuple[float, ...] = (0.25, 0.5, 1.0)  # nats, within which gains are compared
    not_worse: float = 0.02  # DPO may gain this much less than PPO with a reward model and still be as good
    better: float = 0.0  # than fine-tuning on the preferred texts

    def betas_of(self, arm: str) -> tuple[float, ...]:
        """With which an arm is trained."""
        return {"DPO": self.betas, "PPO, reward model": self.acted}.get(arm, self.shown)


@dataclass(frozen=True)
class Begun:
    """What all arms of a seed begin with: the reference, the truth about it, and labelled pairs (pairs, 2, L)."""

    reference: Decoder
    truth: Truth
    texts: Tensor  # the preferred one first


@dataclass(frozen=True)
class Known:
    """The truth of a seed as a report keeps it: where the reference, π* and the best of n are."""

    start: Point
    frontier: list[Point]
    best_of: list[Point]

    def share(self, points: Sequence[Point], kl: float) -> float:
        """What policies gain within a divergence that lies among theirs, as a share of what π* gains."""
        assert within(kl, points) == kl, f"no policies on both sides of {kl:g} nats"
        most, got = reached([self.start, *self.frontier], kl), reached(points, kl)
        return (got - self.start.reward) / (most - self.start.reward)


def within(kl: float, *lines: Sequence[Point]) -> float:
    """The divergence nearest to `kl` that has trained policies of every line on both sides.

    >>> line = [Point(0.1, 0.0), Point(0.5, 1.0)]
    >>> within(0.2, line), within(1.0, line), within(0.0, line)
    (0.2, 0.5, 0.1)
    """
    low = max(min(point.kl for point in line) for line in lines)
    high = min(max(point.kl for point in line) for line in lines)
    return max(low, min(kl, high))


def run(config: Config, report: Report) -> None:
    """Train every arm from the seed's reference, place its policies exactly, and compare gains within divergences."""
    world = config.world.build()

    @cache
    def begun(seed: int) -> Begun:
        return _begun(config, world, seed)

    def place(_: None, seed: int, folder: Path) -> dict[str, list[list[float]]]:
        truth = begun(seed).truth
        best_of = [truth.at(truth.best_of(count)) for count in COUNTS]
        lines = {"start": [truth.start], "frontier": truth.frontier(BETAS), "best_of": best_of}
        return {name: [[point.kl, point.reward] for point in line] for name, line in lines.items()}

    def work(arm: str, seed: int, folder: Path) -> list[list[float]]:
        arms = _Arms(config, world, begun(seed), seed, folder)
        found = [begun(seed).truth.at(text_logprobs(one, PROMPT, world.length)) for one in arms.policies(arm)]
        return [[point.kl, point.reward] for point in found]

    places = report.repeat({"truth": None}, place)["truth"]
    known = [Known(_points(one["start"])[0], _points(one["frontier"]), _points(one["best_of"])) for one in places]
    found = report.repeat({arm: arm for arm in ARMS}, work)
    points = {arm: [_points(one) for one in values] for arm, values in found.items()}
    _judge(config, report, known, points)
    _record(config, report, known, points)


def _judge(
    config: Config, report: Report, known: Sequence[Known], points: Mapping[str, Sequence[Sequence[Point]]]
) -> None:
    _tell(config, report, known, points)
    lines = zip(known, points["DPO"], points["PPO, reward model"], strict=True)
    report.check(
        "share of the attainable gain: DPO minus PPO with a reward model",
        values=[statistics.fmean(_ahead(*one, kl) for kl in config.divergences) for one in lines],
        above=-config.not_worse,
    )
    lines = zip(known, points["DPO"], points["preferred texts"], strict=True)
    report.check(
        "the same within what fine-tuning comes to: DPO minus fine-tuning",
        values=[_ahead(one, dpo, tuned[-1:], tuned[-1].kl) for one, dpo, tuned in lines],
        above=config.better,
    )


def _ahead(known: Known, first: Sequence[Point], second: Sequence[Point], kl: float) -> float:
    """The share of the first minus that of the second, each within `kl`, or what is nearest to it within both. Where
    their policies share no divergence, each is taken at its own that is nearest.
    """
    kl = within(kl, first, second)
    return known.share(first, within(kl, first)) - known.share(second, within(kl, second))


def _tell(
    config: Config, report: Report, known: Sequence[Known], points: Mapping[str, Sequence[Sequence[Point]]]
) -> None:
    """The shares of each arm, where policies of every seed lie on both sides, and which judgements had to move."""
    for arm, lines in points.items():
        facts = {}
        for kl in config.divergences:
            inside = all(within(kl, line) == kl for line in lines)
            shares = [one.share(line, kl) for one, line in zip(known, lines, strict=True)] if inside else []
            facts[f"share within {kl:g} nats"] = round(statistics.fmean(shares), 4) if shares else None
        report.arm(arm, **facts)
    for i, seed in enumerate(report.seeds):
        dpo, ppo, tuned = (points[arm][i] for arm in ("DPO", "PPO, reward model", "preferred texts"))
        asked = [(kl, within(kl, dpo, ppo)) for kl in config.divergences]
        asked.append((tuned[-1].kl, within(tuned[-1].kl, dpo)))
        for kl, found in asked:
            if found != kl:
                report.note(f"Seed {seed}: nothing lies around {kl:.3g} nats; judged at {found:.3g}.")


def _begun(config: Config, world: Enumerated, seed: int) -> Begun:
    """A model of how people write, exactly told, and pairs of its texts with a labeller's choice."""
    seed_everything(seed)
    reference = config.model.build()

    def draw(source: torch.Generator) -> Batch:
        return _batch(world.written(config.batch * 2, source))

    train(reference, next_token, Generated(draw, seed=seed), config.pretraining.replace(seed=seed), quiet=True)
    reference.requires_grad_(False)
    truth = Truth(text_logprobs(reference.eval(), PROMPT, world.length), world.rewards)
    source = generator(seed, "pairs")
    drawn = torch.multinomial(truth.logprobs.exp(), 4 * config.pairs, replacement=True, generator=source)
    texts = world.texts[drawn.view(-1, 2)]
    texts = texts[(texts[:, 0] != texts[:, 1]).any(-1)][: config.pairs]  # two that are the same tell nothing
    first = world.preferred(texts[:, 0], texts[:, 1], source)
    return Begun(reference, truth, torch.where(first[:, None, None], texts, texts.flip(1)))


class _Arms:
    """The policies of each arm, one after another, all from the same beginning."""

    def __init__(self, config: Config, world: Enumerated, begun: Begun, seed: int, folder: Path) -> None:
        self.config, self.world, self.begun, self.seed, self.folder = config, world, begun, seed, folder

    def policies(self, arm: str) -> Iterator[Decoder]:
        """Trained, one for each β; of fine-tuning, one for each part of the steps."""
        if arm == "preferred texts":
            for part in self.config.parts:
                yield self._tuned(part)
            return
        score = self._scores() if arm == "PPO, reward model" else self.world.reward
        for beta in self.config.betas_of(arm):
            if arm.startswith("PPO"):
                yield self._acted(beta, score)
            else:
                loss = preference.dpo(beta) if arm == "DPO" else preference.ipo(beta)
                yield self._preferred(beta, preference.preference(loss, beta))

    def _preferred(self, beta: float, objective: Any) -> Decoder:
        policy = copy.deepcopy(self.begun.reference).requires_grad_(True)
        known = self.begun.truth.logprobs[self.world.number(self.begun.texts)].float()
        rows = _batch(self.begun.texts) | {"reference": known}
        self._train(policy, objective, rows, self.config.preferring, f"beta{beta:g}")
        return policy

    def _tuned(self, part: float) -> Decoder:
        policy = copy.deepcopy(self.begun.reference).requires_grad_(True)
        training = self.config.preferring
        training = training.replace(steps=max(1, round(part * training.steps)))
        self._train(policy, next_token, _batch(self.begun.texts[:, 0]), training, f"part{part:g}")
        return policy

    def _scores(self) -> Callable[[Tensor], Tensor]:
        """A reward model of the same pairs, and what it says of texts (B, L): (B,)."""
        config = Classifier.Config(model=self.config.model, labels=("reward",), bias=False, dropout=0.0)
        seed_everything(self.seed)
        model = Classifier(config, copy.deepcopy(self.begun.reference).requires_grad_(True))
        rows = _batch(self.begun.texts) | {"ranks": torch.tensor([0, 1]).expand(len(self.begun.texts), 2)}
        self._train(model, reward.reward(), rows, self.config.preferring, "reward")

        @torch.inference_mode()
        def scores(texts: Tensor) -> Tensor:
            return reward.rewards(model.eval(), _batch(texts[:, None]))[:, 0]

        return scores

    def _acted(self, beta: float, score: Callable[[Tensor], Tensor]) -> Decoder:
        """PPO, its penalty for divergence being β."""

        def told(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
            found: list[float] = score(torch.stack([self.world.read(text) for text in completions])).tolist()
            return found

        seed_everything(self.seed)
        config = self.config.rollouts
        policy = LanguagePolicy(copy.deepcopy(self.begun.reference).requires_grad_(True))
        tokens = 1 + self.world.length
        sampler = LocalSampler.of(policy.model, self.world.tokenizer, width=config.episodes, tokens=tokens)
        rollouts = Rollouts(
            policy,
            sampler,
            references.of(policy.model),
            told,
            [self.world.tokenizer.decode([PROMPT])],
            config.replace(kl=FixedKl(beta=beta), max_new_tokens=self.world.length),
            seed=self.seed,
        )
        training = self.config.acting.replace(seed=self.seed)
        train(policy, self.config.ppo, rollouts, training, folder=self.folder / f"beta{beta:g}", title="  PPO")
        return policy.model

    def _train(self, module: nn.Module, objective: Any, rows: Batch, training: Training, name: str) -> None:
        count = len(rows["ids"])

        def collate(chosen: list[int]) -> Batch:
            return take(rows, chosen)

        batches = Epochs(range(count), batch_size=self.config.batch, collate=collate, seed=self.seed)
        training = training.replace(seed=self.seed)
        train(module, objective, batches, training, folder=self.folder / name, title=f"  {name}")


def _batch(texts: Tensor) -> Batch:
    """Texts (…, L) after the prompt, all of whose tokens are predicted: `ids`, `targets`, `segments` (…, L + 1)."""
    edge = texts[..., :1]
    ids = torch.cat((torch.full_like(edge, PROMPT), texts), -1)
    targets = torch.cat((texts, torch.full_like(edge, IGNORED)), -1)
    return {"ids": ids, "targets": targets, "segments": torch.ones_like(ids)}


def _points(pairs: Sequence[Sequence[float]]) -> list[Point]:
    return [Point(kl, reward) for kl, reward in pairs]


def _record(
    config: Config, report: Report, known: Sequence[Known], points: Mapping[str, Sequence[Sequence[Point]]]
) -> None:
    """The frontier of the first seed with the policies of all, and all numbers."""
    figure, (axes,) = figures.new()
    gains = {arm: [_gains(one, line) for one, line in zip(known, lines, strict=True)] for arm, lines in points.items()}
    most = max(kl for lines in gains.values() for line in lines for kl, _ in line)
    first = [(kl, gain) for kl, gain in _gains(known[0], known[0].frontier) if kl <= 1.2 * most]
    axes.plot(*zip(*first, strict=True), color=figures.CONTROL, label="best there is")
    axes.plot(*zip(*_gains(known[0], known[0].best_of), strict=True), ":", color=figures.CONTROL, label="best of n")
    for color, (arm, lines) in zip(figures.PALETTE, gains.items(), strict=False):
        for i, line in enumerate(lines):
            axes.plot(*zip(*line, strict=True), "o-", color=color, label=arm if i == 0 else None, linewidth=1)
            report.curve(
                f"{arm}, seed {report.seeds[i]}",
                [kl for kl, _ in line],
                [[gain for _, gain in line]],
                x_label="KL (nats)",
                y_label="gain",
            )
    axes.set_xlim(0, 1.05 * most)
    axes.legend()
    figures.describe(axes, title="Reward for divergence", x="KL from the reference (nats)", y="gain in mean reward")
    report.figure(figure, "Every policy's exact gain and divergence, a line a seed; the best there is, of the first.")
    report.table("gain", _rows(config, known, points))


def _gains(known: Known, line: Sequence[Point]) -> list[tuple[float, float]]:
    return [(point.kl, point.reward - known.start.reward) for point in sorted(line, key=lambda point: point.kl)]


def _rows(
    config: Config, known: Sequence[Known], points: Mapping[str, Sequence[Sequence[Point]]]
) -> list[dict[str, Any]]:
    """Each policy, the mean of seeds, and the share that it has of what could be gained for its divergence."""
    rows = []
    settings = {arm: [f"β {beta:g}" for beta in config.betas_of(arm)] for arm in ARMS}
    settings["preferred texts"] = [f"{part:g} of the steps" for part in config.parts]
    points = {**points, "best of n, true reward": [one.best_of for one in known]}
    settings["best of n, true reward"] = [f"n {count}" for count in COUNTS]
    for arm, lines in points.items():
        for i, setting in enumerate(settings[arm]):
            here = [(one, line[i]) for one, line in zip(known, lines, strict=True)]
            rows.append(
                {
                    "arm": arm,
                    "setting": setting,
                    "KL": round(statistics.fmean(point.kl for _, point in here), 3),
                    "gain": round(statistics.fmean(point.reward - one.start.reward for one, point in here), 3),
                    "share": round(statistics.fmean(one.share([point], point.kl) for one, point in here), 3),
                }
            )
    return rows


def _model(world: Enumerated.Config, dim: int, num_layers: int) -> Decoder.Config:
    return llama.architecture(
        vocab_size=world.vocab_size, context=16, dim=dim, num_layers=num_layers, num_heads=4, hidden_dim=3 * dim
    )


def _training(steps: int, lr: float) -> Training:
    return Training(
        steps=steps, optimizer=AdamW.Config(lr=lr), schedule=Cosine(warmup=steps // 20), log_every=max(1, steps // 20)
    )


SMALL = Enumerated.Config(vocab_size=5, length=3)
WORLD = Enumerated.Config()

PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 17},
    sizes={
        "smoke": Config(
            world=SMALL,
            model=_model(SMALL, 16, 1),
            pretraining=_training(60, 1e-2),
            pairs=256,
            preferring=_training(12, 3e-3),
            batch=32,
            acting=_training(8, 3e-3),
            rollouts=Rollouts.Config(episodes=32, minibatch=16),
            betas=(2.0, 0.5),
            acted=(1.0, 0.5),
            shown=(1.0,),
            parts=(1.0,),
        ),
        "laptop": Config(
            world=WORLD,
            model=_model(WORLD, 64, 2),
            pretraining=_training(600, 3e-3),
            preferring=_training(256, 1e-3),
            acting=_training(400, 1e-3),
            rollouts=Rollouts.Config(episodes=256, minibatch=64),
        ),
        "paper": Config(
            world=WORLD.replace(length=6),
            model=_model(WORLD, 256, 4),
            pretraining=_training(4000, 1e-3),
            pairs=65536,
            preferring=_training(2048, 3e-4),
            acting=_training(4000, 3e-4),
            rollouts=Rollouts.Config(episodes=512, minibatch=64),
        ),
    },
)
