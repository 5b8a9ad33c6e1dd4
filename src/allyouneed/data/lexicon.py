"""A lexicon: text of words that follow Zipf's law and are spelled by lot, whose entropy is known in closed form.

What scaling laws are measured on here. To predict such text is to know words, the frequent ones first; how much is to
be gained by knowing ever more of them falls as a power of how many are known already, which is what a power law of loss
needs (Hutter 2021, sec. 3; Michaud et al. 2023, sec. 2). Shapes: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator
from allyouneed.data.batches import Generated
from allyouneed.data.packing import Batch


class Lexicon(core.Configured):
    """Words drawn independently, the k-th most frequent with probability ∝ k^−exponent; a token is a letter.

    All words are different and have the same number of letters, so that a text says which words it is made of, and its
    entropy is that of the words, divided among their letters. No model can lose less on average.

    >>> world = Lexicon.Config(letters=4, length=2, words=3).build()
    >>> batch = world.batch(2, 6, torch.Generator().manual_seed(0))
    >>> batch["ids"].shape, round(world.entropy, 3)
    (torch.Size([2, 6]), 0.476)
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`length` letters a word; `seed` is of the spelling."""

        letters: int = 32
        length: int = 4
        words: int = 65536
        exponent: float = 1.2
        seed: int = 0

    def __init__(self, config: Config) -> None:
        strings = config.letters**config.length
        if not 0 < 2 * config.words <= strings:
            raise InputError(f"words={config.words}; at most half of the {strings} strings there are may be words")
        frequency = torch.arange(1, config.words + 1, dtype=torch.double) ** -config.exponent
        self.seed = config.seed
        self.vocab_size, self.length, self.probabilities = config.letters, config.length, frequency / frequency.sum()
        self.cumulative = self.probabilities.cumsum(0)
        self.places = config.letters ** torch.arange(config.length - 1, -1, -1)
        codes = _different(config.words, strings, config.seed)
        self.spelling = codes[:, None] // self.places % config.letters  # (words, length)
        self.codes, self.ranks = codes.sort()

    @property
    def entropy(self) -> float:
        """−Σ p log p / length: nats a token, the least mean loss there can be."""
        p = self.probabilities
        return -(p * p.log()).sum().item() / self.length

    def nll(self, targets: Tensor) -> Tensor:
        """The world's own −log p of each word, in nats: (B, T) -> (B, T / length)."""
        codes = (targets.unflatten(1, (-1, self.length)) * self.places).sum(-1)
        return -self.probabilities[self.ranks[torch.searchsorted(self.codes, codes)]].log()

    def batches(self, rows: int, length: int, *, seed: int) -> Generated:
        """Endless batches, no text of which was ever there before."""
        return Generated(lambda source: self.batch(rows, length, source), seed=seed)

    def held_out(self, rows: int, length: int) -> tuple[Batch, float]:
        """A batch to test on, the same for all, and how much more or less than the entropy it costs the world itself,
        in nats a token: less this, a loss is hardly moved by which words happen to stand there.
        """
        batch = self.batch(rows, length, generator(self.seed, "held out"))
        return batch, self.nll(batch["targets"]).sum().item() / (rows * length) - self.entropy

    def batch(self, rows: int, length: int, source: torch.Generator) -> Batch:
        """`ids` and `targets`, each (rows, length). The targets are whole words; the first input ends a word before.

        Raises:
            InputError: `length` is not a whole number of words.
        """
        if length % self.length:
            raise InputError(f"length={length}; words have {self.length} letters, so rows need a multiple of that")
        chance = torch.rand(rows, 1 + length // self.length, generator=source, dtype=torch.double)
        drawn = torch.searchsorted(self.cumulative, chance).clamp(max=len(self.cumulative) - 1)
        text = self.spelling[drawn].flatten(1)[:, self.length - 1 :]
        return {"ids": text[:, :-1], "targets": text[:, 1:]}


def _different(count: int, below: int, seed: int) -> Tensor:
    """`count` different numbers below `below`, at least twice as large, in random order."""
    source = generator(seed, "lexicon")
    drawn = torch.randint(below, (4 * count + 64,), generator=source).unique()  # 4 draws each: enough even of half
    return drawn[torch.randperm(len(drawn), generator=source)[:count]]
