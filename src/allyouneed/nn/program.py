"""A whole pass of a model as a list of records that `native/program.cpp` runs in one call.

A `Program` is written by the lowerings of a model's parts (`nn.lowering`), each of which says what it computes by the
methods here, on slots: matrices with a row for each token of the pass. The records' fields are explained in
`native/program.h`. Programs hold the memory of a model's weights as it is: what is written into it is seen, other
memory that a weight is given is not (`nn.watch` sees that). Of adapters, and of gains and biases of 16 bits, a program
has a copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from allyouneed.nn import records as structures
from allyouneed.nn.records import Code

PLAIN = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
FUNCTIONS = ("relu", "gelu", "gelu_tanh", "silu")  # numbered as in program.h


class NotLowered(Exception):  # noqa: N818  # no error: the model runs on PyTorch
    """A part for which there is no native computation."""


@dataclass(frozen=True)
class Pair:
    """What an adapter adds to a product, b (a x), for the rows of those that ask for it: a (rank, features), b (rows,
    rank), its scale in it (Hu et al. 2022, eq. 3).
    """

    adapter: str
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Weight:
    """A matrix (rows, features) as plain numbers or in GGUF's blocks, a bias (rows), and what adapters add."""

    data: Tensor
    kind: Kind
    rows: int
    features: int
    bias: Tensor | None = None
    adapters: tuple[Pair, ...] = ()

    @staticmethod
    def plain(matrix: Tensor, bias: Tensor | None = None) -> Weight:
        """A weight of numbers of 32 or 16 bits.

        Raises:
            NotLowered: of another type.
        """
        if matrix.dtype not in PLAIN or not matrix.is_contiguous():
            raise NotLowered
        rows, features = matrix.shape
        return Weight(matrix, PLAIN[matrix.dtype], rows, features, bias)


