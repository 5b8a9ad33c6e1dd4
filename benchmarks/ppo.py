"""Proximal policy optimisation beside stable-baselines3, with equal hyper-parameters, one thread, in turns.

    python benchmarks/ppo.py [--environment CartPole-v1 ...] [--seeds N] [--interactions N] [--json FILE]

Both learn in the same environments with the same seeds, one after the other, each seed beginning with the other. What
is compared: the wall and the processor time of learning; the mean return of 100 episodes that the learned policy then
plays in environments of one seed, doing what it holds likeliest; and the interactions after which the last 100 episodes
of training first averaged the threshold at which Gymnasium, or where it names none the field, calls the task solved.
Ratios are medians over pairs; on a busy machine those of processor time mean more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allyouneed.align.environments import Environments
from allyouneed.align.interaction import Interaction
from allyouneed.align.returns import play
from allyouneed.evaluate.statistics import student_t
from allyouneed.objectives.ppo import Ppo
from allyouneed.papers.ppo import Recipe

# those of rl-baselines3-zoo, schedules made constant and nothing normalised
RECIPES = {
    "CartPole-v1": Recipe(
        environment=Environments.Config(name="CartPole-v1", count=8),
        interactions=100_000,
        interaction=Interaction.Config(steps=32, epochs=20, minibatch=256, gamma=0.98, lam=0.8),
        lr=1e-3,
        clip=0.5,
    ),
    "Acrobot-v1": Recipe(
        environment=Environments.Config(name="Acrobot-v1", count=16),
        interactions=200_000,
        interaction=Interaction.Config(steps=256, epochs=4, minibatch=64, gamma=0.99, lam=0.94),
        clip=0.5,
    ),
    "LunarLander-v3": Recipe(
        environment=Environments.Config(name="LunarLander-v3", count=16),
        interactions=1_000_000,
        interaction=Interaction.Config(steps=1024, epochs=4, minibatch=64, gamma=0.999, lam=0.98),
        objective=Ppo(entropy_weight=0.01),
        clip=0.5,
    ),
    "Pendulum-v1": Recipe(
        environment=Environments.Config(name="Pendulum-v1", count=4),
        interactions=200_000,
        interaction=Interaction.Config(steps=1024, epochs=10, minibatch=64, gamma=0.9, lam=0.95),
        lr=1e-3,
        clip=0.5,
    ),
}
THRESHOLDS = {"CartPole-v1": 475.0, "Acrobot-v1": -100.0, "LunarLander-v3": 200.0, "Pendulum-v1": -200.0}


@dataclass(frozen=True)
class Learned:
    """One run."""

    wall: float  # seconds
    processor: float
    played: float
    reached: float  # interactions, infinite where the threshold never was

    @staticmethod
    def of(recipe: Recipe, spent: tuple[float, float], act: Any, curve: list[tuple[int, float]]) -> Learned:
        environments = recipe.environment.replace(count=10).build(seed=10_000)
        played = float(np.mean(play(environments, act, episodes=100)))
        threshold = THRESHOLDS[recipe.environment.name]
        return Learned(*spent, played, next((float(n) for n, x in curve if x >= threshold), float("inf")))


def clocked(work: Any) -> tuple[Any, tuple[float, float]]:
    wall, processor = time.perf_counter(), time.process_time()
    found = work()
    return found, (time.perf_counter() - wall, time.process_time() - processor)


def ours(recipe: Recipe, seed: int) -> Learned:
    (rollouts, trained), spent = clocked(lambda: recipe.learn(seed, quiet=True))
    curve = [(row["interactions"], row["episode_return"]) for row in trained.history if "episode_return" in row]
    return Learned.of(recipe, spent, rollouts.module.acting(), curve)


def theirs(recipe: Recipe, seed: int) -> Learned:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Curve(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.points: list[tuple[int, float]] = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            if self.model.ep_info_buffer:
                mean = float(np.mean([one["r"] for one in self.model.ep_info_buffer]))
                self.points.append((self.num_timesteps, mean))

    how, objective = recipe.interaction, recipe.objective
    plain = {"render_mode": None}  # else it is rgb_array: a lander's exhaust is made, and goes only when it is drawn
    environments = make_vec_env(recipe.environment.name, n_envs=recipe.environment.count, seed=seed, env_kwargs=plain)
    peer = PPO("MlpPolicy", environments, seed=seed, device="cpu", n_steps=how.steps, batch_size=how.minibatch,
               n_epochs=how.epochs, gamma=how.gamma, gae_lambda=how.lam, clip_range=objective.surrogate.epsilon,
               ent_coef=objective.entropy_weight, vf_coef=objective.value_weight, max_grad_norm=recipe.clip,
               learning_rate=recipe.lr)  # fmt: skip
    curve = Curve()
    _, spent = clocked(lambda: peer.learn(recipe.interactions, callback=curve))
    mine = Environments.Config(name=recipe.environment.name).build(seed=0).actions  # they number actions from 0 too
    assert getattr(mine, "start", 0) == 0
    return Learned.of(recipe, spent, lambda states: peer.predict(states, deterministic=True)[0], curve.points)


def compared(recipe: Recipe, seeds: int) -> dict[str, Any]:
    found: dict[str, list[Learned]] = {"ours": [], "theirs": []}
    for seed in range(seeds):
        turns = [("ours", ours), ("theirs", theirs)]
        for name, learn in turns if seed % 2 == 0 else reversed(turns):
            found[name].append(learn(recipe, seed))
            one = found[name][-1]
            took = f"{one.wall:6.1f} s, {one.processor:.1f} of processor time"
            line = f"{recipe.environment.name} seed {seed} {name:6} {took}; {one.played:.1f}"
            print(f"{line}, threshold after {one.reached:g}", flush=True)
    facts: dict[str, Any] = {}
    for clock in ("wall", "processor"):
        pairs = zip(found["ours"], found["theirs"], strict=True)
        facts[clock] = statistics.median(getattr(a, clock) / getattr(b, clock) for a, b in pairs)
    for name, runs in found.items():
        returns = [one.played for one in runs]
        interval = student_t(returns) if seeds > 1 else None
        facts[name] = {
            "wall": [one.wall for one in runs],
            "processor": [one.processor for one in runs],
            "played": returns,
            "interval": [interval.low, interval.high] if interval else None,
            "reached": [one.reached if np.isfinite(one.reached) else None for one in runs],
        }
    return facts


def told(name: str, facts: dict[str, Any]) -> None:
    times = f"wall {facts['wall']:.2f}, processor {facts['processor']:.2f} of stable-baselines3's"
    print(f"\n{name}: {times} (medians of pairs), threshold {THRESHOLDS[name]:g}")
    for who in ("ours", "theirs"):
        one = facts[who]
        low, high = one["interval"] or (float("nan"),) * 2
        reached = [x for x in one["reached"] if x is not None]
        after = f"{statistics.median(reached):,.0f}" if reached else "–"
        print(
            f"  {who:6} return {np.mean(one['played']):8.1f} [{low:.1f}, {high:.1f}]  "
            f"threshold in {len(reached)} of {len(one['reached'])} runs, median after {after} interactions  "
            f"{statistics.median(one['wall']):.1f} s"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", nargs="*", choices=list(RECIPES), default=list(RECIPES)[:3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--interactions", type=int, help="of each run, instead of the recipe's")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # the first of a process imports for a second
    results = {}
    for chosen in options.environment:
        asked = RECIPES[chosen]
        if options.interactions:
            asked = asked.replace(interactions=options.interactions)
        results[chosen] = compared(asked, options.seeds)
    for chosen, result in results.items():
        told(chosen, result)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
