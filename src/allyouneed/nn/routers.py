"""Routers: which experts a token goes to and how much each counts. Those without noise, as Switch, GShard and Mixtral
have them; the noisy ones of 2017 are in `nn.noisy_routers`.

A router answers with one `Routing`. Forward hooks collect these, so that losses and statistics of balance
(`objectives.balanced`) need no model to know of them.

Shapes: B rows, T tokens, N = B·T, k choices a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.nn.capacity import Capacity, Factor, Unlimited
from allyouneed.nn.flops import Reading
from allyouneed.nn.routing import Choice, Routing


class Router(core.Configured, nn.Module):
    """One matrix gives each expert's logit; subclasses choose by them. All is computed in float32 at least, whatever
    the rest of the model is in (Fedus et al. 2021, sec. 2.4, "selective precision").
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`capacity` says how many tokens an expert may take."""

        capacity: Capacity = field(default_factory=Unlimited)

        @property
        def choices(self) -> int:
            """How many experts a token goes to."""
            return self.k  # type: ignore[attr-defined]

    def __init__(self, config: Config, dim: int, num_experts: int) -> None:
        super().__init__()
        if not 1 <= config.choices <= num_experts:
            raise core.InputError(f"k={config.choices} of num_experts={num_experts}; 1 to {num_experts} can be chosen")
        self.config, self.k, self.num_experts = config, config.choices, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.1/dim), small enough that no expert begins as a favourite (Fedus et al. 2021, sec. 2.4)."""
        nn.init.normal_(self.weight, std=(0.1 / self.weight.shape[-1]) ** 0.5)

    def forward(self, x: Tensor) -> Routing:
        """(B, T, dim) -> where the N = B·T tokens go."""
        with torch.autocast(x.device.type, enabled=False):
            choice = self.choose(x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32)))
        kept = self.config.capacity.admit(
            choice.experts, choice.asked, self.num_experts, rows=len(x), training=self.training
        )
        return Routing(choice, kept, self.num_experts)

    def choose(self, x: Tensor) -> Choice:
        """(N, dim) -> the k experts that each token would go to."""
        raise NotImplementedError

    @property
    def smooth(self) -> frozenset[str]:
        """Which sums of a `Routing` have a gradient in training: of `importance` and `load`. A count has none, nor has
        the one gate of a token, which is 1 whatever the logits are.
        """
        return frozenset({"importance"} if self.k > 1 else ())

    def flops(self, reading: Reading) -> int:
        """Of one logit an expert."""
        return 2 * reading.tokens * self.weight.numel()


class TopK(Router):
    """The k likeliest experts, softmax over their logits alone (Jiang et al. 2024, sec. 2.1: Mixtral, k = 2).

    >>> routing = TopK.Config(k=2).build(dim=8, num_experts=4)(torch.randn(1, 5, 8))
    >>> routing.experts.shape, torch.allclose(routing.gates.sum(-1), torch.ones(5))
    (torch.Size([5, 2]), True)
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """`k` experts a token."""

        k: int = 2

    def choose(self, x: Tensor) -> Choice:
        """(N, dim) -> the k likeliest."""
        logits = F.linear(x, self.weight.to(x.dtype))
        top, experts = logits.topk(self.k, -1)
        return Choice(experts, top.softmax(-1), logits)


class Top1(Router):
    """The likeliest expert alone, its output times its probability, by which the router learns (Fedus et al. 2021, sec.
    2.1 and 2.2: Switch). In training, what the router reads is multiplied by noise from U(1 − jitter, 1 + jitter).

    >>> Top1.Config().build(dim=8, num_experts=4)(torch.randn(1, 5, 8)).gates.shape
    torch.Size([5, 1])
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """`jitter` is the paper's ε."""

        capacity: Capacity = field(default_factory=Factor)
        jitter: float = 0.01

        @property
        def choices(self) -> int:
            """One."""
            return 1

    config: Config

    @property
    def smooth(self) -> frozenset[str]:
        """The gate is a probability among all experts."""
        return frozenset({"importance"})

    def choose(self, x: Tensor) -> Choice:
        """(N, dim) -> the likeliest."""
        if self.training and self.config.jitter:
            x = x * torch.empty_like(x).uniform_(1.0 - self.config.jitter, 1.0 + self.config.jitter)
        logits = F.linear(x, self.weight.to(x.dtype))
        gates, experts = logits.softmax(-1).max(-1, keepdim=True)
        return Choice(experts, gates, logits)


class Top2(Router):
    """The two likeliest, their probabilities divided by their sum; in training the second is gone to with a probability
    of twice its gate only, as what counts little is hardly worth a place (Lepikhin et al. 2020, alg. 1: GShard).

    >>> Top2.Config().build(dim=8, num_experts=4)(torch.randn(1, 5, 8)).gates.shape
    torch.Size([5, 2])
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """Each expert has a `capacity` of 2N/E by default."""

        capacity: Capacity = field(default_factory=lambda: Factor(factor=1.0))

        @property
        def choices(self) -> int:
            """Two."""
            return 2

    def choose(self, x: Tensor) -> Choice:
        """(N, dim) -> the two likeliest."""
        logits = F.linear(x, self.weight.to(x.dtype))
        top, experts = logits.softmax(-1).topk(2, -1)
        gates = top / top.sum(-1, keepdim=True)
        asked = torch.ones_like(experts, dtype=torch.bool)
        if self.training:
            asked[:, 1] = 2.0 * gates[:, 1] > torch.rand_like(gates[:, 1])
        return Choice(experts, gates, logits, asked)
