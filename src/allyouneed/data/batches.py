"""Endless iterators of batches, each the owner of its randomness.

None touches a global generator. `state_dict()` says where an iterator stands and `load_state_dict()` takes one of the
same making there, in the same process or another: what then comes is bit for bit what would have come. What a batch
holds is made elsewhere (`packing`, a small world's own function).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator
from allyouneed.data.packing import Batch

Example = TypeVar("Example")


def needed(examples: int, batch_size: int, epochs: float = 1) -> int:
    """Batches until each of so many examples was taken `epochs` times, the last one begun counting whole.

    >>> needed(42, 16), needed(42, 16, epochs=3)
    (3, 8)
    """
    return max(1, math.ceil(examples * epochs / batch_size))


class Generated(Iterator[Batch]):
    """Batches from a function that draws all its randomness from the generator it is handed.

    >>> coins = Generated(lambda g: {"ids": torch.randint(2, (1, 8), generator=g)}, seed=0)
    >>> before = coins.state_dict()
    >>> first = next(coins)
    >>> coins.load_state_dict(before)
    >>> next(coins)["ids"].equal(first["ids"])
    True
    """

    def __init__(self, make: Callable[[torch.Generator], Batch], *, seed: int) -> None:
        self.make, self.generator = make, generator(seed, "batches")

    def __next__(self) -> Batch:
        return self.make(self.generator)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            InputError: `state` is of another kind of iterator.
        """
        try:
            self.generator.set_state(state["generator"])
        except (KeyError, TypeError, RuntimeError):
            raise InputError("data state: field 'generator' is not a generator's state; start the run anew") from None


class Windows(Generated):
    """Random windows of one long text: `ids` (B, T) and `targets` (B, T), the same one token further on.

    Args:
        tokens: (N,), any integer type, on disk if it was mapped.
        batch_size: B.
        length: T.
        seed: of the places where windows begin.

    Raises:
        InputError: the text is shorter than one window and the token after it.

    >>> batch = next(Windows(torch.arange(100), batch_size=2, length=5, seed=0))
    >>> bool((batch["targets"] == batch["ids"] + 1).all()), batch["ids"].shape
    (True, torch.Size([2, 5]))
    """

    def __init__(self, tokens: Tensor, *, batch_size: int, length: int, seed: int) -> None:
        if len(tokens) <= length:
            raise InputError(f"a text of {len(tokens)} tokens is too short for windows of {length} and the next token")
        self.tokens, self.batch_size = tokens, batch_size
        self.offsets = torch.arange(length + 1)
        super().__init__(self._draw, seed=seed)

    def _draw(self, randomness: torch.Generator) -> Batch:
        starts = torch.randint(len(self.tokens) - len(self.offsets) + 1, (self.batch_size, 1), generator=randomness)
        window = self.tokens[starts + self.offsets].long()  # (B, T + 1)
        return {"ids": window[:, :-1], "targets": window[:, 1:]}


class Epochs(Iterator[Batch], Generic[Example]):
    """Examples over and over, each exactly once an epoch, in an order of its own each epoch.

    The epochs follow one another without a gap: a batch may end one and begin the next, so all are of one size.

    Args:
        examples: anything of known length that gives the i-th.
        batch_size: examples a batch.
        collate: a batch of that many examples.
        seed: of the orders.

    >>> numbers = Epochs(range(5), batch_size=5, collate=lambda x: {"ids": torch.tensor(x)}, seed=0)
    >>> [sorted(next(numbers)["ids"].tolist()) for _ in range(2)]
    [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        collate: Callable[[list[Example]], Batch],
        seed: int,
    ) -> None:
        if not len(examples):
            raise InputError("no examples to train on")
        self.examples, self.batch_size, self.collate, self.seed = examples, batch_size, collate, seed
        self.drawn = 0
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def __next__(self) -> Batch:
        places = range(self.drawn, self.drawn + self.batch_size)
        batch = self.collate([self.examples[self._index(place)] for place in places])
        self.drawn = places.stop
        return batch

    def _index(self, place: int) -> int:
        """Which example stands at a place of the endless order."""
        epoch, within = divmod(place, len(self.examples))
        if epoch != self.epoch:
            randomness = generator(self.seed, "epoch", epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.examples), generator=randomness)
        return int(self.order[within])

    def state_dict(self) -> dict[str, Any]:
        """How many examples were drawn, and of what."""
        return {"drawn": self.drawn, "examples": len(self.examples), "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            InputError: `state` is of other data, another seed or another kind of iterator.
        """
        for name, ours in (("examples", len(self.examples)), ("seed", self.seed)):
            if state.get(name) != ours:
                raise InputError(f"data state: field {name!r} is {state.get(name)!r}, this run's is {ours}")
        if not isinstance(state.get("drawn"), int) or state["drawn"] < 0:
            raise InputError(f"data state: field 'drawn' is {state.get('drawn')!r}, not a count of examples")
        self.drawn = state["drawn"]