class Program:
    """The records of a model's pass, in order.

    >>> program = Program()
    >>> x = program.embed(Weight.plain(torch.ones(5, 8)))
    >>> program.width(program.multiply(x, [Weight.plain(torch.ones(2, 8)), Weight.plain(torch.ones(3, 8))]))
    5
    """

    def __init__(self) -> None:
        self.layers: list[tuple[int, int]] = []  # of each that keeps keys and values: its heads and their size
        self.output = 0
        self.vocabulary: int | None = None  # rows of the table of tokens, and of positions where there is one
        self.places: int | None = None
        self.adapters: dict[str, int] = {}  # their numbers
        self._ops: list[structures.Op] = []
        self._weights: list[structures.Weight] = []
        self._pairs: list[structures.Pair] = []
        self._slots: list[structures.Slot] = []
        self._free: list[int] = []
        self._held: list[Tensor] = []  # their memory is what the records point to

    def width(self, slot: int) -> int:
        """How many numbers a row of it has."""
        return self._slots[slot].width

    def release(self, *slots: int) -> None:
        """These are not read again."""
        self._free += slots

    def embed(self, table: Weight, scale: float = 1.0) -> int:
        """The rows of a table that the ids say."""
        to, self.vocabulary = self._slot(table.features), table.rows
        self._add(Code.EMBED, to=to, first=self._weight(table), width=table.features, number=scale)
        return to

    def place(self, x: int, table: Weight) -> None:
        """x grows by the rows of a table that the positions say."""
        self.places = table.rows
        self._add(Code.PLACE, to=x, first=self._weight(table), width=table.features)

    def pick(self, x: int) -> int:
        """The rows whose logits are wanted."""
        to = self._slot(self.width(x), picked=True)
        self._add(Code.PICK, source=x, to=to, width=self.width(x))
        return to

    def rms_norm(self, x: int, gain: Tensor, eps: float) -> int:
        """gain · x / root mean square."""
        return self._norm(Code.RMS_NORM, x, gain, None, eps)

    def layer_norm(self, x: int, gain: Tensor, bias: Tensor, eps: float) -> int:
        """gain · (x − mean) / deviation + bias."""
        return self._norm(Code.LAYER_NORM, x, gain, bias, eps)

    def multiply(self, x: int, weights: Sequence[Weight]) -> int:
        """x Wᵀ + b of several weights side by side: one product, no matrix copied; and what each row's adapters add."""
        to = self._slot(sum(weight.rows for weight in weights), picked=self._picked(x))
        places = [self._weight(weight) for weight in weights]
        self._add(Code.MULTIPLY, source=x, to=to, first=places[0], count=len(weights))
        first, column = len(self._pairs), 0
        for weight in weights:
            self._pairs += [self._pair(one, column) for one in weight.adapters]
            column += weight.rows
        if count := len(self._pairs) - first:
            self._add(Code.ADAPT, source=x, to=to, first=first, count=count)
        return to

    def angles(self, frequencies: Tensor) -> int:
        """Cosines and sines of position · frequency."""
        to = self._slot(2 * len(frequencies))
        self._add(Code.ANGLES, to=to, width=len(frequencies), vector=self._numbers(frequencies))
        return to

    def turn(self, x: int, angles: int, heads: int, head_dim: int) -> None:
        """The first `heads` heads of x, turned."""
        width = self.width(angles) // 2
        self._add(Code.TURN, source=angles, to=x, width=width, heads=heads, head_dim=head_dim)

    def attend(
        self,
        qkv: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int | None,
        scale: float,
        slopes: Tensor | None,
    ) -> int:
        """Keep a layer's keys and values, and read with its queries what it keeps."""
        shape = {"layer": len(self.layers), "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        self.layers.append((kv_heads, head_dim))
        self._add(Code.KEEP, source=qkv, to=qkv, **shape)
        to = self._slot(heads * head_dim)
        vector = None if slopes is None else self._numbers(slopes)
        self._add(Code.ATTEND, source=qkv, to=to, window=window or 0, number=scale, vector=vector, **shape)
        return to

    def activate(self, x: int, function: str) -> None:
        """x becomes f(x)."""
        self._add(Code.ACTIVATE, to=x, function=FUNCTIONS.index(function), width=self.width(x))

    def gate(self, x: int, function: str) -> None:
        """The first half of x becomes f(first half) · second half."""
        self._add(Code.GATE, to=x, function=FUNCTIONS.index(function), width=self.width(x) // 2)

    def add(self, x: int, y: int) -> None:
        """x grows by y, which is not read again; a product does that itself."""
        ops = self._ops[-2:] if self._ops[-1].code == Code.ADAPT else self._ops[-1:]
        if ops[0].code == Code.MULTIPLY and ops[0].to == y:
            ops[0].code = Code.GROW
            for op in ops:
                op.to = x
        else:
            self._add(Code.ADD, source=y, to=x, width=self.width(x))
        self.release(y)

    def end(self, logits: int) -> None:
        """The pass ends with these."""
        self.output = logits

    def records(self) -> structures.Records:
        """What the library is given; keeps alive what it points to."""
        lists: tuple[tuple[Any, list[Any]], ...] = (
            (structures.Op, self._ops),
            (structures.Weight, self._weights),
            (structures.Pair, self._pairs),
            (structures.Slot, self._slots),
        )
        arrays = [(kind * len(found))(*found) for kind, found in lists]
        places = (ctypes.addressof(array) for array in arrays)
        record = structures.Records(*places, len(self._ops), len(self._slots), len(self.adapters), self.output)
        record.arrays, record.held = arrays, self._held
        return record

    def floats(self, rows: int, wanted: int) -> int:
        """How many floats of workspace a pass takes."""
        sizes = ((slot, -(-slot.width // 16) * 16) for i, slot in enumerate(self._slots) if i != self.output)
        return sum(stride * (wanted if slot.picked else rows) for slot, stride in sizes)

    def _norm(self, code: Code, x: int, gain: Tensor, bias: Tensor | None, eps: float) -> int:
        to = self._slot(self.width(x), picked=self._picked(x))
        other = None if bias is None else self._numbers(bias)
        self._add(code, source=x, to=to, width=self.width(x), vector=self._numbers(gain), other=other, number=eps)
        return to

    def _add(self, code: Code, **fields: int | float | None) -> None:
        self._ops.append(structures.Op(code=code, **fields))

    def _slot(self, width: int, picked: bool = False) -> int:
        """A slot that is free, or a new one."""
        for slot in self._free:
            if (self._slots[slot].width, bool(self._slots[slot].picked)) == (width, picked):
                self._free.remove(slot)
                return slot
        self._slots.append(structures.Slot(width, picked))
        return len(self._slots) - 1

    def _picked(self, slot: int) -> bool:
        return bool(self._slots[slot].picked)

    def _weight(self, weight: Weight) -> int:
        bias = None if weight.bias is None else self._numbers(weight.bias)
        place = self._place(weight.data)
        self._weights.append(structures.Weight(place, bias, weight.rows, weight.features, weight.kind))
        return len(self._weights) - 1

    def _pair(self, one: Pair, column: int) -> structures.Pair:
        """The record of what an adapter adds from a column on. The copies lie as they are read: b by its columns."""
        (rank, features), rows = one.a.shape, len(one.b)
        a, b = (self._place(matrix.detach().float().clone()) for matrix in (one.a, one.b.T.contiguous()))
        return structures.Pair(
            a, b, rank, features, rows, column, self.adapters.setdefault(one.adapter, len(self.adapters))
        )

    def _numbers(self, vector: Tensor) -> int:
        return self._place(vector.detach().float().contiguous())

    def _place(self, tensor: Tensor) -> int:
        if not tensor.is_cpu:
            raise NotLowered
        self._held.append(tensor.detach())  # keeps the memory, also when the parameter is given another
        return tensor.data_ptr()
