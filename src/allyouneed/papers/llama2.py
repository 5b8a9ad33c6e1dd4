"""Llama 2: Open Foundation and Fine-Tuned Chat Models (Touvron et al., 2023).

arXiv:2307.09288.

Claim   Helpfulness and safety pull at one reward model in two directions, and each is told better by a model of its
        own; gated, the two make a policy safe where it must be and helpful elsewhere, which helpfulness alone does not.
        Fine-tuning on the best of K answers, iteration by iteration, raises what the gated rewards are for, and
        proximal policy optimisation after it raises it further. An instruction of the first turn is kept over the turns
        of a dialogue by a model tuned with Ghost Attention, and forgotten by one that was not.
Here    A world of orders of which some ask for what is forbidden: there the helpful reward and the safe one, both
        exact, contradict each other. Simulated labellers compare pairs by the one or by the other; reward models learn
        with a margin as large as the preference is clear, the one for both from the pairs of both, each of which it
        sees as often as the others see theirs. From SFT, PPO by the gated score is held against PPO by helpfulness
        alone. Rejection sampling takes the best of K by the gated models,
        of all iterations so far, as data; PPO takes the same score whitened. Judged by the exact rewards under the same
        gate, on orders that nothing was trained on. Beside it what K answers are worth: by the models' choice, and the
        exact expected maximum. In dialogues with the same things a standing order of the first turn says how all
        answers end; both arms are trained as long, on the same dialogues, one with the sampled last answers beside.
Apart   0.2 million parameters and eighty words for 7 to 70 billion and English. Reward models are not trained anew for
        each iteration; unsafe orders are tagged by the world, as those of the authors' safety prompts were. A policy
        that refuses all it should is no red team's finding: of the world's 108 unsafe orders 22 are held out. Whether
        margins help is shown and not judged: in the paper it is a fraction of a percent. Grouped-query attention stands
        in the presets, with published sizes and counts.
        Sizes and rates were chosen by single runs with another seed. In a run of three seeds before the published one
        Ghost Attention did harm, since its teacher kept the order in 21 % of its answers; that teacher has since been
        shown orders which earlier answers had not kept, for three times the steps. Nothing else was changed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from allyouneed import core
from allyouneed.align import selection
from allyouneed.align.gating import THRESHOLD, Gated
from allyouneed.align.graders import RewardModel
from allyouneed.align.language_ppo import LanguagePPO
from allyouneed.align.rejection import Rejection
from allyouneed.align.rewards import Normalised, Reward
from allyouneed.align.rollouts import Rollouts
from allyouneed.core.seeds import derive
from allyouneed.data.dialogues import SPOKEN, TEMPLATE
from allyouneed.data.guarded import REFUSAL, Guarded
from allyouneed.data.labellers import Labeller
from allyouneed.data.orders import Order
from allyouneed.data.preferences import Ranked
from allyouneed.models import llama2
from allyouneed.models.decoder import Decoder
from allyouneed.objectives.next_token import next_token
from allyouneed.objectives.policy import FixedKl
from allyouneed.papers import aligned, figures, standing
from allyouneed.papers.aligned import Speaker, Stage
from allyouneed.papers.base import Paper, Report
from allyouneed.papers.standing import FORGOT, KEPT, Ghosts
from allyouneed.train.loop import Training, train

SFT, HELPFUL, GATED = "SFT", "PPO, helpful alone", "PPO, gated"  # both policies begin as SFT
JUDGED = ("judged", "helpful on safe orders", "safe on unsafe orders", "refused safe orders")
CLEAR = ((0.5, 1.0), (0.25, 2 / 3), (0.1, 1 / 3), (0.0, 0.0))  # from which difference on, what margin (table 27, small)


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The world, the stages, and the margins of the verdict."""

    model: Decoder.Config
    world: Guarded.Config
    base: Stage
    demonstrated: Stage
    compared: Stage  # its steps are those of the helpful pairs; of other sets each pair is seen as often
    rejection: Rejection.Config
    selected: Training  # by it; its steps follow
    rollouts: Rollouts.Config
    reinforced: Stage
    labeller: Labeller.Config
    ghosts: Ghosts
    texts: int = 20_000
    demonstrations: int = 2000
    careful: float = 0.5
    mixed: float = 0.1  # texts beside the demonstrations, for each of them
    refuses: float = 0.3  # the share of unsafe orders that demonstrations refuse
    comparisons: int = 2000  # pairs for each of the two
    prompts: int = 1024
    iterations: int = 3
    sweep: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    most: int = 8
    threshold: float = THRESHOLD
    judged: int = 384
    swept: int = 96  # orders of the sweep over K
    tells: float = 0.02  # accuracy of a reward model of its own minus that of one for both: above
    guards: float = 0.3  # safe reward on unsafe orders, PPO of the gated score minus of the helpful one alone: above
    helps: float = 0.0  # helpful reward on safe orders, PPO of the gated score minus SFT: above
    rises: float = 0.03  # judged reward, last iteration minus SFT: above
    goes_on: float = 0.0  # judged reward, last iteration minus the first, and PPO minus the last iteration: above
    keeps: float = 0.5  # share of later turns in which the order is kept, with Ghost Attention minus without: above


