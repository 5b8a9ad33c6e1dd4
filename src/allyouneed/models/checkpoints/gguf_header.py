"""The header of a GGUF file: metadata and where the tensors lie (versions 2 and 3, little-endian).

Trusts nothing: every count, length, offset and dimension is compared with the file's real size before anything is
allocated. Layout after https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Reads no tensor.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from allyouneed.core.errors import InputError

SUPPORTED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

# A file may be hostile and large at once: what a few bytes of it can cost in memory is bounded by these counts.
MOST_STRINGS = 1 << 21  # strings and arrays within arrays, of all metadata; Gemma 3, the largest known, has 0.8 million
MOST_ENTRIES = 1 << 16  # metadata keys, and tensors
MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
DEEPEST = 4  # arrays within arrays

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and how it is coded. `shape` is in torch's order, the row (`shape[-1]`) is contiguous."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    nbytes: int


def read_header(path: Path, data: mmap.mmap) -> tuple[int, dict[str, Any], dict[str, TensorInfo]]:
    """Version, metadata and tensors of the mapped file.

    Raises:
        InputError: names the file and the field.
    """
    cursor = _Cursor(path, data)
    if data[:4] != b"GGUF":
        raise InputError(f"{path}: begins with {data[:4]!r}; a GGUF file begins with b'GGUF'")
    cursor.at = 4
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        raise cursor.error("is big-endian; only little-endian files are read")
    if version not in (2, 3):
        raise cursor.error(f"is of version {version}; versions 2 and 3 are read")
    num_tensors = cursor.count("tensors", least=32, most=MOST_ENTRIES)
    num_keys = cursor.count("metadata keys", least=13, most=MOST_ENTRIES)
    metadata = _read_metadata(cursor, num_keys)
    return version, metadata, _read_tensors(cursor, num_tensors, metadata.get("general.alignment", 32))


class _Cursor:
    """A position in the file. `field` is what is being read, for the message when it cannot be."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.end = path, data, 0, len(data)
        self.field, self.strings_left = "header", MOST_STRINGS

    def error(self, what: str) -> InputError:
        return InputError(f"{self.path}: {self.field}: {what}")

    def claim(self, size: int) -> int:
        """Move over `size` bytes; where they begin."""
        start = self.at
        if size > self.end - start:
            raise self.error(f"claims {size} bytes at byte {start}, but the file ends at {self.end}")
        self.at = start + size
        return start

    def number(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.claim(struct.calcsize(code)))[0]
        if code == "?" and self.data[self.at - 1] > 1:
            raise self.error(f"byte {self.at - 1} is {self.data[self.at - 1]}; a boolean is 0 or 1")
        return value

    def count(self, what: str, *, least: int, most: int | None = None) -> int:
        """A 64-bit count of things that take at least `least` bytes each."""
        value = self.number("Q")
        if most is not None and value > most:
            raise self.error(f"{value} {what}; at most {most} are accepted")
        if value * least > self.end - self.at:
            raise self.error(f"{value} {what} do not fit into the {self.end - self.at} bytes left")
        return value

    def string(self) -> str:
        start = self.claim(self.number("Q"))
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"byte {start + error.start} is not UTF-8 text") from None

    def strings(self, count: int) -> list[str]:
        """`count` strings: what `string` does, in the one loop whose speed counts (100,000 tokens and merges)."""
        data, at, end = self.data, self.at, self.end
        found: list[str] = []
        length = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                start = at + 8
                at = start + length(data, at)[0]
                if at > end:
                    raise self.error(f"string {len(found)} claims to end at byte {at}, but the file ends at {end}")
                found.append(data[start:at].decode())
        except UnicodeDecodeError as error:
            raise self.error(f"string {len(found)}: byte {start + error.start} is not UTF-8 text") from None
        except struct.error:
            raise self.error(f"the file ends before string {len(found)} of {count}") from None
        self.at = at
        return found

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            return self.array(depth + 1)
        if kind not in _SCALARS:
            raise self.error(f"value type {kind} is unknown; types 0 to {max(GGUFValueType)} are accepted")
        return self.number(_SCALARS[GGUFValueType(kind)])

    def array(self, depth: int) -> Any:
        if depth > DEEPEST:
            raise self.error(f"arrays nested deeper than {DEEPEST}")
        kind = self.number("I")
        if kind in (GGUFValueType.STRING, GGUFValueType.ARRAY):
            least = 8 if kind == GGUFValueType.STRING else 12
            count = self.count("elements", least=least, most=self.strings_left)
            self.strings_left -= count
            if kind == GGUFValueType.STRING:
                return self.strings(count)
            return [self.array(depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.error(f"array of value type {kind}, which is unknown")
        dtype = np.dtype("<" + _SCALARS[GGUFValueType(kind)])
        count = self.count("elements", least=dtype.itemsize)
        start = self.claim(count * dtype.itemsize)
        if dtype == np.bool_ and count and np.frombuffer(self.data, np.uint8, count, start).max() > 1:
            raise self.error("holds a boolean that is neither 0 nor 1")
        return np.frombuffer(self.data, dtype, count, start)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(count):
        cursor.field = f"metadata key {i}"
        key = cursor.string()
        cursor.field = f"metadata {shown(key)}"
        if key in metadata:
            raise cursor.error("stands twice")
        metadata[key] = cursor.value(cursor.number("I"))
    return metadata


def _read_tensors(cursor: _Cursor, count: int, alignment: Any) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for i in range(count):
        cursor.field = f"tensor {i}"
        info = _read_tensor(cursor)
        if info.name in tensors:
            raise cursor.error("stands twice")
        tensors[info.name] = info
    cursor.field = "metadata 'general.alignment'"
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.error(f"is {shown(alignment)}; a power of two is accepted")
    start = -(-cursor.at // alignment) * alignment
    return _placed(cursor, tensors, start, alignment)


def _read_tensor(cursor: _Cursor) -> TensorInfo:
    name = cursor.string()
    cursor.field = f"tensor {shown(name)}"
    num_dims = cursor.number("I")
    if not 1 <= num_dims <= MOST_DIMENSIONS:
        raise cursor.error(f"has {num_dims} dimensions; 1 to {MOST_DIMENSIONS} are accepted")
    shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
    if 0 in shape:
        raise cursor.error(f"has shape {shape}; dimensions are at least 1")
    number = cursor.number("I")
    if number not in GGML_QUANT_SIZES:
        raise cursor.error(f"is of type number {number}, which is unknown; types that are read: {', '.join(SUPPORTED)}")
    kind = GGMLQuantizationType(number)
    block, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise cursor.error(f"has rows of {shape[-1]} numbers, no multiple of the {block} of a {kind.name} block")
    return TensorInfo(name, shape, kind, cursor.number("Q"), math.prod(shape) // block * size)


def _placed(cursor: _Cursor, tensors: dict[str, TensorInfo], start: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensors with offsets counted from the start of the file, once each is known to lie inside it, alone."""
    free = start
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        cursor.field = f"tensor {shown(info.name)}"
        offset = start + info.offset
        if info.offset % alignment:
            raise cursor.error(f"lies at offset {info.offset}, no multiple of the alignment {alignment}")
        if offset < free:
            raise cursor.error(f"at offset {info.offset} overlaps the tensor before it")
        if offset + info.nbytes > cursor.end:
            raise cursor.error(f"claims bytes {offset} to {offset + info.nbytes}, but the file ends at {cursor.end}")
        free = offset + info.nbytes
    return {
        name: TensorInfo(name, info.shape, info.kind, start + info.offset, info.nbytes)
        for name, info in tensors.items()
    }


def shown(value: Any) -> str:
    """A value for a message: one line, no matter what the file put there."""
    if isinstance(value, np.ndarray):
        return f"an array of {len(value)} numbers"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str) and len(value) > 80:
        return repr(value[:77]) + "..."
    return repr(value)
