"""From logits to the next token. Shapes: R rows, V vocabulary."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from allyouneed.generate.language_model import Sampling

NEVER = float("-inf")
GREEDY = 1e-5  # temperatures below it would only overflow


def penalise(logits: Tensor, seen: Tensor, penalties: Tensor) -> Tensor:
    """Divide positive and multiply negative logits (R, V) of the tokens `seen` (R, V, bool) by `penalties` (R, 1).

    Source: Keskar et al. 2019, sec. 4.1, with the sign taken into account as is now usual.
    """
    lowered = torch.where(logits > 0, logits / penalties, logits * penalties)
    return torch.where(seen, lowered, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the `k` largest of logits (V,) made impossible.

    >>> keep_top_k(torch.tensor([1.0, 3.0, 2.0]), 2).tolist()
    [-inf, 3.0, 2.0]
    """
    least = logits.topk(min(k, len(logits))).values[-1]
    return logits.where(logits >= least, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """All but the smallest set of the likeliest tokens whose probabilities reach `p` made impossible.

    Source: Holtzman et al. 2020, sec. 3.1. The likeliest always stays.

    >>> keep_top_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.6).isfinite().tolist()
    [True, True, False]
    """
    ordered, order = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(0, order, (before < p) | (before == 0))
    return logits.where(kept, NEVER)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens less than `p` times as likely as the likeliest made impossible (Nguyen et al. 2024, sec. 3).

    >>> keep_min_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.5).isfinite().tolist()
    [True, True, False]
    """
    return logits.where(logits >= logits.max() + torch.tensor(p).log(), NEVER)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (V,) divided by the temperature, with what top-k, top-p and min-p leave out made impossible."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def draw(logits: Tensor, source: random.Random) -> int:
    """A token drawn from softmax(logits (V,)): the first whose cumulative probability passes a number from `source`."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    place = torch.searchsorted(cumulative, source.random() * cumulative[-1].item(), right=True)
    return int(place.clamp(max=len(logits) - 1))


class Sampler:
    """Chooses tokens for the rows of a batch, each with its own `Sampling` and its own source of randomness.

    A row's choices depend on its own logits and seed alone, whatever else is in the batch.
    """

    def __init__(self, samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        self.samplings = list(samplings)
        self.sources = [random.Random(sampling.seed) for sampling in samplings]
        self.penalised = any(sampling.repetition_penalty != 1.0 for sampling in samplings)
        self.all_greedy = all(sampling.temperature < GREEDY for sampling in samplings)
        if self.penalised:
            self.penalties = torch.tensor([[sampling.repetition_penalty] for sampling in samplings])
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self.seen[row, list(prompt)] = True

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row: (R, V) -> (R,)."""
        if self.penalised:
            logits = penalise(logits, self.seen, self.penalties)
        tokens = logits.argmax(-1)
        if not self.all_greedy:
            for row, (sampling, source) in enumerate(zip(self.samplings, self.sources, strict=True)):
                if sampling.temperature >= GREEDY:
                    tokens[row] = draw(filtered(logits[row], sampling), source)
        if self.penalised:
            self.seen[torch.arange(len(tokens)), tokens] = True
        return tokens

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.samplings = [self.samplings[row] for row in rows]
        self.sources = [self.sources[row] for row in rows]
        if self.penalised:
            self.penalties, self.seen = self.penalties[list(rows)], self.seen[list(rows)]
