"""Gymnasium's environments, several of a kind stepped together, each episode with a seed of its own.

Environments are not saved but made again: where an episode stands follows from its seed and the actions taken in it, so
that any environment that keeps Gymnasium's rules goes on bit for bit after a kill, whatever it is written in.

Shapes: n environments, D numbers an observation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from allyouneed import core
from allyouneed.align.actions import Choice, Push, actions_of
from allyouneed.core.errors import InputError, unknown
from allyouneed.core.seeds import derive


@dataclass(frozen=True)
class Step:
    """What came of one action in each environment."""

    observations: NDArray[np.float32]  # (n, D), to act on next: where an episode ended, the first of another
    rewards: NDArray[np.float64]  # (n)
    terminated: NDArray[np.bool_]  # (n), over by the environment's own rules
    truncated: NDArray[np.bool_]  # (n), cut off while it might have gone on
    reached: NDArray[np.float32]  # (n, D), where the actions led; other than `observations` where an episode ended


class Environments(core.Configured):
    """`count` environments of one kind.

    >>> envs = Environments.Config(name="CartPole-v1", count=2).build(seed=0)
    >>> envs.observations.shape, envs.step(np.array([0, 1])).rewards
    ((2, 4), array([1., 1.]))

    Raises:
        InputError: Gymnasium is not installed, or what the environment needs; no such environment; spaces that no
            policy here can read or act in.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """Which and how many."""

        name: str  # as Gymnasium registers it
        count: int = 1
        options: Mapping[str, Any] = field(default_factory=dict)  # handed to the environment

        def __post_init__(self) -> None:
            if self.count < 1:
                raise InputError(f"environments.count={self.count}; at least 1 is needed")

    def __init__(self, config: Config, *, seed: int) -> None:
        self.name, self.count, self.seed = config.name, config.count, seed
        self.options = repr(sorted(config.options.items()))
        self.vector = _made(config)
        self.space = self.vector.single_observation_space
        self.actions: Choice | Push = actions_of(self.vector.single_action_space, self.name)
        self.width = _width(self.space, self.name)
        self.episodes = np.full(config.count, -1)  # the number of each environment's present episode
        self.taken: list[list[Any]] = [[] for _ in range(config.count)]  # actions in it
        self.observations = self._begun(np.ones(config.count, dtype=bool))

    def step(self, actions: NDArray[Any]) -> Step:
        """Do what a policy drew, (n) or (n, A), and begin another episode where one ended.

        Raises:
            InputError: a reward or an observation is not finite.
        """
        executed = self.actions.executed(actions)
        for taken, action in zip(self.taken, executed, strict=True):
            taken.append(action)
        found, rewards, terminated, truncated, _ = self.vector.step(executed)
        reached = observations = self._read(found)
        self._check(reached, rewards)
        ended = terminated | truncated
        if ended.any():
            observations = self._begun(ended)
        self.observations = observations
        return Step(observations, rewards, terminated, truncated, reached)

    def close(self) -> None:
        """Let go of them."""
        self.vector.close()

    def state_dict(self) -> dict[str, Any]:
        """Which episode each is in, what has been done in it, and where it led."""
        taken = {str(i): torch.from_numpy(np.array(actions)) for i, actions in enumerate(self.taken) if actions}
        there = {"observations": torch.from_numpy(self.observations.copy())}
        return {"episodes": self.episodes.tolist(), "taken": taken, **self._identity, **there}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Live through the present episodes again.

        Raises:
            InputError: the state is of other environments or another seed, or an episode went otherwise this time.
        """
        mine = {**self._identity, "episodes": len(self.episodes)}
        found = {**state, "episodes": len(state.get("episodes", ()))}
        for key, value in mine.items():
            if found.get(key) != value:
                raise InputError(
                    f"environments: their state has {key}={found.get(key)}, this run {value}; start it anew"
                )
        if "observations" not in state:
            raise InputError("environments: their state has no observations to compare with; start the run anew")
        self.episodes = np.array(state["episodes"]) - 1
        observations = self._begun(np.ones(self.count, dtype=bool))
        for i, actions in state["taken"].items():
            observations[int(i)] = self._relived(int(i), list(actions.numpy()))
        if not np.array_equal(observations, state["observations"].numpy(), equal_nan=True):
            raise self._elsewhere()
        self.observations = observations

    def _relived(self, i: int, actions: list[Any]) -> NDArray[np.float32]:
        """Where environment i is after `actions` in the episode just begun."""
        for action in actions:
            found, _, terminated, truncated, _ = self.vector.envs[i].step(action)
            if terminated or truncated:  # the episode goes on in the state
                raise self._elsewhere()
        self.taken[i] = actions
        return self._read(_batch_of(found, self.space))[0]

    @property
    def _identity(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.seed, "options": self.options}

    def _elsewhere(self) -> InputError:
        line = f"environment {self.name!r}: the same seed and actions led elsewhere; it cannot be resumed"
        return InputError(f"{line}; let it draw from self.np_random alone")

    def _begun(self, where: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Begin another episode in some environments; the observations of all."""
        self.episodes = self.episodes + where
        seeds: list[int | None] = [None] * self.count
        for i in np.flatnonzero(where):
            seeds[i] = derive(self.seed, "episode", i, self.episodes[i]) % 2**31  # some take no larger ones
            self.taken[i] = []
        return self._read(self.vector.reset(seed=seeds, options={"reset_mask": where})[0])

    def _read(self, found: Any) -> NDArray[np.float32]:
        """Observations as a network reads them: a new (n, D)."""
        from gymnasium.spaces import Box, Discrete, flatten

        if isinstance(self.space, Box):
            return np.array(found, dtype=np.float32).reshape(len(found), -1)
        if isinstance(self.space, Discrete):
            return np.eye(self.width, dtype=np.float32)[np.asarray(found) - self.space.start]
        from gymnasium.vector.utils import iterate

        each: Any = iterate(self.vector.observation_space, found)
        return np.stack([np.asarray(flatten(self.space, one), np.float32) for one in each])

    def _check(self, observations: NDArray[np.float32], rewards: NDArray[np.float64]) -> None:
        if not (np.isfinite(rewards.sum()) and np.isfinite(observations.sum())):
            fine = np.isfinite(rewards) & np.isfinite(observations).all(1)
            i = int(np.flatnonzero(~fine)[0]) if not fine.all() else 0
            line = f"environment {self.name!r}, number {i}, step {len(self.taken[i])} of episode {self.episodes[i]}"
            raise InputError(f"{line}: reward {rewards[i]}, observation {observations[i]}; both must be finite")


def _batch_of(one: Any, space: Any) -> Any:
    """An observation as a batch of one."""
    from gymnasium.vector.utils import concatenate, create_empty_array

    room: Any = create_empty_array(space, n=1)
    return concatenate(space, [one], room)


def _made(config: Environments.Config) -> Any:
    try:
        import gymnasium
    except ImportError:
        raise InputError("Gymnasium is not installed: pip install 'allyouneed[gym]'") from None
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    make = partial(gymnasium.make, config.name, disable_env_checker=True, **config.options)
    try:
        return SyncVectorEnv([make] * config.count, copy=False, autoreset_mode=AutoresetMode.DISABLED)
    except (gymnasium.error.NameNotFound, gymnasium.error.NamespaceNotFound):
        raise unknown("environment", config.name, gymnasium.registry) from None
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise InputError(f"environment {config.name!r}: {' '.join(str(error).split())}") from None


def _width(space: Any, name: str) -> int:
    """D."""
    from gymnasium.spaces import flatdim

    try:
        return int(flatdim(space))
    except (NotImplementedError, ValueError):
        raise InputError(f"environment {name!r}: its observations, {space}, have no fixed number of numbers") from None
