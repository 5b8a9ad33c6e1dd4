"""From logits to the next token, request by request. Shapes: V vocabulary."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence
from math import isfinite

import torch
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.requests import Guide

NEVER = float("-inf")
NO_NUMBERS = "the model's logits are no finite numbers; look at its weights, and whether their type is wide enough"
GREEDY = 1e-5  # temperatures below it would only overflow


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits (V,) of the tokens `seen` (V,) by the penalty.

    Source: Keskar et al. 2019, sec. 4.1, with the sign taken into account as is now usual.

    >>> penalise(torch.tensor([2.0, -2.0, 1.0]), torch.tensor([True, True, False]), 2.0).tolist()
    [1.0, -4.0, 1.0]
    """
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
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


def guided(logits: Tensor, allowed: Tensor) -> Tensor:
    """All but the tokens `allowed` (n,) made impossible, those from n on included.

    >>> guided(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False])).tolist()
    [1.0, -inf, -inf]
    """
    kept = torch.full_like(logits, NEVER)
    kept[: len(allowed)] = logits[: len(allowed)].where(allowed, NEVER)
    return kept


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
    """A token drawn from softmax(logits (V,)): the first whose cumulative probability passes a number from `source`.

    Raises:
        InputError: there is no such distribution.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[-1].item()
    if not isfinite(total):
        raise InputError(f"sampling: {NO_NUMBERS}")
    place = torch.searchsorted(cumulative, source.random() * total, right=True)
    return int(place.clamp(max=len(logits) - 1))


def judged(p: Tensor, q: Tensor, draft: int, source: random.Random) -> int:
    """The next token, given a `draft` that was drawn from q (V,): the draft with probability min(1, p/q), else one
    drawn from what p (V,) has more of. So it is distributed as p.

    Source: Leviathan et al. 2023, alg. 1 and app. A.1; Chen et al. 2023, theorem 1.

    >>> judged(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), 0, random.Random(0))
    1
    """
    if source.random() * q[draft].item() < p[draft].item():
        return draft
    more = (p - q).clamp(min=0)
    return draw(more.log(), source) if bool(more.any()) else draft  # nothing is left where they differ by rounding only


def source_of(seed: int | None) -> random.Random:
    """What a seed of 64 bits decides, of either sign; `random.Random` itself takes -1 for 1.

    >>> source_of(-1).random() == source_of(1).random(), source_of(1).random() == random.Random(1).random()
    (False, True)
    """
    return random.Random(None if seed is None else seed % 2**64)


class Sampler:
    """Chooses the tokens of one request, from its own source of randomness.

    What it chooses depends on the logits it is given, its seed and what it chose before, and on nothing else: neither
    on the batch nor on whether the request was interrupted.

    Args:
        sampling: how.
        prompt: its tokens, which a repetition penalty sees.
        vocab_size: V, how many ids may be chosen; logits beyond belong to rows that pad a table, and are not looked at.
        ends: the end tokens.
        guide: says which tokens may come next.

    >>> Sampler(Sampling(temperature=0.0, logit_bias=((2, 9.0),)), [0], 3).choose(torch.tensor([1.0, 2.0, 0.0]))
    2
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab_size: int,
        ends: Iterable[int] = (),
        guide: Guide | None = None,
    ) -> None:
        self.sampling, self.guide, self.made = sampling, guide, 0
        self.vocab_size, self.source = vocab_size, source_of(sampling.seed)
        self.ends = [] if sampling.ignore_eos else sorted(ends)
        counted = sampling.frequency_penalty or sampling.presence_penalty
        self.counts = torch.zeros(vocab_size) if counted else None
        self.seen = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[list(prompt)] = True
        self.greedy = sampling.temperature < GREEDY
        self.biased = bool(counted or sampling.logit_bias or guide or self.seen is not None)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is chosen as it stands."""
        return self.greedy and not self.biased and self.made >= self.sampling.min_tokens

    def choose(self, logits: Tensor) -> int:
        """The next token, from logits (V,); `take` it to go on."""
        logits = self.adjusted(logits)
        if self.greedy:
            return int(logits.argmax())
        return draw(filtered(logits, self.sampling), self.source)

    def judge(self, logits: Tensor, draft: int, odds: Tensor) -> int:
        """The next token, from logits (V,), where a `draft` was drawn from `odds` (V,); `take` it to go on."""
        return judged(self.odds(logits), odds, draft, self.source)

    def odds(self, logits: Tensor) -> Tensor:
        """The distribution that `choose` draws from, (V,) float64."""
        return filtered(self.adjusted(logits), self.sampling).double().softmax(-1)

    def take(self, token: int) -> None:
        """Go on past a token that was chosen."""
        self.made += 1
        if self.counts is not None:
            self.counts[token] += 1
        if self.seen is not None:
            self.seen[token] = True
        if self.guide is not None:
            self.guide.take(token)

    def fork(self, source: random.Random) -> Sampler:
        """Another at the same place, which draws from `source`: guesses are made with it."""
        other = copy.copy(self)
        other.source = source
        other.counts = None if self.counts is None else self.counts.clone()
        other.seen = None if self.seen is None else self.seen.clone()
        other.guide = None if self.guide is None else self.guide.copy()
        return other

    def adjusted(self, logits: Tensor) -> Tensor:
        """Logits (V,) with penalties, biases, and what must not come next made impossible."""
        sampling, logits = self.sampling, logits[: self.vocab_size]
        if self.seen is not None:
            logits = penalise(logits, self.seen, sampling.repetition_penalty)
        if self.counts is not None:
            logits = logits - sampling.frequency_penalty * self.counts - sampling.presence_penalty * (self.counts > 0)
        if sampling.logit_bias:
            tokens, biases = zip(*sampling.logit_bias, strict=True)
            logits = logits.index_add(0, torch.tensor(tokens), torch.tensor(biases, dtype=logits.dtype))
        if self.guide is not None:
            logits = guided(logits, self.guide.allowed())
        if self.made < sampling.min_tokens and self.ends:
            longer = logits.index_fill(0, torch.tensor(self.ends), NEVER)
            logits = longer if self.guide is None or bool(longer.isfinite().any()) else logits  # the guide decides
        return logits