def run(config: Config, report: Report) -> None:
    """All stages with each seed, all policies judged by the exact rewards, the dialogues turn by turn."""
    work = {"rewards": _rewards, "dialogues": _ghosts}
    found = report.repeat(work, lambda part, seed, folder: part(config, seed, folder))
    rewards, dialogues = found["rewards"], found["dialogues"]
    for name in ("helpful", "safe"):
        values = [one["accuracy"][name]["its own"] - one["accuracy"][name]["one for both"] for one in rewards]
        report.check(
            f"accuracy on {name} pairs, a model of its own minus one for both", values=values, above=config.tells
        )
    arms = {name: [one["arms"][name] for one in rewards] for name in rewards[0]["arms"]}
    first, last, after = _iteration(1), _iteration(config.iterations), _after(config.iterations)
    for one, other, key, above in (
        (GATED, HELPFUL, "safe on unsafe orders", config.guards),
        (GATED, SFT, "helpful on safe orders", config.helps),
        (last, SFT, "judged", config.rises),
        (last, first, "judged", config.goes_on),
        (after, last, "judged", config.goes_on),
    ):
        values = [a[key] - b[key] for a, b in zip(arms[one], arms[other], strict=True)]
        report.check(f"{key}, {one} minus {other}", values=values, above=above)
    later = [standing.later(one["kept"][KEPT]) - standing.later(one["kept"][FORGOT]) for one in dialogues]
    report.check(f"order kept in turns 2 and on, {KEPT} minus {FORGOT}", values=later, above=config.keeps)
    _record(config, report, rewards, arms, dialogues)


def _iteration(number: int) -> str:
    return f"rejection sampling {number}"


def _after(iterations: int) -> str:
    return f"PPO after {_iteration(iterations)}"


def _vocabulary(config: Config) -> Any:
    """One tokenizer for orders, refusals and dialogues."""
    orders = config.world.build().orders
    return orders.tokenizer(*REFUSAL.split(), *SPOKEN, chat_template=TEMPLATE)


def _base(config: Config, seed: int, folder: Path) -> Speaker:
    texts = _texts(config, seed)
    return aligned.base(config.model, _vocabulary(config), texts, config.base, config.most, seed, folder)


def _texts(config: Config, seed: int) -> list[str]:
    """The world's text, which no order stands in."""
    return config.world.orders.build().texts(config.texts, seed)


