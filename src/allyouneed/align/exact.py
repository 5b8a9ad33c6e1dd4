"""Alignment where every text can be written out: the best policy, what it costs, and how far others stay behind it.

All is computed by sums over all texts in float64. Shapes: n texts, V = vocab_size, L tokens a text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from allyouneed.align.selection import best_distribution
from allyouneed.core.errors import InputError


@dataclass(frozen=True)
class Point:
    """A policy's divergence from the reference, in nats, and its mean reward."""

    kl: float
    reward: float


@dataclass(frozen=True)
class Truth:
    """A reference and a reward over all texts: `logprobs` log π_ref and `rewards` r, both (n,), float64.

    >>> truth = Truth(torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.0, 1.0]).double())
    >>> truth.at(truth.logprobs), truth.best(1.0).exp()[1].item() > 0.7
    (Point(kl=0.0, reward=0.5), True)
    """

    logprobs: Tensor
    rewards: Tensor

    def at(self, policy: Tensor) -> Point:
        """KL[π, π_ref] = Σ π log(π/π_ref) and E_π[r] of a policy given by its log-probabilities (n,)."""
        p = policy.exp()
        gaps = torch.where(p > 0, policy - self.logprobs, 0.0)
        return Point((p * gaps).sum().item(), (p * self.rewards).sum().item())

    def best(self, beta: float) -> Tensor:
        """log π*, π* ∝ π_ref·exp(r/β), which has the largest E_π[r] − β·KL[π, π_ref] (Rafailov et al. 2023, eq. 4)."""
        return (self.logprobs + self.rewards / beta).log_softmax(0)

    def best_of(self, count: int) -> Tensor:
        """log π of the text with the highest reward out of `count` drawn from the reference; between equals the lot
        decides, which is to draw one of them by their chances.
        """
        found = best_distribution(self.logprobs.exp().numpy(), self.rewards.numpy(), count)
        return torch.from_numpy(found).log().log_softmax(0)

    def frontier(self, betas: Sequence[float]) -> list[Point]:
        """Where π* is for each β: no policy has more reward within the same divergence."""
        return [self.at(self.best(beta)) for beta in betas]

    @cached_property
    def start(self) -> Point:
        """The reference's own."""
        return self.at(self.logprobs)


def reached(points: Sequence[Point], kl: float) -> float:
    """The reward that a method reaches within a divergence: read off the line through some points, over the
    root of their divergence; beyond the last, that of the last. Over the root, because near the
    reference the best there is grows with it: for small KL π* has the gain √(2·KL·Var r).

    >>> begun = Point(0.0, 0.0)
    >>> reached([begun, Point(4.0, 1.0)], 1.0), reached([begun, Point(4.0, 1.0)], 9.0)
    (0.5, 1.0)
    """
    line = sorted(points, key=lambda point: point.kl)
    for before, after in pairwise(line):
        if kl <= after.kl:
            first, here, last = (math.sqrt(x) for x in (before.kl, kl, after.kl))
            return before.reward + (here - first) / (last - first) * (after.reward - before.reward)
    return line[-1].reward


@torch.inference_mode()
def text_logprobs(module: nn.Module, prompt: int, length: int, *, rows: int = 4096) -> Tensor:
    """log π of every text of `length` tokens after one prompt token, in the order of a dictionary: (n,), float64.

    Args:
        module: of V tokens, called as `module(ids).logits`.
        prompt: the token that texts follow.
        length: L.
        rows: beginnings of texts read at once.

    Raises:
        InputError: there are more than 2^24 texts.
    """
    V, training = int(module.config.vocab_size), module.training  # type: ignore[arg-type, union-attr]
    if V**length > 1 << 24:
        raise InputError(f"{V}^{length} texts cannot be written out; at most 2^24 can")
    module.eval()
    found, powers = [], torch.tensor([V**place for place in reversed(range(length - 1))], dtype=torch.long)
    for start in range(0, V ** (length - 1), rows):
        places = torch.arange(start, min(start + rows, V ** (length - 1)))
        begun = places[:, None] // powers % V  # (rows, L − 1), all but the last token
        ids = torch.cat((torch.full((len(begun), 1), prompt), begun), 1)
        logprobs = module(ids).logits.double().log_softmax(-1)
        known = logprobs[:, :-1].gather(-1, begun[..., None])[..., 0].sum(-1)
        found.append((known[:, None] + logprobs[:, -1]).flatten())
    module.train(training)
    return torch.cat(found)
