"""Proximal Policy Optimization Algorithms (Schulman et al., 2017). arXiv:1707.06347.

Claim   Many epochs of gradient steps on one rollout are safe if what pays beyond a ratio of 1 ± ε is clipped away:
        with ε = 0.2 the policy scores clearly higher than without clipping or penalty, and no lower than with a
        penalty on the divergence, be its weight fixed (β = 3, the paper's best) or adapted to a target (0.01, the
        paper's best).
Here    Eleven arms, those of the paper's table 1, on one actor-critic, one loop and the same environments: only the
        surrogate and the weight of the penalty change. The score is the paper's: the mean return of a run's last 100
        episodes, shifted and scaled in each environment so that the policy before training has 0 and the best run 1,
        and averaged over environments. Hyper-parameters are those of the paper's table 3, the networks two of 64 × 64
        with tanh that share nothing, without a bonus for entropy.
Apart   Two tasks of classic control, whose actions are choices, and the lunar lander with continuous thrust instead of
        seven MuJoCo robots; a twenty-fourth of the interactions. Eight environments take 256 steps each where one takes
        2048, which makes as many actions a rollout. The networks' initialisation and the scaling of advantages, in each
        minibatch, are those of the authors' code, of which the paper says nothing. Gradients are not clipped: the paper
        calls the weight of the critic's loss irrelevant (sec. 6.1), and with clipping it would not be. Neither the
        comparison with other methods (sec. 6.2) nor Atari nor humanoids are shown. A run that diverges would count with
        the episodes before it did, where another would say with nothing; none did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from allyouneed import core
from allyouneed.align.actor_critic import ActorCritic
from allyouneed.align.environments import Environments
from allyouneed.align.interaction import Interaction
from allyouneed.align.returns import play
from allyouneed.core.metrics import read
from allyouneed.core.seeds import derive, seed_everything
from allyouneed.evaluate.statistics import student_t
from allyouneed.objectives.policy import AdaptiveKl, FixedKl
from allyouneed.objectives.ppo import Clipped, Ppo, Unclipped
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Trained, Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Constant

Penalty = FixedKl | AdaptiveKl | None

# name: surrogate, penalty, score in the paper's table 1
ARMS: dict[str, tuple[Clipped | Unclipped, Penalty, float]] = {
    "no clipping or penalty": (Unclipped(), None, -0.39),
    "clipping, ε = 0.1": (Clipped(epsilon=0.1), None, 0.76),
    "clipping, ε = 0.2": (Clipped(epsilon=0.2), None, 0.82),
    "clipping, ε = 0.3": (Clipped(epsilon=0.3), None, 0.70),
    "adaptive KL, target 0.003": (Unclipped(), AdaptiveKl(target=0.003), 0.68),
    "adaptive KL, target 0.01": (Unclipped(), AdaptiveKl(target=0.01), 0.74),
    "adaptive KL, target 0.03": (Unclipped(), AdaptiveKl(target=0.03), 0.71),
    "fixed KL, β = 0.3": (Unclipped(), FixedKl(beta=0.3), 0.62),
    "fixed KL, β = 1": (Unclipped(), FixedKl(beta=1.0), 0.71),
    "fixed KL, β = 3": (Unclipped(), FixedKl(beta=3.0), 0.72),
    "fixed KL, β = 10": (Unclipped(), FixedKl(beta=10.0), 0.69),
}
CLIPPED, FREE = "clipping, ε = 0.2", "no clipping or penalty"
PENALISED = ("adaptive KL, target 0.01", "fixed KL, β = 3")


@dataclass(frozen=True, kw_only=True)
class Recipe(core.Config):
    """How a policy is learned in one environment; defaults are those of table 3, eight environments instead of one."""

    environment: Environments.Config
    interactions: int
    interaction: Interaction.Config = field(default_factory=lambda: Interaction.Config(steps=256))
    model: ActorCritic.Config = field(default_factory=ActorCritic.Config)
    objective: Ppo = field(default_factory=Ppo)
    lr: float = 3e-4
    clip: float | None = None  # the gradient's norm

    def learn(self, seed: int, folder: Path | None = None, *, quiet: bool = False) -> tuple[Interaction, Trained]:
        """Train a new policy; its last rollouts, which have the module, and how it went, rollout by rollout.

        Raises:
            InputError: no such environment, or sizes that do not fit together.
        """
        seed_everything(seed)
        environments = self.environment.build(seed=seed)
        module = self.model.build(environments.width, environments.actions)
        rollouts = self.interaction.build(module, environments, seed=seed)
        training = self._training(rollouts).replace(seed=seed)
        title = f"  {self.environment.name}"
        how: dict[str, Any] = {"folder": folder, "evaluate": rollouts.measured, "title": title, "quiet": quiet}
        return rollouts, train(module, self.objective, rollouts, training, **how)

    def _training(self, rollouts: Interaction) -> Training:
        number = -(-self.interactions // rollouts.actions)
        return Training(
            steps=number * rollouts.updates,
            optimizer=AdamW.Config(lr=self.lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0),  # Adam (`baselines`)
            schedule=Constant(),
            clip=self.clip,
            log_every=rollouts.updates,
            evaluate_every=rollouts.updates,
        )


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """Where policies are learned, and the margins of the verdict in normalised score."""

    recipes: tuple[Recipe, ...]
    episodes: int = 100  # that the policy before training plays
    gain: float = 0.2  # clipping over neither clipping nor penalty
    not_worse: float = 0.1  # clipping against penalties


def run(config: Config, report: Report) -> None:
    """Learn with each arm in each environment with each seed, and compare the scores."""
    recipes = {recipe.environment.name: recipe for recipe in config.recipes}
    if len(recipes) < len(config.recipes):
        raise core.InputError("recipes: two are of the same environment")
    found = report.repeat({f"{env}, {arm}": (recipes[env], arm) for env in recipes for arm in ARMS}, _learned)
    before = {
        env: report.job(f"before/{env}", lambda folder, recipe=recipe: _before(recipe, config.episodes))  # type: ignore[misc]
        for env, recipe in recipes.items()
    }
    raw = {arm: {env: [one["score"] for one in found[f"{env}, {arm}"]] for env in recipes} for arm in ARMS}
    scores = _normalised(raw, before)
    _record(report, recipes, scores, raw, before, found)
    _figures(report, recipes, scores, found)
    means = {arm: np.mean([scores[arm][env] for env in recipes], axis=0) for arm in ARMS}  # (seeds)
    report.check(f"{CLIPPED} minus {FREE}", values=(means[CLIPPED] - means[FREE]).tolist(), above=config.gain)
    for arm in PENALISED:
        report.check(f"{CLIPPED} minus {arm}", values=(means[CLIPPED] - means[arm]).tolist(), above=-config.not_worse)


def _learned(arm: tuple[Recipe, str], seed: int, folder: Path) -> dict[str, Any]:
    """The mean return of the last hundred episodes, at the end and along the way."""
    recipe, (surrogate, penalty, _) = arm[0], ARMS[arm[1]]
    interaction = recipe.interaction.replace(kl=penalty)
    recipe = recipe.replace(interaction=interaction, objective=recipe.objective.replace(surrogate=surrogate))
    diverged = ""
    try:
        recipe.learn(seed, folder)
    except core.InputError as error:  # a loss that is not finite: what was reached by then is the result
        diverged = str(error)
    rows = [row for row in read(folder / "metrics.jsonl") if "episode_return" in row]
    if not rows:
        ended = f"{recipe.environment.name}: no episode ended in {recipe.interactions} interactions"
        raise core.InputError(diverged or ended)
    return {
        "score": rows[-1]["episode_return"],
        "interactions": [row["interactions"] for row in rows],
        "returns": [row["episode_return"] for row in rows],
        "diverged": diverged,
    }


def _before(recipe: Recipe, episodes: int) -> float:
    """The mean return of a policy that was not trained, which is random."""
    seed_everything(0)
    environments = recipe.environment.build(seed=derive(0, "before"))
    module = recipe.model.build(environments.width, environments.actions)
    act, source = module.acting(), np.random.default_rng(0)
    kind = environments.actions
    returns = play(environments, lambda states: act(states, kind.noise(source, environments.count)), episodes)
    return float(np.mean(returns))


def _normalised(
    raw: Mapping[str, Mapping[str, Sequence[float]]], before: Mapping[str, float]
) -> dict[str, dict[str, list[float]]]:
    """0 for the policy before training, 1 for the best run of any arm (sec. 6.1)."""
    best = {env: max(max(values[env]) for values in raw.values()) for env in before}
    return {
        arm: {
            env: [(x - before[env]) / max(best[env] - before[env], 1e-9) for x in values] for env, values in by.items()
        }
        for arm, by in raw.items()
    }


def _record(
    report: Report,
    recipes: Mapping[str, Recipe],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    raw: Mapping[str, Mapping[str, Sequence[float]]],
    before: Mapping[str, float],
    found: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    report.table(
        "normalised scores, the mean over environments beside the paper's",
        [
            {"arm": arm}
            | {env: round(float(np.mean(scores[arm][env])), 2) for env in recipes}
            | {"mean": round(float(np.mean(list(scores[arm].values()))), 2), "paper's": ARMS[arm][2]}
            for arm in ARMS
        ],
    )
    report.table(
        "returns of the last 100 episodes, means over seeds",
        [
            {"arm": "before training"} | {env: round(before[env], 1) for env in recipes},
            *({"arm": arm} | {env: round(float(np.mean(raw[arm][env])), 1) for env in recipes} for arm in ARMS),
        ],
    )
    for name, runs in found.items():
        for seed, one in zip(report.seeds, runs, strict=True):
            if one["diverged"]:
                report.note(f"{name}, seed {seed}: {one['diverged']}; its score is of the episodes before.")
    interactions = {f"interactions, {env}": recipe.interactions for env, recipe in recipes.items()}
    for arm in ARMS:
        report.arm(arm, **interactions)


def _figures(
    report: Report,
    recipes: Mapping[str, Recipe],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    found: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    figure, (axes,) = figures.new(7, 4.6)
    means = {arm: np.mean([scores[arm][env] for env in recipes], axis=0).tolist() for arm in ARMS}
    intervals = [(t.low, t.high) for t in map(student_t, means.values())] if len(report.seeds) > 1 else None
    kinds = dict.fromkeys(arm.split()[0] for arm in ARMS if arm != FREE)
    colors = dict(zip(kinds, figures.PALETTE, strict=False))
    colored = [colors.get(arm.split()[0], figures.CONTROL) for arm in ARMS]
    figures.bars(axes, list(means), [float(np.mean(x)) for x in means.values()], intervals, colored, form="{:.2f}")
    figures.describe(axes, title="Score after as many interactions", x="normalised score (before training 0, best 1)")
    report.figure(figure, "Mean over environments and seeds with its 95 % interval over seeds; higher is better.")
    curves, columns = figures.new(4.2 * len(recipes), 3.8, columns=len(recipes))
    for env, axis in zip(recipes, columns, strict=True):
        for arm in (CLIPPED, *PENALISED, FREE):
            runs = found[f"{env}, {arm}"]
            shortest = min(len(one["returns"]) for one in runs)  # the first episodes end sooner or later
            x = runs[0]["interactions"][-shortest:]
            ys = [one["returns"][-shortest:] for one in runs]
            figures.band(axis, x, ys, arm, figures.CONTROL if arm == FREE else None)
            report.curve(f"{env}, {arm}", x, ys, x_label="interactions", y_label="return")
        figures.describe(axis, title=env, x="interactions", y="return, last 100 episodes")
    columns[0].legend(fontsize=8)
    report.figure(curves, "Returns along the way; band: lowest to highest seed.", name="curves")


def _environment(name: str, count: int = 8) -> Environments.Config:
    return Environments.Config(name=name, count=count)


# Sec. 6.1, in Gymnasium's present versions of the seven
ROBOTS = ("HalfCheetah", "Hopper", "InvertedDoublePendulum", "InvertedPendulum", "Reacher", "Swimmer", "Walker2d")

PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 20},
    sizes={
        "smoke": Config(
            recipes=tuple(
                Recipe(
                    environment=_environment(name, count=4),
                    interactions=1024,
                    interaction=Interaction.Config(steps=64, epochs=2, minibatch=128),
                )
                for name in ("CartPole-v1", "Pendulum-v1")
            ),
            episodes=4,
        ),
        "laptop": Config(
            recipes=(
                Recipe(environment=_environment("CartPole-v1"), interactions=40_960),
                Recipe(environment=_environment("Acrobot-v1"), interactions=40_960),
                Recipe(environment=_environment("LunarLanderContinuous-v3"), interactions=40_960),
            ),
        ),
        "paper": Config(
            recipes=tuple(
                Recipe(
                    environment=_environment(f"{name}-v5", count=1),
                    interactions=10**6,
                    interaction=Interaction.Config(steps=2048),
                )
                for name in ROBOTS
            ),
        ),
    },
)
