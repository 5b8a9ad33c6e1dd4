"""Rollouts in environments as batches: act for some steps, then learn from them for some epochs, and so on.

An endless iterator as any other that the training loop is handed; what it gives follows from the weights as they are
when a rollout begins. It saves the rollout that is being learned from and where each environment's episode stands.

Shapes: n environments, T steps of each a rollout, N = T·n actions, D numbers an observation, M minibatches an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from allyouneed import core
from allyouneed.align.actor_critic import ActorCritic, Scale
from allyouneed.align.environments import Environments
from allyouneed.align.identity import check_same, identity
from allyouneed.align.returns import Returns, RewardScale
from allyouneed.core.errors import InputError
from allyouneed.core.seeds import derive, generator
from allyouneed.objectives.policy import AdaptiveKl, FixedKl, check_discounts, gae, whiten

Batch = dict[str, Tensor]


class Interaction(core.Configured, Iterator[Batch]):
    """Minibatches for `objectives.ppo.Ppo`, (B, …): `observations`, `actions`, `old_logprobs`, `old_values`, `returns`,
    `advantages` of mean 0 and deviation 1, and where `kl` is set `old_parameters` and `beta`.

    Args:
        config: how much of what.
        module: acts, and is trained on these batches.
        environments: where it acts.
        seed: of actions and of the order of minibatches.

    Raises:
        InputError: a minibatch that does not divide a rollout, a module that is not on the CPU.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """Defaults are those of the paper's continuous control (table 3)."""

        steps: int = 2048  # T, of each environment
        epochs: int = 10  # K
        minibatch: int = 64
        gamma: float = 0.99
        lam: float = 0.95
        kl: FixedKl | AdaptiveKl | None = None  # the weight of a penalty, if there is one
        scale_rewards: bool = False  # by the deviation of discounted returns, as the authors' code has it

        def __post_init__(self) -> None:
            for name, least in (("steps", 1), ("epochs", 1), ("minibatch", 2)):  # advantages of one have no deviation
                if getattr(self, name) < least:
                    raise InputError(f"interaction.{name}={getattr(self, name)}; at least {least} is needed")
            check_discounts("interaction", self.gamma, self.lam)

    def __init__(self, config: Config, module: ActorCritic, environments: Environments, *, seed: int) -> None:
        self.config, self.module, self.environments, self.seed = config, module, environments, seed
        self.actions = config.steps * environments.count  # N
        if self.actions % config.minibatch:
            made = f"interaction.steps={config.steps} of {environments.count} environments"
            raise InputError(f"{made} make {self.actions} actions, no multiple of minibatch={config.minibatch}")
        if next(module.parameters()).device.type != "cpu":
            raise InputError(
                "interaction: actions are drawn on the CPU, environments are there; put the module there too"
            )
        self.beta = config.kl.beta if config.kl is not None else 0.0
        self.rewards = RewardScale(config.gamma, environments.count) if config.scale_rewards else None
        self.finished = Returns(environments.count)
        self.number, self.place = 0, 0  # rollouts made, minibatches taken of the last
        self.rollout: Batch = {}
        self.minibatches: list[Batch] = []  # of the present epoch
        self.identity = identity(config, seed)

    @property
    def updates(self) -> int:
        """Minibatches a rollout."""
        return self.actions // self.config.minibatch * self.config.epochs

    def __next__(self) -> Batch:
        if self.place >= self.updates or not self.rollout:
            self._roll()
        epoch, i = divmod(self.place, self.actions // self.config.minibatch)
        if i == 0:
            self.minibatches = self._dealt(epoch)
        self.place += 1
        return self.minibatches[i]

    def measured(self, module: nn.Module | None = None) -> dict[str, float]:
        """What the last hundred episodes brought, for the log."""
        return {"interactions": self.number * self.actions, **self.finished.measured()}

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, with all that is still to be learned of the last rollout."""
        state = {"number": self.number, "place": self.place, "beta": self.beta, "rollout": dict(self.rollout)}
        state["made_by"] = self.identity
        if self.rewards is not None:
            state["rewards"] = self.rewards.state_dict()
        return state | {"environments": self.environments.state_dict(), "finished": self.finished.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            InputError: it is of other environments, settings, another seed or another kind of iterator.
        """
        if not isinstance(state.get("environments"), Mapping):
            raise InputError("data state: field 'environments' is missing; these batches are no rollouts")
        check_same(state.get("made_by"), self.identity)
        self.environments.load_state_dict(state["environments"])
        self.finished.load_state_dict(state["finished"])
        if self.rewards is not None:
            self.rewards.load_state_dict(state["rewards"])
        self.number, self.place, self.beta = state["number"], state["place"], state["beta"]
        self.rollout = dict(state["rollout"])
        epoch, i = divmod(self.place, self.actions // self.config.minibatch)
        self.minibatches = self._dealt(epoch) if i else []

    def _dealt(self, epoch: int) -> list[Batch]:
        """The rollout's actions as minibatches, in an order of the epoch's own."""
        shuffle = generator(self.seed, "minibatches", self.number, epoch)
        order = torch.randperm(self.actions, generator=shuffle)
        dealt = {name: x[order].unflatten(0, (-1, self.config.minibatch)) for name, x in self.rollout.items()}
        dealt["advantages"] = whiten(dealt["advantages"], dim=1)
        return [dict(zip(dealt, some, strict=True)) for some in zip(*dealt.values(), strict=True)]

    @torch.no_grad()
    def _roll(self) -> None:
        """Act for T steps with the weights as they are now."""
        self._settle()
        self.number, self.place = self.number + 1, 0
        trail = self._acted()
        observations = torch.from_numpy(trail.observations)  # (T + 1, n, D)
        told = self.module(observations.flatten(0, 1))
        policy = told.policy.first(self.actions)
        values = told.values.view(len(observations), -1)  # (T + 1, n)
        actions = torch.from_numpy(trail.actions).flatten(0, 1)
        advantages, returns = self._estimates(trail, values)
        self.rollout = {
            "observations": observations[:-1].flatten(0, 1),
            "actions": actions,
            "old_logprobs": policy.logprobs(actions),
            "old_values": values[:-1].flatten(),
            "advantages": advantages,
            "returns": returns,
        }
        if self.config.kl is not None:
            self.rollout["old_parameters"] = policy.parameters
            self.rollout["beta"] = torch.full((self.actions,), self.beta)

    def _settle(self) -> None:
        """What the last rollout tells before the next: the moments of observations, and the weight of the penalty."""
        if not self.rollout:
            return
        observations = self.rollout["observations"]
        if self.config.kl is not None:
            kl = self.module(observations).policy.kl_from(self.rollout["old_parameters"]).mean().item()
            self.beta = self.config.kl(self.beta, kl)
        if isinstance(self.module.scale, Scale):
            self.module.scale.see(observations)

    def _acted(self) -> _Trail:
        T, envs, act = self.config.steps, self.environments, self.module.acting()
        source = np.random.default_rng(derive(self.seed, "actions", self.number))
        noise = envs.actions.noise(source, T, envs.count)
        trail = _Trail.empty(T, envs)
        for t in range(T):
            trail.observations[t] = envs.observations
            trail.actions[t] = actions = act(envs.observations, noise[t])
            step = envs.step(actions)
            trail.rewards[t], trail.terminated[t], trail.truncated[t] = step.rewards, step.terminated, step.truncated
            if step.truncated.any():
                trail.cut.append((t, step.reached))
            self.finished.count(step)
        trail.observations[T] = envs.observations
        return trail

    def _estimates(self, trail: _Trail, values: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and returns, (N) each."""
        terminated, truncated = (torch.from_numpy(x) for x in (trail.terminated, trail.truncated))
        following = values[1:].clone()
        for t, reached in trail.cut:
            found = self.module(torch.from_numpy(reached)).values
            following[t] = torch.where(truncated[t], found, following[t])
        rewards = trail.rewards if self.rewards is None else self.rewards.scaled(trail.rewards, trail.ended)
        found = gae(
            torch.from_numpy(rewards).float().T,
            values[:-1].T,
            following.where(~terminated, 0.0).T,
            (terminated | truncated).T,
            self.config.gamma,
            self.config.lam,
        )
        advantages, returns = (x.T.flatten() for x in found)
        return advantages, returns


@dataclass
class _Trail:
    """What was seen and done during a rollout."""

    observations: NDArray[np.float32]  # (T + 1, n, D)
    actions: NDArray[Any]  # (T, n) or (T, n, A)
    rewards: NDArray[np.float64]  # (T, n)
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    cut: list[tuple[int, NDArray[np.float32]]]  # steps at which an episode was cut off, and where they led, (n, D)

    @staticmethod
    def empty(steps: int, envs: Environments) -> _Trail:
        """Room for so many steps."""
        n = envs.count
        terminated, truncated = (np.zeros((steps, n), dtype=bool) for _ in range(2))
        observations, actions = np.zeros((steps + 1, n, envs.width), np.float32), envs.actions.room(steps, n)
        return _Trail(observations, actions, np.zeros((steps, n)), terminated, truncated, [])

    @property
    def ended(self) -> NDArray[np.bool_]:
        """Steps that ended an episode, (T, n)."""
        return self.terminated | self.truncated
