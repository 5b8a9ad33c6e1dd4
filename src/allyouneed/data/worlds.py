"""Small worlds: sequences made by seeded code, whose truth is known, for experiments that a laptop can run.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from allyouneed import core
from allyouneed.core.seeds import generator
from allyouneed.data.packing import IGNORED


class Markov(core.Configured):
    """Text in which each token depends on the two before it, with rules as unequal in frequency as words are.

    The next token's distribution for each pair of tokens is softmax(prior + spread · normal noise), the prior being
    Zipf's law, so that a few rules are needed all the time and most of them seldom. A model learns them in the order
    of their frequency. The log-probability that the world itself gives to a text is known exactly: what a model loses
    beyond it is its own.

    >>> world = Markov.Config(vocab_size=8).build()
    >>> ids = world.sample(2, 5, torch.Generator().manual_seed(0))
    >>> ids.shape, world.nll(ids).shape
    (torch.Size([2, 5]), torch.Size([2, 3]))
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`spread` is how much two rules differ, `seed` which world it is."""

        vocab_size: int = 64
        spread: float = 2.0
        seed: int = 0

    def __init__(self, config: Config) -> None:
        V = config.vocab_size
        prior = -torch.arange(1, V + 1).double().log()
        noise = torch.randn(V, V, V, generator=generator(config.seed, "markov"), dtype=torch.double)
        self.vocab_size, self.logprobs = V, (prior + config.spread * noise).log_softmax(-1)
        self.cumulative = self.logprobs.exp().cumsum(-1)

    def sample(self, rows: int, length: int, source: torch.Generator) -> Tensor:
        """(rows, length) ids; the first two tokens of a row are uniform."""
        ids = torch.empty(rows, length, dtype=torch.long)
        ids[:, :2] = torch.randint(self.vocab_size, (rows, 2), generator=source)
        chance = torch.rand(rows, length, generator=source, dtype=torch.double)
        for t in range(2, length):
            rules = self.cumulative[ids[:, t - 2], ids[:, t - 1]]
            ids[:, t] = torch.searchsorted(rules, chance[:, t, None].contiguous())[:, 0].clamp(max=self.vocab_size - 1)
        return ids

    def nll(self, ids: Tensor) -> Tensor:
        """The world's own −log p of tokens 2 … T−1, in nats: (B, T) -> (B, T − 2)."""
        return -self.logprobs[ids[:, :-2], ids[:, 1:-1], ids[:, 2:]]


class Recall(core.Configured):
    """Pairs of a key and its value under a mapping drawn anew for every row: k₁ v₁ k₂ v₂ …

    Nothing but the row itself tells the mapping, so whoever predicts values better late in a row than early has learned
    from the context. With `consistent=False` every pair draws its value afresh and there is nothing to learn: the
    control. Keys are the ids 0 … symbols − 1, values the next `symbols` ids; only values are targets.

    >>> world = Recall.Config(symbols=4, pairs=3).build()
    >>> ids, targets = world.sample(1, torch.Generator().manual_seed(0))
    >>> ids.shape, (targets != IGNORED)[0].tolist()
    (torch.Size([1, 5]), [True, False, True, False, True])
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`symbols` keys and as many values, `pairs` a row."""

        symbols: int = 8
        pairs: int = 24
        consistent: bool = True

    def __init__(self, config: Config) -> None:
        self.symbols, self.pairs, self.consistent = config.symbols, config.pairs, config.consistent

    @property
    def vocab_size(self) -> int:
        """Keys and values."""
        return 2 * self.symbols

    def sample(self, rows: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids and targets, each (rows, 2·pairs − 1)."""
        keys = torch.randint(self.symbols, (rows, self.pairs), generator=source)
        fresh = torch.randint(self.symbols, (rows, self.pairs), generator=source)
        mapping = torch.randint(self.symbols, (rows, self.symbols), generator=source)
        values = self.symbols + (mapping.gather(1, keys) if self.consistent else fresh)
        whole = torch.stack((keys, values), -1).flatten(1)
        targets = whole[:, 1:].clone()
        targets[:, 1::2] = IGNORED
        return whole[:, :-1], targets

    def best_loss(self) -> list[float]:
        """The least expected loss of each pair's value, in nats: log(symbols) · P(its key was not seen before)."""
        unseen = (1 - 1 / self.symbols) if self.consistent else 1.0
        return [math.log(self.symbols) * unseen**n for n in range(self.pairs)]
