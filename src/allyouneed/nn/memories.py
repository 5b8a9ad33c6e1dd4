"""What many sequences have to read of other models, each row in its slot, and what layers made of it.

Rows that are read together are put together once, not at every pass. Shapes: B rows, M tokens of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from allyouneed.nn.caches import Recalled
from allyouneed.nn.sight import Memory, widened

Made = dict[int, Recalled]  # layer -> what it made of one row


class Memories:
    """One memory a slot; slots without one have none.

    >>> memories = Memories()
    >>> memories.put(3, Memory(torch.ones(1, 2, 4)))
    >>> memories.put(5, Memory(torch.ones(1, 7, 4)))
    >>> memories.together([5, 3]).memory.states.shape
    torch.Size([2, 7, 4])
    """

    def __init__(self) -> None:
        self._rows: dict[int, Memory] = {}
        self._made: dict[int, Made] = {}
        self._last: Together | None = None

    def put(self, slot: int, memory: Memory) -> None:
        """Keep a memory of one row."""
        self._rows[slot], self._made[slot] = memory, {}

    def copy(self, source: int, target: int) -> None:
        """The same memory, and what was made of it, for another slot."""
        if source in self._rows:
            self._rows[target], self._made[target] = self._rows[source], self._made[source]

    def drop(self, slot: int) -> None:
        """Forget what is in a slot."""
        self._rows.pop(slot, None)
        self._made.pop(slot, None)
        self._last = None

    def fresh(self, slot: int) -> bool:
        """Whether the slot has a memory that no layer has looked at."""
        return slot in self._rows and not self._made[slot]

    def together(self, slots: Sequence[int]) -> Together | None:
        """The memories of some slots, padded; None where there are none."""
        if not slots or slots[0] not in self._rows:
            return None
        if self._last is None or self._last.slots != tuple(slots):
            self._last = Together(tuple(slots), [self._rows[i] for i in slots], [self._made[i] for i in slots])
        return self._last


class Together:
    """The memories of rows that are read in one pass."""

    def __init__(self, slots: tuple[int, ...], rows: Sequence[Memory], made: Sequence[Made]) -> None:
        self.slots, self.memory = slots, Memory.join(rows)
        self._lengths, self._made = [row.states.shape[1] for row in rows], made
        self._recalled: Made = {}

    def recall(self, layer: int, project: Callable[[], Recalled]) -> Recalled:
        """What a layer makes of the memory: known of every row, or made of all and known from now on."""
        if layer not in self._recalled:
            if all(layer in made for made in self._made):
                self._recalled[layer] = self._join(layer)
            else:
                self._recalled[layer] = project()
                self._keep(layer)
        return self._recalled[layer]

    def _join(self, layer: int) -> Recalled:
        def joined(side: int) -> Tensor:
            return torch.cat([widened(made[layer][side], max(self._lengths), -2) for made in self._made])

        return joined(0), joined(1)

    def _keep(self, layer: int) -> None:
        for i, (made, length) in enumerate(zip(self._made, self._lengths, strict=True)):
            keys, values = (_own(x[i : i + 1].narrow(-2, 0, length)) for x in self._recalled[layer])
            made[layer] = keys, values


def _own(part: Tensor) -> Tensor:
    """A part of a tensor that does not keep alive the rest of it."""
    return part.clone() if part.untyped_storage().nbytes() > part.nbytes else part
