"""Safetensors files, one or sharded, in and out.

A file's header is checked against its real size before the library or an allocation sees it; the data is then mapped,
not read. A tensor under several names is stored once, the other names in the file's metadata as the library's own
`save_model` puts them there. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from allyouneed.core import files
from allyouneed.core.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FORMAT = {"format": "pt"}  # `transformers` asks for it
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
MOST_HEADER = 4 << 20  # some 30,000 tensors; hostile JSON takes up to 25 times its text in memory, and seconds


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped into memory.

    Raises:
        InputError: the file is missing, truncated, or its header does not describe it.
    """
    check(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            aliases = {a: name for a, name in (file.metadata() or {}).items() if name in tensors and a not in tensors}
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not readable as safetensors: {str(error).splitlines()[0]}") from None
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def read_sharded(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder in the Hugging Face layout: `model.safetensors`, or the shards its index names.

    Raises:
        InputError: a file is missing or broken, or a shard does not hold what the index says.
    """
    folder = Path(folder)
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}")
        return read_safetensors(folder / SINGLE)
    places = _weight_map(index)
    shards = {shard: read_safetensors(folder / shard) for shard in sorted(set(places.values()))}
    for name, shard in places.items():
        if name not in shards[shard]:
            raise InputError(f"{index}: weight_map puts {name[:60]!r} into {shard}, which does not hold it")
    everything = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    return everything | {name: shards[shard][name] for name, shard in places.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = FORMAT) -> None:
    """Write one file, whole or not at all; what shares its memory under several names is written once."""
    kept, aliases = _stored_once(tensors)
    _write(path, kept, {**aliases, **metadata})


def write_sharded(folder: Path, tensors: Mapping[str, Tensor], *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write `model.safetensors`, or several shards and their index where that would exceed `max_shard_bytes`.

    Each file appears whole or not at all, the index after its shards; what stood in the folder goes last.
    """
    folder = Path(folder)
    kept, aliases = _stored_once(tensors)
    shards = _shards(kept, max_shard_bytes)
    numbered = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    written = dict(zip(numbered if len(shards) > 1 else [SINGLE], shards, strict=True))
    for file, shard in written.items():
        _write(folder / file, shard, {a: name for a, name in aliases.items() if name in shard} | FORMAT)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in written.items() for name in shard}
        files.write_json(folder / INDEX, {"metadata": {"total_size": _size(kept)}, "weight_map": weight_map})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for stale in folder.glob("model*.safetensors"):
        if stale.name not in written:
            stale.unlink()


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
        header = files.parse_json(text.decode("utf-8"), object_pairs_hook=_unique)
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
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in BITS:
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
    described = files.read_json(index, limit=MOST_HEADER)
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


def _stored_once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under the first of its names, in memory of its own; and the other names with that first one."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and first.setdefault(view, name) != name:
            aliases[name] = first[view]
        else:
            kept[name] = tensor.detach()
    memory = [tensor.untyped_storage().data_ptr() for tensor in kept.values()]
    users = Counter(memory)
    return {
        name: tensor.contiguous() if users[pointer] == 1 else tensor.clone(memory_format=torch.contiguous_format)
        for (name, tensor), pointer in zip(kept.items(), memory, strict=True)
    }, aliases


def _shards(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and _size(shards[-1]) + tensor.nbytes > most:
            shards.append({})
        shards[-1][name] = tensor
    return shards


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    try:
        with files.replacing(path) as temporary:
            save_file(dict(tensors), temporary, metadata=dict(metadata))
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
