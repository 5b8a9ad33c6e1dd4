"""One fixed order of the data: any batch from its step number alone, in time that depends on the batch alone.

What a model has seen by step k, and in which order, can so be asked without training, without a stored order and
without skipping through it (Biderman et al. 2023, sec. 2.3: every model of the suite sees the same data in the same
order). Steps count from 1, as the training loop counts them: `batch(k)` is what step k learns from.

Shapes: B rows, T tokens, N windows, M planted sequences of S tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import derive
from allyouneed.data.packing import Batch

ROUNDS = 8  # twice the four after which Luby & Rackoff's argument holds: halves are short here, rounds cheap


class Permutation:
    """A seeded permutation of 0 … size − 1 that is computed place by place and never stored.

    A Feistel network over the next power of four (Luby & Rackoff 1988); what it sends beyond `size` is sent on until it
    falls inside, fewer than four times on average (cycle walking, Black & Rogaway 2002, sec. 4).

    >>> sorted(Permutation(5, seed=0)(np.arange(5)).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, seed: int) -> None:
        assert 0 < size <= 1 << 62, f"no permutation of {size}"
        self.size, bits = size, (size - 1).bit_length()
        self.half = np.uint64(max(1, (bits + 1) // 2))
        self.mask = np.uint64((1 << int(self.half)) - 1)
        self.keys = [np.uint64(derive(seed, "round", number)) for number in range(ROUNDS)]

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at each of `places`, an array of any shape: int64."""
        found = self._network(places.astype(np.uint64))
        while (outside := found >= self.size).any():
            found[outside] = self._network(found[outside])
        return found.astype(np.int64)

    def _network(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self.half, x & self.mask
        for key in self.keys:
            left, right = right, left ^ (_mixed(right ^ key) & self.mask)
        return (left << self.half) | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """64 bits, each of which depends on all of the input's (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Replay(Iterator[Batch]):
    """Batches by step number, and so an endless iterator whose whole state is the step it has come to."""

    step = 0  # that of the last batch given

    def batch(self, step: int) -> Batch:
        """What training step `step`, counted from 1, learns from."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What decides the order; two replays of the same identity give the same batches."""
        raise NotImplementedError

    def __next__(self) -> Batch:
        self.step += 1
        return self.batch(self.step)

    def state_dict(self) -> dict[str, Any]:
        """The step, and of which order."""
        return {"step": self.step, **self.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            InputError: `state` is of another order or another kind of iterator.
        """
        for name, ours in self.identity().items():
            if state.get(name) != ours:
                raise InputError(f"data state: field {name!r} is {state.get(name)!r}, this run's is {ours!r}")
        if not isinstance(state.get("step"), int) or state["step"] < 0:
            raise InputError(f"data state: field 'step' is {state.get('step')!r}, not a number of steps")
        self.step = state["step"]


class FixedOrder(Replay):
    """Windows of one long text, side by side: `ids` (B, T) and `targets` (B, T), the same one token further on.

    Each epoch shows every window once, in an order of its own; epochs follow one another without a gap.

    Args:
        tokens: documents packed one after another, (L,), any integer type, on disk if it was mapped.
        batch_size: B.
        length: T. A window's last target is the next window's first token.
        seed: of the order.

    Raises:
        InputError: the text is shorter than one window and the token after it.

    >>> order = FixedOrder(torch.arange(21), batch_size=4, length=5, seed=0)
    >>> first = next(order)["ids"]
    >>> sorted(first[:, 0].tolist()), order.batch(1)["ids"].equal(first)
    ([0, 5, 10, 15], True)
    """

    def __init__(self, tokens: Tensor, *, batch_size: int, length: int, seed: int) -> None:
        if len(tokens) <= length:
            raise InputError(f"a text of {len(tokens)} tokens is too short for windows of {length} and the next token")
        self.tokens, self.batch_size, self.length, self.seed = tokens, batch_size, length, seed
        self.windows = (len(tokens) - 1) // length

    def batch(self, step: int) -> Batch:
        """What training step `step` learns from."""
        rows = self.rows(step)
        return {"ids": rows[:, :-1], "targets": rows[:, 1:]}

    def rows(self, step: int) -> Tensor:
        """The windows of a step, each with the token after it: (B, T + 1)."""
        starts = torch.from_numpy(self.index(self.places(step)) * self.length)
        return self.tokens[starts[:, None] + torch.arange(self.length + 1)].long()

    def places(self, step: int) -> np.ndarray:
        """The places of a step's rows in the endless order, counted from 0: (B,)."""
        if step < 1:
            raise InputError(f"step {step}: the first step is 1")
        return np.arange((step - 1) * self.batch_size, step * self.batch_size)

    def index(self, places: np.ndarray) -> np.ndarray:
        """Which window stands at each of `places`, (n,) -> (n,)."""
        epochs, within = np.divmod(places, self.windows)
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = Permutation(self.windows, derive(self.seed, "epoch", int(epoch)))(within[here])
        return found

    def identity(self) -> dict[str, Any]:
        """What decides the order."""
        return {"windows": self.windows, "batch_size": self.batch_size, "length": self.length, "seed": self.seed}


class Planted(Replay):
    """A fixed order in which some rows begin with given sequences; everything else stays as it was.

    Args:
        order: what they are planted in.
        sequences: (M, S) token ids, S ≤ T + 1.
        plan: place in the order -> which sequence; a sequence may stand at many places.

    Raises:
        InputError: sequences longer than a row, or a plan that names another.

    >>> order = FixedOrder(torch.arange(21), batch_size=4, length=5, seed=0)
    >>> planted = Planted(order, torch.tensor([[97, 98, 99]]), {1: 0})
    >>> changed = planted.batch(1)["ids"] != order.batch(1)["ids"]
    >>> changed.nonzero().tolist()
    [[1, 0], [1, 1], [1, 2]]
    """

    def __init__(self, order: FixedOrder, sequences: Tensor, plan: Mapping[int, int]) -> None:
        if sequences.shape[1] > order.length + 1:
            raise InputError(f"sequences of {sequences.shape[1]} tokens; rows have {order.length + 1}")
        strange = [i for i in plan.values() if not 0 <= i < len(sequences)]
        if strange:
            raise InputError(f"plan: there is no sequence {strange[0]}, only {len(sequences)}")
        self.order, self.sequences = order, sequences.long()
        self.places = np.array(sorted(plan), dtype=np.int64)
        self.which = np.array([plan[place] for place in sorted(plan)], dtype=np.int64)

    def batch(self, step: int) -> Batch:
        """What training step `step` learns from."""
        rows, places = self.order.rows(step), self.order.places(step)
        first, end = np.searchsorted(self.places, [places[0], places[-1] + 1])
        here = torch.from_numpy(self.places[first:end] - places[0])
        rows[here, : self.sequences.shape[1]] = self.sequences[torch.from_numpy(self.which[first:end])]
        return {"ids": rows[:, :-1], "targets": rows[:, 1:]}

    def identity(self) -> dict[str, Any]:
        """The order's, and a digest of what is planted where."""
        digest = hashlib.sha256()
        for array in (self.places, self.which, self.sequences.numpy()):
            digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return {**self.order.identity(), "planted": digest.hexdigest()}


def scattered(counts: Sequence[int], bands: Sequence[tuple[int, int]], *, seed: int) -> dict[int, int]:
    """A plan for `Planted`: sequence i stands at `counts[i]` places drawn from its band of places [first, end).

    No place is used twice.

    Raises:
        InputError: a band has too few places left.

    >>> plan = scattered([2, 1], [(0, 4), (4, 6)], seed=0)
    >>> sorted(plan.values()), all(place < 4 for place, which in plan.items() if which == 0)
    ([0, 0, 1], True)
    """
    source = np.random.default_rng(derive(seed, "scattered"))
    plan: dict[int, int] = {}
    taken = np.zeros(max((end for _, end in bands), default=0), dtype=bool)
    for which in sorted(range(len(counts)), key=lambda i: bands[i][1] - bands[i][0]):  # the narrowest bands first
        first, end = bands[which]
        free = first + np.flatnonzero(~taken[first:end])
        if len(free) < counts[which]:
            raise InputError(f"sequence {which} is wanted {counts[which]} times in {len(free)} free places")
        chosen = source.choice(free, counts[which], replace=False)
        taken[chosen] = True
        plan.update(dict.fromkeys(chosen.tolist(), which))
    return plan
