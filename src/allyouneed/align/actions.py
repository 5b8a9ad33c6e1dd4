"""What may be done in an environment: one of several things, or a push in each of several dimensions.

An action's kind is the last part of a policy: it makes a distribution of what the network tells. Acting draws from it
in NumPy, learning differentiates it in PyTorch; the noise actions are drawn with is made for a whole rollout at once.

Shapes: B states, n environments, A things to choose from or dimensions to push in, P parameters of a distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from allyouneed.core.errors import InputError
from allyouneed.objectives import policy


@dataclass(frozen=True)
class Categorical:
    """A choice, given the log-probabilities of all things, (B, A).

    >>> Categorical(torch.zeros(1, 2).log_softmax(-1)).logprobs(torch.tensor([1])).exp()
    tensor([0.5000])
    """

    all_logprobs: Tensor

    def logprobs(self, actions: Tensor) -> Tensor:
        """Of the things chosen: (B) -> (B)."""
        return self.all_logprobs.gather(-1, actions[:, None])[:, 0]

    def entropy(self) -> Tensor:
        """In nats, (B)."""
        return policy.entropy(self.all_logprobs)

    def kl_from(self, old: Tensor) -> Tensor:
        """KL[old, this] in nats, of another one's parameters: (B, P) -> (B)."""
        return policy.kl_divergence(old, self.all_logprobs)

    def first(self, count: int) -> Categorical:
        """Of the first `count` states."""
        return Categorical(self.all_logprobs[:count])

    @property
    def parameters(self) -> Tensor:
        """What makes it anew: log-probabilities, (B, P = A)."""
        return self.all_logprobs


@dataclass(frozen=True)
class Gaussian:
    """Independent pushes with means (B, A) and, in every state the same, logarithms of standard deviations (A).

    >>> round(Gaussian(torch.zeros(1, 1), torch.zeros(1)).logprobs(torch.zeros(1, 1)).item(), 4)
    -0.9189
    """

    means: Tensor
    log_std: Tensor

    def logprobs(self, actions: Tensor) -> Tensor:
        """Of the pushes made: (B, A) -> (B)."""
        scaled = (actions - self.means) * (-self.log_std).exp()
        return -0.5 * scaled.square().sum(-1) - (self.log_std + 0.5 * math.log(2 * math.pi)).sum()

    def entropy(self) -> Tensor:
        """In nats, (B)."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(self.means))

    def kl_from(self, old: Tensor) -> Tensor:
        """KL[old, this] in nats, of another one's parameters: (B, P) -> (B)."""
        means, log_std = old.chunk(2, -1)
        spread = (2 * log_std).exp() + (means - self.means).square()
        return (self.log_std - log_std + 0.5 * spread * (-2 * self.log_std).exp() - 0.5).sum(-1)

    def first(self, count: int) -> Gaussian:
        """Of the first `count` states."""
        return Gaussian(self.means[:count], self.log_std)

    @property
    def parameters(self) -> Tensor:
        """What makes it anew: means and logarithms of deviations, (B, P = 2·A)."""
        return torch.cat((self.means, self.log_std.expand_as(self.means)), -1)


class Choice(nn.Module):
    """One of `count` things; the environment numbers them from `start`."""

    def __init__(self, count: int, start: int = 0) -> None:
        super().__init__()
        self.width, self.start = count, start

    def forward(self, told: Tensor) -> Categorical:
        """(B, A), logits."""
        return Categorical(told.log_softmax(-1))

    def room(self, *shape: int) -> NDArray[Any]:
        """For so many actions: (…)."""
        return np.zeros(shape, np.int64)

    def noise(self, source: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        """What actions are drawn with: (…) -> (…, A). The greatest of logits and Gumbel noise is a draw of softmax."""
        return source.gumbel(size=(*shape, self.width)).astype(np.float32)

    def draw(self, told: NDArray[np.float32], noise: NDArray[np.float32] | float) -> NDArray[Any]:
        """Actions by logits, (n, A) -> (n); without noise the likeliest."""
        return np.asarray((told + noise).argmax(-1))

    def executed(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Actions as the environment takes them."""
        return actions + self.start if self.start else actions


class Push(nn.Module):
    """A push in each dimension, within `low` and `high`, (A), when it is carried out; its deviation begins as 1."""

    def __init__(self, low: NDArray[Any], high: NDArray[Any]) -> None:
        super().__init__()
        self.width, self.low, self.high = len(low), low, high
        self.log_std = nn.Parameter(torch.zeros(self.width))

    def forward(self, told: Tensor) -> Gaussian:
        """(B, A), means."""
        return Gaussian(told, self.log_std)

    def room(self, *shape: int) -> NDArray[Any]:
        """For so many actions: (…, A)."""
        return np.zeros((*shape, self.width), np.float32)

    def noise(self, source: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        """What actions are drawn with: (…) -> (…, A)."""
        return source.standard_normal((*shape, self.width), dtype=np.float32)

    def draw(self, told: NDArray[np.float32], noise: NDArray[np.float32] | float) -> NDArray[Any]:
        """Actions by means, (n, A) -> (n, A); without noise the means."""
        return np.asarray(told + noise * np.exp(self.log_std.detach().numpy()))

    def executed(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Actions as the environment takes them: what is learned from stays as it was drawn."""
        return np.asarray(actions.clip(self.low, self.high))


def actions_of(space: Any, name: str) -> Choice | Push:
    """The kind of actions that a Gymnasium space wants; `name` is the environment's.

    Raises:
        InputError: neither Discrete nor a Box of one row.
    """
    from gymnasium.spaces import Box, Discrete

    if isinstance(space, Discrete):
        return Choice(int(space.n), int(space.start))
    if isinstance(space, Box) and len(space.shape) == 1:
        return Push(space.low, space.high)
    raise InputError(f"environment {name!r}: its actions are {space}; a policy here chooses (Discrete) or pushes (Box)")
