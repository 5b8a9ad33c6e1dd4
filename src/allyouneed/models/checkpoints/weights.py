"""Safetensors files, one or sharded, in and out.

A file's header is checked against its real size before the library or an allocation sees it; the data is then mapped,
not read. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from allyouneed.core import files
from allyouneed.core.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip
MOST_HEADER = 100 << 20  # the format's own limit


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped into memory.

    Raises:
        InputError: the file is missing, truncated, or its header does not describe it.
    """
    check(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not readable as safetensors: {str(error).splitlines()[0]}") from None


def read_sharded(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder in the Hugging Face layout: `model.safetensors`, or the shards its index names."""
    folder = Path(folder)
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}")
        return read_safetensors(folder / SINGLE)
    places = _weight_map(index)
    shards: dict[str, dict[str, Tensor]] = {}
    tensors = {}
    for name, shard in places.items():
        if shard not in shards:
            shards[shard] = read_safetensors(folder / shard)
        if name not in shards[shard]:
            raise InputError(f"{index}: weight_map puts {name!r} into {shard}, which does not hold it")
        tensors[name] = shards[shard][name]
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file, whole or not at all."""
    with files.replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})


def write_sharded(folder: Path, tensors: Mapping[str, Tensor], *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write `model.safetensors`, or several shards and their index where that would exceed `max_shard_bytes`."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and _size(shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    folder = Path(folder)
    for stale in [*folder.glob("model*.safetensors"), folder / INDEX]:
        stale.unlink(missing_ok=True)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    files.write_json(folder / INDEX, {"metadata": {"total_size": _size(tensors)}, "weight_map": weight_map})


def check(path: Path) -> None:
    """Refuse a file whose header does not describe exactly the bytes that follow it."""
    try:
        size = Path(path).stat().st_size
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MOST_HEADER):
                raise InputError(f"{path}: header of {length} bytes in a file of {size}; truncated or not safetensors")
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: header is not JSON: {str(error).splitlines()[0][:120]}") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: header is a {type(header).__name__}, not an object")
    _check_metadata(path, header.pop("__metadata__", {}))
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise InputError(f"{path}: tensor {name!r} begins at {start}, the one before it ends at {end}")
        end = stop
    if end != size - 8 - length:
        raise InputError(f"{path}: tensors end at {end}, the data at {size - 8 - length}")


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """Where a tensor's bytes lie, after its dtype and shape were found to need exactly these."""
    shown = repr(name[:60])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{path}: tensor {shown} must have dtype, shape and data_offsets")
    if entry["dtype"] not in BITS:
        raise InputError(f"{path}: tensor {shown}: dtype {str(entry['dtype'])[:20]!r}; accepted: {', '.join(BITS)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 16:
        raise InputError(f"{path}: tensor {shown}: shape and data_offsets must be lists of whole numbers")
    needed = math.prod(shape) * BITS[entry["dtype"]] // 8
    if offsets[1] - offsets[0] != needed:
        raise InputError(f"{path}: tensor {shown}: needs {needed} bytes, data_offsets give {offsets[1] - offsets[0]}")
    return offsets[0], offsets[1], name


def _check_metadata(path: Path, metadata: Any) -> None:
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not strings:
        raise InputError(f"{path}: field '__metadata__' must map strings to strings")


def _weight_map(index: Path) -> dict[str, str]:
    described = files.read_json(index)
    places = described.get("weight_map") if isinstance(described, dict) else None
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index}: field 'weight_map' must map tensor names to file names")
    for name, shard in places.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(
                f"{index}: weight_map[{name[:60]!r}] is {str(shard)[:60]!r}; a .safetensors file beside the index"
            )
    return places


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same name twice")
    return found


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
