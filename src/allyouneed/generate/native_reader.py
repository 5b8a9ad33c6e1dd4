"""Reads pieces of sequences with a model's program: one call of the native library for a whole pass.

Rows are ragged: each is one token of one piece at its own position. Knows nothing of what the program computes.
Shapes: M rows, P pieces, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allyouneed.generate.reading import Continues, Piece
from allyouneed.models.lowering import lowered
from allyouneed.nn import native
from allyouneed.nn.paged import Storage
from allyouneed.nn.program import Program

_ROWS = ("ids", "positions", "piece_of", "starts", "tables", "table_starts", "picked")


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_ROWS, "layers", "shares", "workspace", "logits")),
        *((name, ctypes.c_int64) for name in ("rows", "pieces", "wanted", "block_size", "threads")),
    ]


def native_reader(module: Continues, storage: Storage) -> NativeReader | None:
    """The reader of a module's program, where it has one and the storage is of numbers that programs read."""
    kept = {torch.int8} if storage.scales else {torch.float32}
    if storage.states or storage.device.type != "cpu" or {keys.dtype for keys in storage.keys} != kept:
        return None
    program = lowered(module)
    return None if program is None else NativeReader(program, storage)


class NativeReader:
    """Runs a program over a storage whose keys and values are float32 on the CPU, or in 8 bits with scales.

    A row's logits have the same bits whatever else is read in its pass, in how many passes its sequence was read, and
    on how many threads.

    >>> from allyouneed.models import llama
    >>> model = llama.EXAMPLE.build().eval()
    >>> reader = NativeReader(lowered(model), Storage(model.new_cache(1, 0), blocks=4, size=8))
    >>> reader.read([Piece([1, 2, 3], [0], 0, wanted=1), Piece([4], [2], 0, wanted=1)]).shape
    torch.Size([2, 53])
    """

    def __init__(self, program: Program, storage: Storage) -> None:
        kernels = native.library()
        assert kernels is not None
        self._run, self.program, self.storage = kernels.program_run, program, storage
        self._records, self._layers = program.records(), _layers(storage)
        self._workspace = torch.empty(0)

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """(sum of `wanted`, V).

        Raises:
            IndexError: a token or a position of which the model has no vector.
        """
        rows, wanted = sum(len(piece.ids) for piece in pieces), sum(piece.wanted for piece in pieces)
        logits = torch.empty(wanted, self.program.width(self.program.output))
        floats = self.program.floats(rows, wanted)
        if len(self._workspace) < floats:
            self._workspace = torch.empty(floats)
        arrays = _arrays(pieces)
        self._check(pieces, arrays)
        places = (array.ctypes.data for array in arrays)
        shares = self._shares(pieces)
        numbers = rows, len(pieces), wanted, self.storage.size, torch.get_num_threads()
        adapted = None if shares is None else shares.ctypes.data
        memory = ctypes.addressof(self._layers), adapted, self._workspace.data_ptr(), logits.data_ptr()
        self._run(ctypes.byref(self._records), ctypes.byref(_Pass(*places, *memory, *numbers)))
        return logits

    def _shares(self, pieces: Sequence[Piece]) -> np.ndarray | None:
        """How much each piece has of each of the program's adapters, (P, adapters); None where none has any."""
        known = self.program.adapters
        shares = np.zeros((len(pieces), len(known)), np.float32)
        for i, piece in enumerate(pieces):
            for name, share in piece.adapters:
                if name in known:  # else it joins none of these layers: of a model's first ones, or the head alone
                    shares[i, known[name]] = share
        return shares if shares.any() else None

    def _check(self, pieces: Sequence[Piece], arrays: Sequence[np.ndarray]) -> None:
        """The library would read and write beyond its memory."""
        ids, positions, tables = arrays[0], arrays[1], arrays[4]
        size = self.storage.size
        assert all(len(piece.blocks) * size >= piece.length + len(piece.ids) for piece in pieces), "no room in a table"
        assert not len(tables) or 0 <= tables.min() <= tables.max() < self.storage.blocks, "no such block"
        for named, numbers, end in (
            ("token", ids, self.program.vocabulary),
            ("position", positions, self.program.places),
        ):
            if end is not None and len(numbers) and not 0 <= numbers.min() <= numbers.max() < end:
                raise IndexError(f"{named}s from {numbers.min()} to {numbers.max()}; the model knows 0 to {end - 1}")


def _layers(storage: Storage) -> Any:
    """The addresses of what each layer keeps."""
    pairs = zip(storage.keys, storage.values, strict=True)
    places = [(keys.data_ptr(), values.data_ptr()) for keys, values in pairs]
    scales = [(keys.data_ptr(), values.data_ptr()) for keys, values in storage.scales]
    narrow = scales or [(0, 0)] * len(places)  # none
    return (_Layer * len(places))(*(_Layer(*pair, *more) for pair, more in zip(places, narrow, strict=True)))


def _arrays(pieces: Sequence[Piece]) -> list[np.ndarray]:
    """What a pass says of its rows and pieces, in the order of `_ROWS`, each int32."""
    counts = [len(piece.ids) for piece in pieces]
    starts = np.cumsum([0, *counts])
    positions = chain.from_iterable(range(piece.length, piece.length + len(piece.ids)) for piece in pieces)
    ends = zip(starts[1:], pieces, strict=True)
    picked = chain.from_iterable(range(end - piece.wanted, end) for end, piece in ends)
    found = (
        list(chain.from_iterable(piece.ids for piece in pieces)),
        list(positions),
        np.repeat(np.arange(len(pieces)), counts),
        starts,
        list(chain.from_iterable(piece.blocks for piece in pieces)),
        np.cumsum([0, *(len(piece.blocks) for piece in pieces)]),
        list(picked),
    )
    return [np.ascontiguousarray(one, np.int32) for one in found]
