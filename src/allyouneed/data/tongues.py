"""Many languages of one alphabet, each with a table of its own: a small world in which what is missing is capacity.

Shapes: L languages, V words, B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from allyouneed import core
from allyouneed.core.seeds import generator
from allyouneed.data.packing import Batch


class Tongues(core.Configured):
    """Rows that begin with the name of their language and go on in it, each word depending on the one before it only.

    A language is a table of V × V probabilities, softmax(spread · normal noise), so that all languages together are
    L·V² numbers with nothing in common, and whoever knows half of them is half as good. Words are the ids 0 … V − 1,
    names the ids after them. The first word of a row is uniform.

    >>> world = Tongues.Config(languages=3, words=8).build()
    >>> ids = world.sample(2, 5, torch.Generator().manual_seed(0))
    >>> ids.shape, world.nll(ids).shape, world.entropy(5) < torch.tensor(8).log().item()
    (torch.Size([2, 5]), torch.Size([2, 4]), True)
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`spread` is how sure a language is of its next word, `seed` which world it is."""

        languages: int = 16
        words: int = 64
        spread: float = 2.0
        seed: int = 0

        @property
        def vocab_size(self) -> int:
            """Words and names."""
            return self.words + self.languages

    def __init__(self, config: Config) -> None:
        self.config, L, V = config, config.languages, config.words
        noise = torch.randn(L, V, V, generator=generator(config.seed, "tongues"), dtype=torch.double)
        self.logprobs = (config.spread * noise).log_softmax(-1)
        self.cumulative = self.logprobs.exp().cumsum(-1)

    def sample(self, rows: int, length: int, source: torch.Generator) -> Tensor:
        """(rows, length) ids, of languages drawn evenly."""
        L, V = self.config.languages, self.config.words
        ids = torch.empty(rows, length, dtype=torch.long)
        language = torch.randint(L, (rows,), generator=source)
        ids[:, 0], ids[:, 1] = V + language, torch.randint(V, (rows,), generator=source)
        chance = torch.rand(rows, length, generator=source, dtype=torch.double)
        for t in range(2, length):
            rules = self.cumulative[language, ids[:, t - 1]]
            ids[:, t] = torch.searchsorted(rules, chance[:, t, None].contiguous())[:, 0].clamp(max=V - 1)
        return ids

    def batch(self, rows: int, length: int, source: torch.Generator) -> Batch:
        """`ids` and `targets`, both (rows, length): rows of length + 1."""
        ids = self.sample(rows, length + 1, source)
        return {"ids": ids[:, :-1], "targets": ids[:, 1:]}

    def nll(self, ids: Tensor) -> Tensor:
        """The world's own −log p of the tokens after the first, in nats: (B, T) -> (B, T − 1)."""
        language = (ids[:, :1] - self.config.words).expand(-1, ids.shape[1] - 2)
        first = torch.full((len(ids), 1), float(self.config.words), dtype=torch.double).log()
        return torch.cat((first, -self.logprobs[language, ids[:, 1:-1], ids[:, 2:]]), 1)

    def entropy(self, length: int) -> float:
        """The expected `nll` per token of rows of `length` ids, in nats, exactly: no model can have a lower loss."""
        p = self.logprobs.exp()
        each = -(p * self.logprobs).sum(-1)  # (L, V)
        words = torch.full_like(each, 1.0 / self.config.words)
        total = torch.full((), float(self.config.words), dtype=torch.double).log()
        for _ in range(2, length):
            total = total + (words * each).sum(-1).mean()
            words = torch.einsum("lv,lvw->lw", words, p)
        return total.item() / (length - 1)