def _ghosts(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    return standing.dialogues(config.ghosts, _base(config, seed, folder), seed, folder)


# two rewards


class _Judge:
    """Judges speakers by the exact rewards, under the gate, on held-out orders."""

    def __init__(self, config: Config, world: Guarded, seed: int) -> None:
        self.config, self.world, self.seed = config, world, seed
        self.orders = world.asked(config.judged, seed=0, held_out=True)
        self.prompts = [order.prompt for order in self.orders]

    def worth(self, orders: Sequence[Order], said: Sequence[str]) -> list[float]:
        """The exact rewards under the gate, all of them shares and no logits."""
        found = []
        for order, text in zip(orders, said, strict=True):
            safe = self.world.safe(order, text)
            decides = self.world.unsafe(order) or safe < self.config.threshold
            found.append(safe if decides else self.world.helpful(order, text))
        return found

    def judge(self, speaker: Speaker) -> dict[str, float]:
        """Everything that is asked of a policy."""
        said = [one.text for one in speaker.answers(self.prompts, self.seed)]
        pairs = list(zip(self.orders, said, strict=True))
        safe, unsafe = ([pair for pair in pairs if self.world.unsafe(pair[0]) == one] for one in (False, True))
        found = (
            _mean(self.worth(self.orders, said)),
            _mean(self.world.helpful(*pair) for pair in safe),
            _mean(self.world.safe(*pair) for pair in unsafe),
            _mean(float(text == REFUSAL) for _, text in safe),
        )
        return dict(zip(JUDGED, found, strict=True))


def _rewards(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    world = config.world.build()
    base = _base(config, seed, folder)
    shown, texts = _shown(config, world, seed), _texts(config, seed)
    sft = aligned.tuned(
        base, shown, texts[: round(config.mixed * len(shown))], config.demonstrated, seed, folder / "sft"
    )
    judge = _Judge(config, world, seed)
    models, accuracy = _models(config, world, sft, seed, folder)
    scale = [order.prompt for order in world.asked(256, seed + 2)]
    said = [one.text for one in sft.answers(scale, seed + 2)]
    helpful, safe = (Normalised.on(models[name], scale, said) for name in ("helpful", "safe"))
    gated = Gated(helpful, safe, lambda prompt: world.unsafe(Order.parse(str(prompt))), config.threshold)
    arms = {SFT: judge.judge(sft)}
    prompts = [order.prompt for order in world.asked(config.prompts, seed + 3)]
    speaker, rows = _iterated(config, judge, sft, gated, prompts, seed, folder / "selected")
    arms |= {_iteration(number): row for number, row in enumerate(rows, start=1)}
    policies = ((_after(config.iterations), speaker, gated), (GATED, sft, gated), (HELPFUL, sft, helpful))
    for name, begin, score in policies:
        arms[name] = judge.judge(_policy(config, begin, score, prompts, seed, folder / name.replace(", ", "-")))
    return {"arms": arms, "accuracy": accuracy, "sweep": _sweep(config, judge, sft, gated, seed)}


def _shown(config: Config, world: Guarded, seed: int) -> list[tuple[str, str]]:
    """Demonstrations of mixed quality."""
    source = random.Random(derive(seed, "shown"))
    found = []
    for order in world.asked(config.demonstrations, seed):
        slips = 0 if source.random() < config.careful else source.randint(1, 3)
        found.append((order.prompt, world.demonstrate(order, source, refuses=config.refuses, slips=slips)))
    return found


def _clear(gap: float) -> float:
    """The margin of a pair by how much better one is."""
    return next(margin for least, margin in CLEAR if gap >= least)


def _models(
    config: Config, world: Guarded, sft: Speaker, seed: int, folder: Path
) -> tuple[dict[str, RewardModel], Any]:
    """A reward model for each, one for both, and the helpful one without margins; their accuracy by the truth."""
    truths = {"helpful": lambda p, c: world.both(p, c)[0], "safe": lambda p, c: world.both(p, c)[1]}
    drawn = {n: [o.prompt for o in world.asked(config.comparisons, seed + i)] for i, n in enumerate(truths, start=10)}
    pairs = {
        name: aligned.ranked(sft, drawn[name], truth, config.labeller.build(), 2, seed + 10, _clear)
        for name, truth in truths.items()
    }
    plain = [Ranked(one.pieces, one.ranks) for one in pairs["helpful"]]
    sets = pairs | {"both": [*pairs["helpful"], *pairs["safe"]], "helpful without margins": plain}
    models = {}
    for name, some in sets.items():  # each pair is seen as often, whichever set it is in
        how = aligned.lasting(config.compared, len(some) / len(plain))
        models[name] = aligned.graded(sft, some, how, seed, folder, name)
    held_out = [order.prompt for order in world.asked(4 * config.judged, seed=1, held_out=True)]
    accuracy = {}
    for name, truth in truths.items():
        tested = aligned.ranked(sft, held_out, truth, None, 2, seed + 12)
        accuracy[name] = {
            "its own": aligned.right(models[name], tested),
            "one for both": aligned.right(models["both"], tested),
        }
        if name == "helpful":
            accuracy[name]["its own, without margins"] = aligned.right(models["helpful without margins"], tested)
    return models, accuracy


def _iterated(
    config: Config, judge: _Judge, sft: Speaker, score: Reward, prompts: Sequence[str], seed: int, folder: Path
) -> tuple[Speaker, list[dict[str, float]]]:
    """The speaker tuned on the best of K of its answers, iteration by iteration, and how it was judged after each."""
    found = sft.copy()
    log = folder / "iterations.jsonl"
    batches = Rejection(found.module, found.sampler(), score, prompts, config.rejection, seed=seed, log=log)
    steps = batches.steps
    training = config.selected.replace(
        steps=steps * config.iterations, evaluate_every=steps, log_every=steps, seed=seed
    )
    done = train(
        found.module,
        next_token,
        batches,
        training,
        folder=folder,
        evaluate=lambda module: judge.judge(Speaker(module, sft.tokenizer, sft.most)),  # type: ignore[arg-type]
        title="  select",
    )
    found.module.eval()
    return found, [{key: row[key] for key in JUDGED} for row in done.history if "judged" in row]


def _policy(
    config: Config, speaker: Speaker, score: Reward, prompts: Sequence[str], seed: int, folder: Path
) -> Speaker:
    found, _ = aligned.reinforced(
        speaker, score, prompts, config.rollouts, LanguagePPO(), config.reinforced, seed, folder
    )
    return found


def _sweep(config: Config, judge: _Judge, sft: Speaker, gated: Reward, seed: int) -> list[dict[str, float]]:
    """What the best of K answers is worth: by the models' choice, and by the truth's, the exact expected maximum."""
    most, orders = max(config.sweep), judge.orders[: config.swept]
    asked = [order for order in orders for _ in range(most)]
    prompts = [order.prompt for order in asked]
    said = [one.text for one in sft.answers(prompts, seed + 20)]
    worth, scores = judge.worth(asked, said), list(gated(prompts, said))
    found = []
    for k in config.sweep:
        chosen, exact = [], []
        for start in range(0, len(asked), most):
            places = range(start, start + k)
            chosen.append(worth[max(places, key=scores.__getitem__)])
            exact.append(selection.estimated_best(worth[start : start + most], k))
        found.append({"k": k, "by the models": _mean(chosen), "expected maximum": _mean(exact)})
    return found


# what is shown


def _record(
    config: Config,
    report: Report,
    rewards: list[dict[str, Any]],
    arms: dict[str, list[dict[str, float]]],
    dialogues: list[dict[str, Any]],
) -> None:
    size = config.model.num_parameters()
    for name in (*arms, KEPT, FORGOT):
        report.arm(name, parameters=size)
    report.table(
        "policies on held-out orders by the exact rewards, means over seeds",
        [{"policy": name, **{key: _mean(one[key] for one in some) for key in some[0]}} for name, some in arms.items()],
    )
    report.table("accuracy of reward models on held-out pairs, means over seeds", _accuracies(rewards))
    sampled = _mean(one["sampled answers that keep it"] for one in dialogues)
    report.note(f"{sampled:.1%} of the answers that were sampled for Ghost Attention keep the order themselves.")
    figure, (left, middle, right) = figures.new(13, 4.2, columns=3)
    _iterations(report, left, arms)
    _choices(report, middle, rewards)
    _turns(report, right, dialogues)
    report.figure(
        figure,
        "Left: exact rewards of each policy. Middle: what the best of K answers of SFT is worth. Right: share "
        "of dialogues in which the order of the first turn is kept. Bands: lowest to highest seed.",
    )


def _accuracies(rewards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"pairs": kind, "model": name, "accuracy": _mean(one["accuracy"][kind][name] for one in rewards)}
        for kind, models in rewards[0]["accuracy"].items()
        for name in models
    ]


def _iterations(report: Report, axes: Axes, arms: dict[str, list[dict[str, float]]]) -> None:
    names = [name for name in arms if name not in (HELPFUL, GATED)]
    places = list(range(len(names)))
    for key in ("judged", "helpful on safe orders", "safe on unsafe orders"):
        lines = [[one[key] for one in seed] for seed in zip(*(arms[name] for name in names), strict=True)]
        report.curve(key, places, lines, x_label="policy", y_label="exact reward")
        figures.band(axes, places, lines, key)
    axes.set_xticks(places, ["SFT", *(f"RS {n}" for n in places[1:-1]), "PPO"])
    axes.legend(fontsize=8)
    figures.describe(axes, title="Iteration by iteration", y="exact reward")


def _choices(report: Report, axes: Axes, rewards: list[dict[str, Any]]) -> None:
    ks = [row["k"] for row in rewards[0]["sweep"]]
    for key, color in (("expected maximum", figures.CONTROL), ("by the models", figures.PALETTE[0])):
        lines = [[row[key] for row in one["sweep"]] for one in rewards]
        report.curve(f"best of K, {key}", ks, lines, x_label="K", y_label="exact reward")
        figures.band(axes, ks, lines, key, color)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, list(map(str, ks)))
    axes.legend(fontsize=8)
    figures.describe(axes, title="The best of K", x="K answers", y="exact reward under the gate")


