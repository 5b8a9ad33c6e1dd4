"""Channel mixers: what each position does by itself between attentions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.core.errors import unknown
from allyouneed.nn.flops import Reading, product

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,  # Vaswani et al. 2017
    "gelu": F.gelu,  # Hendrycks & Gimpel 2016
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # its approximation, in GPT and GPT-2
    "silu": F.silu,
}


class MLP(core.Configured, nn.Module):
    """W₂ f(W₁x + b₁) + b₂ (Vaswani et al. 2017, eq. 2).

    >>> import torch
    >>> MLP.Config(hidden_dim=32).build(8)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    by_columns, by_rows = ("up",), ("out",)  # how tensor ranks share it (`train.mesh`)

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`activation` is one of `ACTIVATIONS`."""

        hidden_dim: int
        activation: str = "gelu_tanh"
        bias: bool = True
        dropout: float = 0.0  # of the hidden layer (Raffel et al. 2020, sec. 2.1)

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.activation, self.dropout = activation_of(config.activation), config.dropout
        self.up = nn.Linear(dim, config.hidden_dim, bias=config.bias)
        self.out = nn.Linear(config.hidden_dim, dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, dim)."""
        return self.out(F.dropout(self.activation(self.up(x)), self.dropout, self.training))

    def flops(self, reading: Reading) -> int:
        """Of both layers."""
        return sum(product(layer, reading.tokens) for layer in (self.up, self.out))

    def divisible(self) -> Mapping[str, int]:
        """What the number of tensor ranks has to divide."""
        return {"hidden_dim": self.out.in_features}


class GatedMLP(core.Configured, nn.Module):
    """W₂ (f(Wx) ⊙ Vx): SwiGLU with the default activation (Shazeer 2020, eq. 6).

    >>> import torch
    >>> GatedMLP.Config(hidden_dim=32).build(8)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    by_columns, by_rows = ("gate", "up"), ("out",)  # how tensor ranks share it (`train.mesh`)

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`activation` is one of `ACTIVATIONS`."""

        hidden_dim: int
        activation: str = "silu"
        bias: bool = False
        dropout: float = 0.0  # of the hidden layer

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.activation, self.dropout = activation_of(config.activation), config.dropout
        self.gate = nn.Linear(dim, config.hidden_dim, bias=config.bias)
        self.up = nn.Linear(dim, config.hidden_dim, bias=config.bias)
        self.out = nn.Linear(config.hidden_dim, dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, dim)."""
        hidden = self.activation(self.gate(x)) * self.up(x)
        return self.out(F.dropout(hidden, self.dropout, self.training))

    def flops(self, reading: Reading) -> int:
        """Of the three layers."""
        return sum(product(layer, reading.tokens) for layer in (self.gate, self.up, self.out))

    def divisible(self) -> Mapping[str, int]:
        """What the number of tensor ranks has to divide."""
        return {"hidden_dim": self.out.in_features}


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """One of `ACTIVATIONS`, or the error that names the nearest."""
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
