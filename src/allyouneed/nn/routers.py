"""Routers: which experts a token goes to and how much each counts, as six papers have it.

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


@dataclass(frozen=True)
class Choice:
    """What a router wants, before anybody asks whether there is room.

    `experts` (N, k) and `gates` (N, k), the likelier first; `logits` (N, E), of the input as `Top1` has jittered it,
    but without the noise that `NoisyTopK` adds to them; `asked` (N, k), false where a choice is not made use of, None:
    all are; `load` (E,), a smooth count of tokens, None: the count itself.
    """

    experts: Tensor
    gates: Tensor
    logits: Tensor
    asked: Tensor | None = None
    load: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """Where N tokens go: what experts compute by, and all that losses and statistics are made of."""

    choice: Choice
    kept: Tensor | None  # (N, k), whether the token goes there; None: all do
    num_experts: int

    @property
    def experts(self) -> Tensor:
        """(N, k), numbers of experts."""
        return self.choice.experts

    @property
    def gates(self) -> Tensor:
        """(N, k), what each expert's output is multiplied by; 0 where the token does not go there."""
        return self.choice.gates if self.kept is None else self.choice.gates * self.kept

    @property
    def logits(self) -> Tensor:
        """(N, E), or of a hierarchy's first level."""
        return self.choice.logits

    @property
    def asked(self) -> Tensor:
        """(N, k), whether the token would go there, were there room."""
        return torch.ones_like(self.experts, dtype=torch.bool) if self.choice.asked is None else self.choice.asked

    @property
    def importance(self) -> Tensor:
        """(E,), the sum of each expert's gates (Shazeer et al. 2017, eq. 6)."""
        return self._summed(self.choice.gates * self.asked)

    @property
    def load(self) -> Tensor:
        """(E,), tokens that ask for each expert, differentiable where the router's noise makes it so."""
        if self.choice.load is None:
            return self._summed(self.asked.to(self.choice.gates.dtype))
        return self.choice.load

    @property
    def dropped(self) -> Tensor:
        """How many of the choices found no place, ()."""
        return self.experts.new_zeros(()) if self.kept is None else (self.asked & ~self.kept).sum()

    @property
    def broken(self) -> Tensor:
        """How many tokens have a logit that is not finite, (); of noise and a second level the gates tell."""
        return (~torch.cat((self.logits, self.choice.gates), -1).isfinite()).any(-1).sum()

    def _summed(self, values: Tensor) -> Tensor:
        """The sum over tokens of what each expert is given: (N, k) -> (E,)."""
        return values.new_zeros(self.num_experts).index_add(0, self.experts.flatten(), values.flatten())


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


AnyRouter = TopK.Config | Top1.Config | Top2.Config | NoisyTopK.Config | Hierarchical.Config
