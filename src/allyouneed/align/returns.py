"""What episodes bring: their returns as they end, and the scale of rewards that is learned from them.

Shapes: n environments, T steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allyouneed.align.environments import Environments, Step

LAST = 100  # episodes that are averaged (Schulman et al. 2017, table 1)


class Returns:
    """Adds up each environment's rewards; keeps those of the last hundred episodes that ended."""

    def __init__(self, count: int) -> None:
        self.sums, self.lengths = np.zeros(count), np.zeros(count, dtype=int)
        self.last: deque[tuple[float, int]] = deque(maxlen=LAST)
        self.episodes = 0

    def count(self, step: Step) -> None:
        """One more step of each environment."""
        self.sums += step.rewards
        self.lengths += 1
        ended = step.terminated | step.truncated
        for i in np.flatnonzero(ended) if ended.any() else ():
            self.last.append((float(self.sums[i]), int(self.lengths[i])))
            self.episodes += 1
            self.sums[i] = self.lengths[i] = 0

    def measured(self) -> dict[str, float]:
        """Means over the last episodes, and how many there were; nothing before the first has ended."""
        if not self.last:
            return {}
        returns, lengths = zip(*self.last, strict=True)
        found = {"episode_return": float(np.mean(returns)), "episode_length": float(np.mean(lengths))}
        return found | {"episodes": self.episodes}

    def state_dict(self) -> dict[str, Any]:
        """All of it, in numbers that JSON keeps exactly."""
        last = [list(one) for one in self.last]
        return {
            "sums": self.sums.tolist(),
            "lengths": self.lengths.tolist(),
            "last": last,
            "episodes": self.episodes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.sums, self.lengths = np.array(state["sums"]), np.array(state["lengths"])
        self.last = deque(((a, b) for a, b in state["last"]), maxlen=LAST)
        self.episodes = state["episodes"]


class RewardScale:
    """Divides rewards by the deviation of the discounted returns seen so far (`baselines`, VecNormalize), so that
    values are of the order of one. It is the sum Σ γ^k r_{t−k} of an episode's past whose deviation is taken.
    """

    def __init__(self, gamma: float, count: int) -> None:
        self.gamma = gamma
        self.running = np.zeros(count)  # of each environment's present episode
        self.seen, self.mean, self.spread = 0, 0.0, 0.0  # how many sums, their mean, Σ (x − mean)²

    def scaled(self, rewards: NDArray[np.float64], ended: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Count a rollout's rewards in and scale them: two of (T, n) -> (T, n)."""
        sums = np.empty_like(rewards)
        for t in range(len(rewards)):
            self.running = self.running * self.gamma + rewards[t]
            sums[t] = self.running
            self.running = self.running * ~ended[t]
        total, apart = self.seen + sums.size, sums.mean() - self.mean
        self.spread += sums.var() * sums.size + apart**2 * self.seen * sums.size / total
        self.mean, self.seen = self.mean + apart * sums.size / total, total
        return np.asarray(rewards / np.sqrt(self.spread / self.seen + 1e-8))

    def state_dict(self) -> dict[str, Any]:
        """All of it, in numbers that JSON keeps exactly."""
        return {"running": self.running.tolist()} | {name: getattr(self, name) for name in ("seen", "mean", "spread")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.running = np.array(state["running"])
        self.seen, self.mean, self.spread = state["seen"], state["mean"], state["spread"]


def play(
    environments: Environments,
    act: Callable[[NDArray[np.float32]], NDArray[Any]],
    episodes: int = LAST,
) -> list[float]:
    """The returns of the first so many episodes that begin, whichever environment they fall to.

    Each environment plays its share to the end, so that short episodes are not favoured for being over sooner.

    Args:
        environments: in which nothing has been done yet.
        act: observations (n, D) -> actions.
    """
    share = [episodes // environments.count + (i < episodes % environments.count) for i in range(environments.count)]
    found: list[list[float]] = [[] for _ in share]
    sums = np.zeros(environments.count)
    while any(len(mine) < wanted for mine, wanted in zip(found, share, strict=True)):
        step = environments.step(act(environments.observations))
        sums += step.rewards
        for i in np.flatnonzero(step.terminated | step.truncated):
            found[i].append(float(sums[i]))
            sums[i] = 0.0
    return [x for mine, wanted in zip(found, share, strict=True) for x in mine[:wanted]]
