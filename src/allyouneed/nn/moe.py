"""A mixture of experts: a router, and a bank of feed-forward networks of which each token passes a few.

A channel part for `Block`, or between recurrent layers. Routers are in `routers` and `noisy_routers`, what an expert
may take in `capacity`, the products in `grouped`, the way to other ranks in `exchange`.

Shapes: N tokens, k experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.nn.exchange import announced, exchanged
from allyouneed.nn.ffn import activation_of
from allyouneed.nn.flops import Reading
from allyouneed.nn.grouped import Order, feed_forward
from allyouneed.nn.noisy_routers import Hierarchical, NoisyTopK
from allyouneed.nn.routers import Router, Top1, Top2, TopK
from allyouneed.nn.routing import Routing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class StackedLinear(nn.Module):
    """One matrix an expert: `weight` (E, out, in)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 1/in)."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def local(self) -> Tensor:
        """The matrices of this rank's experts, all where they are not spread."""
        weight: Tensor = self.weight.to_local() if hasattr(self.weight, "to_local") else self.weight
        return weight


class Experts(core.Configured, nn.Module):
    """E networks W₂ f(W₁x), without biases as in all papers on them.

    >>> from allyouneed.nn.routers import TopK
    >>> x, router = torch.randn(1, 5, 8), TopK.Config(k=2).build(8, 4)
    >>> Experts.Config(num_experts=4, hidden_dim=32).build(8)(x[0], router(x)).shape
    torch.Size([5, 8])
    """

    first: ClassVar[tuple[str, ...]] = ("up",)  # the matrices that read the token

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`activation` is one of `nn.ffn.ACTIVATIONS`."""

        num_experts: int
        hidden_dim: int
        activation: str = "relu"  # Shazeer et al. 2017, app. C.1; Fedus et al. 2021
        dropout: float = 0.0  # of the hidden layer (Fedus et al. 2021, sec. 2.4: "expert dropout")

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        if min(config.num_experts, config.hidden_dim) < 1:
            raise core.InputError(f"num_experts={config.num_experts}, hidden_dim={config.hidden_dim}; at least 1 each")
        self.num_experts, self.dropout = config.num_experts, config.dropout
        self.activation = activation_of(config.activation)
        self.mesh: DeviceMesh | None = None
        for name in self.first:
            self.add_module(name, StackedLinear(config.num_experts, dim, config.hidden_dim))
        self.out = StackedLinear(config.num_experts, config.hidden_dim, dim)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Σ over each token's experts of gate · expert(x): (N, dim) -> (N, dim).

        Raises:
            InputError: a logit of the router is not finite; where experts are spread, the same on every rank.
        """
        order = Order.by_expert(routing.experts, routing.kept, self.num_experts)
        if self.mesh is None:
            *counts, broken = torch.cat((order.counts, routing.broken[None])).tolist()  # the one wait for the device
            _refuse(broken)
            return order.gather(self.compute(order.spread(x), counts), routing.gates)
        arriving, broken = announced(order.counts, routing.broken, self.mesh.get_group())
        _refuse(broken)
        y = exchanged(order.spread(x), order.counts.tolist(), self.compute, self.mesh.get_group(), arriving)
        return order.gather(y, routing.gates)

    def compute(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """What this rank's experts make of rows sorted by expert: (R, dim) -> (R, dim)."""
        ups = [self.get_submodule(name).local() for name in self.first]  # type: ignore[operator]
        mask = None
        if self.training and self.dropout:
            mask = F.dropout(x.new_ones(len(x), ups[0].shape[1]), self.dropout)
        return feed_forward(x, counts, self._hidden, ups, self.out.local(), mask)

    def _hidden(self, given: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        hidden = self.middle(*given)
        return hidden if mask is None else hidden * mask

    def middle(self, up: Tensor) -> Tensor:
        """The hidden layer."""
        return self.activation(up)

    def flops(self, pairs: int) -> int:
        """Of so many pairs of a token and an expert."""
        matrices = [part for part in self.modules() if isinstance(part, StackedLinear)]
        return sum(2 * pairs * matrix.in_features * matrix.out_features for matrix in matrices)

    def spread(self, mesh: DeviceMesh) -> None:
        """Keep this rank's share of the experts only, in place: parameters become DTensors, `Shard(0)` on `mesh`, which
        has one dimension. Every rank of it then has to compute the layer whenever one does, with tokens of its own;
        gradients of the experts are complete on the rank that holds them.

        Raises:
            InputError: the ranks do not divide the experts.
        """
        from torch.distributed.tensor import Shard, distribute_tensor

        if self.num_experts % mesh.size():
            raise core.InputError(
                f"num_experts={self.num_experts} cannot be spread over {mesh.size()} ranks; choose a divisor of it"
            )
        for part in self.modules():
            if isinstance(part, StackedLinear):
                mine = distribute_tensor(part.weight.data, mesh, [Shard(0)], src_data_rank=None)
                part.weight = nn.Parameter(mine, requires_grad=part.weight.requires_grad)
        self.mesh = mesh


class GatedExperts(Experts):
    """E networks W₂ (f(Wx) ⊙ Vx), SwiGLU with the default activation (Jiang et al. 2024, sec. 2.1).

    >>> from allyouneed.nn.routers import TopK
    >>> x, router = torch.randn(1, 5, 8), TopK.Config(k=2).build(8, 4)
    >>> GatedExperts.Config(num_experts=4, hidden_dim=32).build(8)(x[0], router(x)).shape
    torch.Size([5, 8])
    """

    first: ClassVar[tuple[str, ...]] = ("gate", "up")

    @dataclass(frozen=True, kw_only=True)
    class Config(Experts.Config):
        """As of the experts."""

        activation: str = "silu"

    def middle(self, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        """The hidden layer."""
        return self.activation(gate) * up


class MoE(core.Configured, nn.Module):
    """Σᵢ G(x)ᵢ Eᵢ(x), where the router G is 0 for all but a few experts (Shazeer et al. 2017, eq. 1).

    >>> from allyouneed.nn.routers import TopK
    >>> config = MoE.Config(router=TopK.Config(k=2), experts=GatedExperts.Config(num_experts=4, hidden_dim=32))
    >>> config.build(8)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """The router and the bank."""

        router: TopK.Config | Top1.Config | Top2.Config | NoisyTopK.Config | Hierarchical.Config
        experts: Experts.Config | GatedExperts.Config

        @property
        def activation(self) -> str:
            """Of the experts."""
            return self.experts.activation

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.experts: Experts = config.experts.build(dim)
        self.router: Router = config.router.build(dim, config.experts.num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) or (N, dim) -> the same shape."""
        rows = x if x.ndim == 3 else x[None]
        return self.experts(x.reshape(-1, x.shape[-1]), self.router(rows)).view_as(x)

    def flops(self, reading: Reading) -> int:
        """Of the router, of the experts if no token is dropped, and of gates times outputs."""
        pairs = reading.tokens * self.router.k
        return self.router.flops(reading) + self.experts.flops(pairs) + 2 * pairs * self.router.weight.shape[-1]


def active_parameters(model: nn.Module) -> int:
    """How many parameters one token passes: of each bank of experts only its share."""
    total = sum(p.numel() for p in model.parameters())
    for part in model.modules():
        if isinstance(part, MoE):
            bank = sum(p.numel() for p in part.experts.parameters())
            total -= bank - bank * part.router.k // part.experts.num_experts
    return total


def _refuse(broken: int) -> None:
    if broken:
        raise core.InputError(
            f"the router's logits are not finite for {broken} tokens; lower the learning rate, or weigh the z-loss more"
        )
