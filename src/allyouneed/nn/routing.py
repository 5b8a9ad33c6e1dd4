"""Where tokens go: what a router wants, and what becomes of it once room is asked for. How it is chosen is
`nn.routers`' business.

Shapes: N tokens, k choices a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
