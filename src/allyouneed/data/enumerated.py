"""A world small enough to be written out: every text there is, what it is worth, and who prefers which.

Holds texts, rewards and simulated labellers. What the best policy over these texts is, `align.exact` computes.
Shapes: n = V^L texts of L tokens out of V; B pairs.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from allyouneed import core
from allyouneed.core.seeds import generator
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.data.vocabularies import byte_level

PROMPT = 0  # the token that all texts follow


class Enumerated(core.Configured):
    """All texts of `length` tokens that may follow the one prompt, token 0.

    A text is worth the sum of what its tokens, its neighbouring pairs and the pair of its first and last token are
    worth, each drawn once from N(0, 1), each kind divided by the root of how many of it a text has, and their sum by
    that of the kinds: so rewards are of the order of 1, and what deviation they have in a world follows from its
    draw. People here write by a chain: the next token depends on the last. All follow from `seed`.

    >>> world = Enumerated.Config(vocab_size=4, length=3).build()
    >>> world.texts.shape, world.rewards.shape, world.number(world.texts[7:9]).tolist()
    (torch.Size([64, 3]), torch.Size([64]), [7, 8])
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`spread` is how much what may follow a token differs between tokens."""

        vocab_size: int = 16
        length: int = 5
        spread: float = 1.0
        seed: int = 0

        def __post_init__(self) -> None:
            if not (2 <= self.vocab_size <= 26 and self.length >= 2 and self.vocab_size**self.length <= 1 << 24):
                said = f"vocab_size={self.vocab_size}, length={self.length}"
                raise core.InputError(f"{said}; 2 to 26 tokens, a length from 2, and at most 2^24 texts are needed")

    def __init__(self, config: Config) -> None:
        V, draw = config.vocab_size, generator(config.seed, "enumerated")
        self.vocab_size, self.length = V, config.length
        self.single = torch.randn(V, generator=draw, dtype=torch.float64)
        self.neighbours, self.ends, self.chain = (
            torch.randn(V, V, generator=draw, dtype=torch.float64) for _ in range(3)
        )
        self.chain = (config.spread * self.chain).softmax(-1)

    @cached_property
    def texts(self) -> Tensor:
        """All of them in the order of a dictionary: (n, L)."""
        places = torch.arange(self.vocab_size**self.length)
        return torch.stack([places // power % self.vocab_size for power in self._powers], -1)

    @cached_property
    def rewards(self) -> Tensor:
        """What each is worth: (n,), float64."""
        return self.reward(self.texts)

    def reward(self, texts: Tensor) -> Tensor:
        """What texts are worth: (…, L) -> (…), float64."""
        single = self.single[texts].sum(-1) / self.length**0.5
        pairs = self.neighbours[texts[..., :-1], texts[..., 1:]].sum(-1) / (self.length - 1) ** 0.5
        found: Tensor = (single + pairs + self.ends[texts[..., 0], texts[..., -1]]) / 3**0.5
        return found

    def number(self, texts: Tensor) -> Tensor:
        """The places of texts in `texts`: (…, L) -> (…)."""
        return (texts * torch.tensor(self._powers)).sum(-1)

    def written(self, rows: int, draw: torch.Generator) -> Tensor:
        """Texts as people write them: (rows, L)."""
        found = [torch.full((rows,), PROMPT)]
        for _ in range(self.length):
            found.append(torch.multinomial(self.chain[found[-1]], 1, generator=draw)[:, 0])
        return torch.stack(found[1:], -1)

    def preferred(self, first: Tensor, second: Tensor, draw: torch.Generator) -> Tensor:
        """Whether a labeller prefers the first of two texts, by Bradley and Terry's chances σ(r₁ − r₂): (B, L), (B, L)
        -> (B,).
        """
        chance = (self.reward(first) - self.reward(second)).sigmoid()
        return torch.rand(len(chance), generator=draw, dtype=torch.float64) < chance

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """A letter for each token; no token ends a text."""
        letters = string.ascii_lowercase[: self.vocab_size]
        return Tokenizer(byte_level({letter: i for i, letter in enumerate(letters)}, [], split=None), name="letters")

    def read(self, text: str) -> Tensor:
        """The tokens of a text in letters: (L,)."""
        return torch.tensor(self.tokenizer.encode(text))

    @property
    def _powers(self) -> list[int]:
        return [self.vocab_size**place for place in reversed(range(self.length))]
