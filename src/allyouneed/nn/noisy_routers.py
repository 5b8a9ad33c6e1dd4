"""Routers with noise on their logits, which makes a count of tokens a differentiable load: flat and in two levels
(Shazeer et al. 2017).

Shapes: N tokens, k choices a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.nn.flops import Reading
from allyouneed.nn.routers import Router
from allyouneed.nn.routing import Choice


class NoisyTopK(Router):
    """G(x) = softmax(KeepTopK(H(x), k)), H(x) = xW_g + N(0, 1) ⊙ softplus(xW_noise) (Shazeer et al. 2017, eq. 3 to 5).

    Both matrices begin as zeros: no signal and some noise (app. A). The load of an expert is the sum over tokens of
    the probability that it would be chosen were its own noise drawn anew; in evaluation there is no noise, and the load
    is a count.

    >>> routing = NoisyTopK.Config(k=2).build(dim=8, num_experts=4)(torch.randn(1, 5, 8))
    >>> round(routing.load.sum().item()) in range(5, 16), routing.importance.sum().round().item()
    (True, 5.0)
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """`k` experts a token (app. C.1: 4)."""

        k: int = 4

    def __init__(self, config: Config, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.noise = nn.Parameter(torch.zeros(num_experts, dim))

    def reset_parameters(self) -> None:
        """Zeros (app. A)."""
        for matrix in self.parameters(recurse=False):
            nn.init.zeros_(matrix)

    @property
    def smooth(self) -> frozenset[str]:
        """Noise makes of the count a sum of chances."""
        return super().smooth | {"load"}

    def choose(self, x: Tensor) -> Choice:
        """(N, dim) -> the k likeliest after noise."""
        return self.among(x, slice(None), self.k)

    def flops(self, reading: Reading) -> int:
        """In training of both matrices, else of the logits alone; of a hierarchy as if a token passed all of it."""
        read = [p for name, p in self.named_parameters() if self.training or name.endswith("weight")]
        return 2 * reading.tokens * sum(p.numel() for p in read)

    def among(self, x: Tensor, which: slice, k: int) -> Choice:
        """(N, dim) -> the k likeliest `which` experts, numbered from the first of these."""
        clean = F.linear(x, self.weight[which].to(x.dtype))
        if not self.training:
            top, experts = clean.topk(k, -1)
            return Choice(experts, top.softmax(-1), clean)
        deviation = F.softplus(F.linear(x, self.noise[which].to(x.dtype)))
        top, experts, chances = noisy_top_k(clean, deviation, k)
        return Choice(experts, top.softmax(-1), clean, load=chances.sum(0))


def noisy_top_k(clean: Tensor, deviation: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of clean + N(0, 1) · deviation, (N, E): their values and numbers (N, k), and for each expert the
    chance P(x, i) = Φ((clean_i − the k-th largest of the others) / deviation_i) of being among them if its own noise
    were drawn anew, (N, E) (Shazeer et al. 2017, eq. 8 and 9).
    """
    noisy = clean + torch.randn_like(clean) * deviation
    if k == clean.shape[-1]:
        top, experts = noisy.topk(k, -1)
        return top, experts, torch.ones_like(clean)
    values, numbers = noisy.topk(k + 1, -1)
    top, experts = values[..., :k], numbers[..., :k]
    among = torch.zeros_like(clean, dtype=torch.bool).scatter(-1, experts, True)
    # of the others, the k-th largest is the (k + 1)-th of all for whoever is among the k, else the k-th
    threshold = torch.where(among, values[..., k:], values[..., k - 1 : k])
    deviation = deviation.clamp(min=1e-9)  # softplus of a very negative number is 0
    return top, experts, torch.special.ndtr((clean - threshold) / deviation)


class Hierarchical(NoisyTopK):
    """Two levels of noisy top-k: first k of `groups` groups, then in each of them k of its experts (Shazeer et al.
    2017, app. B): G(x)_ij = G_primary(x)_i · G_i(x)_j, and load_ij = load_primary_i · load_i(X⁽ⁱ⁾)_j / |X⁽ⁱ⁾|, X⁽ⁱ⁾
    being the tokens that go to group i. A token computes the second level of its own groups only.

    >>> routing = Hierarchical.Config(groups=4).build(dim=8, num_experts=12)(torch.randn(1, 5, 8))
    >>> routing.experts.shape, routing.load.shape
    (torch.Size([5, 4]), torch.Size([12]))
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(NoisyTopK.Config):
        """`k` of each level, so that a token goes to k² experts."""

        k: int = 2
        groups: int = 16

        @property
        def choices(self) -> int:
            """k of each of k groups."""
            return self.k**2

    config: Config

    def __init__(self, config: Config, dim: int, num_experts: int) -> None:
        if config.groups < 1 or num_experts % config.groups:
            raise core.InputError(f"groups={config.groups} does not divide num_experts={num_experts}")
        self.size = num_experts // config.groups
        if config.k > min(self.size, config.groups):
            raise core.InputError(f"k={config.k}: there are {config.groups} groups of {self.size} experts")
        super().__init__(config, dim, num_experts)
        self.primary = NoisyTopK.Config(k=config.k).build(dim, config.groups)

    def choose(self, x: Tensor) -> Choice:
        """(N, dim) -> k² experts."""
        first = self.primary.choose(x)
        groups, k = first.experts, self.config.k
        order = groups.flatten().argsort(stable=True)
        sizes = torch.bincount(groups.flatten(), minlength=self.config.groups)
        parts = x[order // k].split(sizes.tolist())
        seconds = [self.among(part, slice(i * self.size, (i + 1) * self.size), k) for i, part in enumerate(parts)]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        gates = torch.cat([s.gates for s in seconds])[back].unflatten(0, (-1, k))  # (N, k, k)
        within = torch.cat([s.experts for s in seconds])[back].unflatten(0, (-1, k))
        experts = (groups[..., None] * self.size + within).flatten(1)
        gates = (first.gates[..., None] * gates).flatten(1)
        return Choice(experts, gates, first.logits, load=self._load(first, seconds))

    @staticmethod
    def _load(first: Choice, seconds: list[Choice]) -> Tensor | None:
        if first.load is None:
            return None
        means = [s.load / max(len(s.gates), 1) for s in seconds if s.load is not None]
        return (first.load[:, None] * torch.stack(means)).flatten()
