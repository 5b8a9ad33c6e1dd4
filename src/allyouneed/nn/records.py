"""The records of `native/program.h` as ctypes has them: fields in the same order, codes with the same numbers.

What they say is explained there; they are written by `nn.program`.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum, auto


class Code(IntEnum):
    """What a record does."""

    EMBED = 0
    PLACE = auto()
    PICK = auto()
    RMS_NORM = auto()
    LAYER_NORM = auto()
    MULTIPLY = auto()
    GROW = auto()
    ADAPT = auto()
    ANGLES = auto()
    TURN = auto()
    KEEP = auto()
    ATTEND = auto()
    ACTIVATE = auto()
    GATE = auto()
    ADD = auto()


class Op(ctypes.Structure):
    """One record."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("code", "source", "to", "function", "first", "count", "width", "layer")),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "head_dim", "window")),
        ("number", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("vector", "other")),
    ]


class Weight(ctypes.Structure):
    """A matrix."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("blocks", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "features", "kind")),
    ]


class Pair(ctypes.Structure):
    """What an adapter adds to a product."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b")),
        *((name, ctypes.c_int64) for name in ("rank", "features", "rows", "column", "adapter")),
    ]


class Slot(ctypes.Structure):
    """A matrix of the workspace."""

    _fields_ = [(name, ctypes.c_int32) for name in ("width", "picked")]


class Records(ctypes.Structure):
    """A whole program."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ops", "weights", "pairs", "slots")),
        *((name, ctypes.c_int64) for name in ("num_ops", "num_slots", "num_adapters", "output")),
    ]
