"""GGUF files: metadata and tensors of a checkpoint in one memory-mapped file (versions 2 and 3, little-endian).

The header is read by `gguf_header`, which trusts nothing in it; dequantisation is the `gguf` package's. Knows no model:
which tensor goes into which module is said beside the model families.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from allyouneed.core.errors import InputError, unknown
from allyouneed.models.checkpoints.gguf_header import SUPPORTED, TensorInfo, read_header, shown

T = TypeVar("T")
D = TypeVar("D")


class GGUF:
    """An opened GGUF file.

    `metadata` maps keys to numbers, strings, `np.ndarray`s (arrays of numbers) and lists (arrays of strings or arrays);
    `tensors` maps names to `TensorInfo`s. The file stays mapped while the object or an array taken from it lives.
    """

    def __init__(
        self, path: Path, data: mmap.mmap, metadata: dict[str, Any], tensors: dict[str, TensorInfo], version: int
    ) -> None:
        self.path, self.metadata, self.tensors, self.version = path, metadata, tensors, version
        self._data = data

    @classmethod
    def open(cls, path: str | Path) -> GGUF:
        """Map the file and read its header; the tensors' bytes are not touched.

        Raises:
            InputError: missing, or not a well-formed GGUF file; names the file and the field.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        except ValueError:
            raise InputError(f"{path}: is empty; a GGUF file is expected") from None
        version, metadata, tensors = read_header(path, data)
        return cls(path, data, metadata, tensors, version)

    def need(self, key: str, kind: type[T]) -> T:
        """The metadata value under `key`, an `int`, `float`, `str`, `bool`, `list` (of `str`) or `np.ndarray`.

        Raises:
            InputError: missing, or of another kind.
        """
        if key not in self.metadata:
            raise InputError(f"{self.path}: metadata has no {key!r}; {_spell(kind)} is needed")
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, list) and not all(isinstance(v, str) for v in value)):
            raise InputError(f"{self.path}: metadata {key!r} is {shown(value)}; {_spell(kind)} is accepted")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{self.path}: metadata {key!r} is {value}; a finite number is accepted")
        return value

    def find(self, key: str, kind: type[T], default: D) -> T | D:
        """As `need`, but `default` where the file says nothing."""
        return self.need(key, kind) if key in self.metadata else default

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes as they lie in the file: (rows, bytes_per_row) uint8, read-only, nothing copied.

        Raises:
            InputError: no such tensor.
        """
        info = self._info(name)
        rows = math.prod(info.shape[:-1])
        flat: np.ndarray = np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)
        return flat.reshape(rows, -1)

    def tensor(self, name: str) -> Tensor:
        """The tensor in its shape, dequantised to float32.

        Raises:
            InputError: no such tensor, or of a type that is not read.
        """
        info = self._info(name)
        if info.kind.name not in SUPPORTED:
            raise InputError(
                f"{self.path}: tensor {name!r} is {info.kind.name}; types that are read: {', '.join(SUPPORTED)}"
            )
        with np.errstate(all="ignore"):  # scales of a damaged file may overflow; that is for the reader of the logits
            values = dequantize(self.raw(name), info.kind)
        return torch.from_numpy(np.array(values, np.float32).reshape(info.shape))

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise unknown(f"tensor in {self.path}:", name, self.tensors)
        return self.tensors[name]


def _spell(kind: type) -> str:
    names: Mapping[type, str] = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "a boolean",
        list: "a list of strings",
        np.ndarray: "an array of numbers",
    }
    return names[kind]
