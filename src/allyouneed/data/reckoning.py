"""Questions that are reckoned out, whose answers have a length of one's choosing and are exactly right or not.

Every token of an answer asks for about as much, so that what an answer of k tokens asks more than one of a single
token is only their number: the first k tokens of an answer are themselves the answer to the question of that length.

Shapes: B rows, P tokens of prompt, k = length of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from allyouneed import core
from allyouneed.core.seeds import generator
from allyouneed.data.packing import IGNORED, Batch


class Reckoning(core.Configured):
    """Questions with one right answer; ids from 0 to `symbols` − 1 are what answers are made of."""

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`length` is k, the tokens of an answer."""

        length: int = 8

    symbols: int
    vocab_size: int
    chained: ClassVar[bool]  # whether a token of the answer hangs on the one before it, so that an error is carried on

    def __init__(self, config: Config) -> None:
        self.length = config.length
        if config.length < 1:
            raise core.InputError(f"length={config.length}; an answer has at least one token")

    def sample(self, rows: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Prompts (rows, P) and their answers (rows, k)."""
        raise NotImplementedError

    def batch(self, rows: int, source: torch.Generator) -> Batch:
        """Questions with their answers, of which only the answers are to be predicted."""
        prompts, answers = self.sample(rows, source)
        whole = torch.cat((prompts, answers), 1)
        targets = whole[:, 1:].clone()
        targets[:, : prompts.shape[1] - 1] = IGNORED
        return {"ids": whole[:, :-1], "targets": targets}

    def options(self, answers: Tensor, count: int, source: torch.Generator) -> Tensor:
        """Each answer and `count` − 1 others that differ from it in one token: (B, k) -> (B, count, k), the right one
        first. They are distinct where `symbols` allows.
        """
        found = answers[:, None].repeat(1, count, 1)
        rows = torch.arange(len(answers))
        places = torch.rand(len(answers), self.length, generator=source).argsort(1)
        shifts = 1 + torch.rand(len(answers), self.symbols - 1, generator=source).argsort(1)
        for i in range(1, count):
            place, shift = places[:, i % self.length], shifts[:, i % (self.symbols - 1)]
            found[rows, i, place] = (found[rows, i, place] + shift) % self.symbols
        return found


class Sums(Reckoning):
    """a + b modulo base^k, both of k digits, the lowest digit first, so that the first j digits are those of j columns.

    A column of two digits is one token of the prompt (as few of a tokenizer's tokens hold several digits), `base` of
    them have the same sum, and one digit of the answer depends on its column and on the carry of those before it.

    >>> world = Sums.Config(base=10, length=2).build()
    >>> prompts, answers = world.sample(1, torch.Generator().manual_seed(0))
    >>> [world.column(token) for token in prompts[0, :-1].tolist()], answers[0].tolist()
    ([(4, 3), (9, 0)], [7, 9])
    """

    chained = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Reckoning.Config):
        """`base` of the numbers."""

        base: int = 20

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.symbols = config.base
        self.equals = config.base + config.base**2
        self.vocab_size = self.equals + 1

    def column(self, token: int) -> tuple[int, int]:
        """The two digits of a prompt's token."""
        return divmod(token - self.symbols, self.symbols)

    def sample(self, rows: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Columns and the sign of equality (rows, k + 1), the sum's digits (rows, k)."""
        a, b = torch.randint(self.symbols, (2, rows, self.length), generator=source)
        digits, carry = [], torch.zeros(rows, dtype=torch.long)
        for column in (a + b).unbind(1):
            digits.append((column + carry) % self.symbols)
            carry = (column + carry) // self.symbols
        columns = self.symbols + self.symbols * a + b
        return torch.cat((columns, torch.full((rows, 1), self.equals)), 1), torch.stack(digits, 1)


class Products(Reckoning):
    """A thing moved by one permutation after the other: x, π₁(x), π₂(π₁(x)) …, the word problem of a permutation group.

    The prompt names k permutations by their letters, then x. Which permutation a letter stands for is drawn once, by
    `seed`: `letters` · `things` facts that only training tells, the letters by Zipf's law as unequally often as words.

    >>> world = Products.Config(things=4, letters=3, length=2).build()
    >>> prompts, answers = world.sample(1, torch.Generator().manual_seed(0))
    >>> first, second, x = (prompts[0] - torch.tensor([4, 4, 0])).tolist()
    >>> moved = world.permutations[first, x]
    >>> answers[0].tolist() == [moved.item(), world.permutations[second, moved].item()]
    True
    """

    chained = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Reckoning.Config):
        """`things` are moved, by as many permutations as there are `letters`."""

        things: int = 32
        letters: int = 64
        seed: int = 0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.symbols, self.letters = config.things, config.letters
        self.vocab_size = config.things + config.letters
        drawn = torch.rand(config.letters, config.things, generator=generator(config.seed, "permutations"))
        self.permutations = drawn.argsort(1)  # (letters, things)
        self.frequencies = 1.0 / torch.arange(1, config.letters + 1)

    def sample(self, rows: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Letters and the thing (rows, k + 1), where it has come to after each letter (rows, k)."""
        letters = torch.multinomial(self.frequencies, rows * self.length, replacement=True, generator=source)
        letters = letters.view(rows, self.length)
        thing = torch.randint(self.symbols, (rows,), generator=source)
        prompts, places = torch.cat((self.symbols + letters, thing[:, None]), 1), []
        for letter in letters.unbind(1):
            thing = self.permutations[letter, thing]
            places.append(thing)
        return prompts, torch.stack(places, 1)
