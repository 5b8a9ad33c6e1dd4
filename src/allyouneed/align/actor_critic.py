"""A policy and a critic over a few numbers: two small networks side by side (Schulman et al. 2017, sec. 6.1).

Shapes: B states, n environments, D numbers an observation, A numbers told of the actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from allyouneed import core
from allyouneed.align.actions import Categorical, Choice, Gaussian, Push

FURTHEST = 10.0  # deviations from the mean that a scaled number may be away, as the authors' code has it

Act = Callable[[NDArray[np.float32], "NDArray[np.float32] | float"], NDArray[Any]]


@dataclass(frozen=True)
class Told:
    """What an actor-critic says of some states."""

    policy: Categorical | Gaussian
    values: Tensor  # (B)


class Scale(nn.Module):
    """Observations brought to mean 0 and deviation 1 by all that were seen so far, (…, D) -> (…, D).

    >>> scale = Scale(1)
    >>> scale.see(torch.tensor([[1.0], [3.0]]))
    >>> scale(torch.tensor([[3.0]]))
    tensor([[1.0000]])
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, observations: Tensor) -> Tensor:
        """Nothing further than `FURTHEST` from 0 comes out."""
        scaled = (observations - self.mean) / (self.variance + 1e-8).sqrt()
        return scaled.clamp(-FURTHEST, FURTHEST).to(observations.dtype)

    @torch.no_grad()
    def see(self, observations: Tensor) -> None:
        """Count (N, D) more in (Chan et al. 1979: the moments of two sets from those of each)."""
        x = observations.double()
        new, total = len(x), self.count + len(x)
        apart = x.mean(0) - self.mean
        spread = self.variance * self.count + x.var(0, correction=0) * new + apart.square() * self.count * new / total
        self.mean += apart * new / total
        self.variance.copy_(spread / total)
        self.count.copy_(total)


class ActorCritic(core.Configured, nn.Module):
    """A multi-layer perceptron with tanh for the policy, another for the values; nothing is shared.

    Weights begin orthogonal, √2 times within, 1 for the values and 0.01 for the actions, which so are about as likely
    as one another (the authors' code, `baselines`; the paper does not say).

    >>> module = ActorCritic.Config(hidden=(8,)).build(3, Choice(2))
    >>> told = module(torch.zeros(5, 3))
    >>> told.values.shape, told.policy.entropy().exp()[0].round()
    (torch.Size([5]), tensor(2., grad_fn=<RoundBackward0>))
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """Widths of both networks, and whether their observations are scaled."""

        hidden: tuple[int, ...] = (64, 64)  # sec. 6.1
        scaled: bool = False

    def __init__(self, config: Config, width: int, actions: Choice | Push) -> None:
        super().__init__()
        self.scale = Scale(width) if config.scaled else nn.Identity()
        self.actor = _perceptron((width, *config.hidden, actions.width), last=0.01)
        self.critic = _perceptron((width, *config.hidden, 1), last=1.0)
        self.actions = actions

    def forward(self, observations: Tensor) -> Told:
        """(B, D)."""
        x = self.scale(observations)
        return Told(self.actions(self.actor(x)), self.critic(x)[:, 0])

    def acting(self) -> Act:
        """The policy's network in NumPy: observations (n, D) and noise (n, A) -> actions; without noise the likeliest.

        It reads the module's own memory, and is as new as that until the module's tensors are replaced. For a handful
        of states PyTorch takes longer to begin than to compute.
        """
        linear = [layer for layer in self.actor if isinstance(layer, nn.Linear)]
        *within, last = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in linear]
        scaled = isinstance(self.scale, Scale)

        def act(x: NDArray[np.float32], noise: NDArray[np.float32] | float = 0.0) -> NDArray[Any]:
            if scaled:
                x = self.scale(torch.from_numpy(x)).numpy()
            for weight, bias in within:
                x = np.tanh(x @ weight + bias)
            return self.actions.draw(x @ last[0] + last[1], noise)

        return act


def _perceptron(widths: tuple[int, ...], last: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, math.sqrt(2))  # type: ignore[arg-type]
        nn.init.zeros_(layers[-2].bias)  # type: ignore[arg-type]
    nn.init.orthogonal_(layers[-2].weight, last)  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])