def _turns(report: Report, axes: Axes, dialogues: list[dict[str, Any]]) -> None:
    turns = list(range(1, 1 + len(dialogues[0]["kept"][KEPT])))
    for name, color in ((KEPT, figures.PALETTE[0]), (FORGOT, figures.CONTROL)):
        lines = [one["kept"][name] for one in dialogues]
        report.curve(name, turns, lines, x_label="turn", y_label="share of dialogues")
        figures.band(axes, turns, lines, name, color)
    axes.legend(fontsize=8)
    figures.describe(axes, title="An order of the first turn", x="turn", y="kept in so many dialogues")


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return round(sum(every) / len(every), 4) if every else 0.0


def _rollouts(episodes: int, minibatch: int, beta: float) -> Rollouts.Config:
    """Scores are whitened before the penalty (sec. 3.2.3)."""
    return Rollouts.Config(
        episodes=episodes, minibatch=minibatch, epochs=2, max_new_tokens=8, kl=FixedKl(beta=beta), whiten_scores=True
    )


_CONTEXT = 192
_WORDS = 65 + len(REFUSAL.split()) + len(SPOKEN)  # of the orders, refusals and dialogues

PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.3, "laptop": 37},
    sizes={
        "smoke": Config(
            model=aligned.small(16, 1, vocab_size=_WORDS, context=_CONTEXT),
            world=Guarded.Config(),
            base=aligned.stage(6, 3e-3, rows=8),
            demonstrated=aligned.stage(6, 3e-3, rows=8),
            compared=aligned.stage(4, 1e-3, rows=8),
            rejection=Rejection.Config(samples=2, max_new_tokens=8, batch=8),
            selected=aligned.stage(1, 1e-3).training,
            rollouts=_rollouts(16, 8, 0.05),
            reinforced=aligned.stage(8, 1e-3),
            labeller=Labeller.Config(),
            ghosts=Ghosts(
                tuned=aligned.stage(4, 3e-3, rows=8),
                ghosted=aligned.stage(4, 3e-3, rows=8),
                dialogues=24,
                trained_turns=3,
                turns=3,
                tested=8,
            ),
            texts=64,
            demonstrations=64,
            comparisons=24,
            prompts=16,
            iterations=2,
            sweep=(1, 2),
            judged=16,
            swept=8,
        ),
        "laptop": Config(
            model=aligned.small(64, 3, vocab_size=_WORDS, context=_CONTEXT),
            world=Guarded.Config(),
            base=aligned.stage(1200, 3e-3),
            demonstrated=aligned.stage(300, 1e-3),
            compared=aligned.stage(250, 1e-3, rows=32),
            rejection=Rejection.Config(max_new_tokens=8, batch=64, epochs=4.0),
            selected=aligned.stage(1, 5e-4).training,
            rollouts=_rollouts(256, 64, 0.05),
            reinforced=aligned.stage(160, 5e-4),
            labeller=Labeller.Config(temperature=0.15, careless=0.1),
            ghosts=Ghosts(tuned=aligned.stage(1500, 1e-3, rows=32), ghosted=aligned.stage(300, 1e-3, rows=32)),
        ),
        # sec. 3.1 to 3.2: SFT 2e-5, 64 rows, rewards 5e-6 (70B; else 1e-5), 512 pairs, one epoch; PPO 1e-6 with
        # batches of 512 and minibatches of 64
        "paper": Config(
            model=llama2.sized("70B"),
            world=Guarded.Config(),
            base=aligned.stage(500_000, 1.5e-4, rows=1024),
            demonstrated=aligned.stage(860, 2e-5),
            compared=aligned.stage(1385, 5e-6, rows=512),
            rejection=Rejection.Config(samples=64, temperature=1.2, max_new_tokens=8, batch=64, epochs=2.0),
            selected=aligned.stage(1, 2e-5).training,
            rollouts=_rollouts(512, 64, 0.005),
            reinforced=aligned.stage(3200, 1e-6),
            labeller=Labeller.Config(temperature=0.15, careless=0.1),
            ghosts=Ghosts(tuned=aligned.stage(860, 2e-5), ghosted=aligned.stage(860, 2e-5), turns=20),
            demonstrations=27_540,
            comparisons=709_045,
            prompts=20_000,
            iterations=4,
        ),
    },
)
