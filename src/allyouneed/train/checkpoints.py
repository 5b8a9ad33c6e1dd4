"""Checkpoints: everything a run needs to go on as if it had never stopped, in files that any tool can read.

`checkpoints/step-00000100/` holds a `.safetensors` file for each part of the state that has tensors (model, optimizer,
…), `state.json` for the rest, and their `SHA256SUMS`. It appears whole or not at all. Where ranks held slices of the
tensors there is a file for each part and rank (`train.slices` writes them), read here as whole tensors. Knows nothing
of what the parts mean.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from allyouneed.core.errors import InputError
from allyouneed.core.files import read_json, read_text, replacing
from allyouneed.train.ranks import Ranks

SUMS, PLAIN = "SHA256SUMS", "state.json"
OFFSETS, SIZES = "offsets", "sizes"  # in the metadata of a file of slices: where each begins, in a tensor of what size
ALONE = Ranks()
State = dict[str, Any]  # nested dictionaries of tensors and of what JSON can hold; keys are strings without "/"


class Checkpoints:
    """The checkpoints of one run, in `folder`; saving one forgets all but the last `keep`."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, state: State) -> None:
        """Write the checkpoint of `step`.

        Raises:
            InputError: the disk is full or the folder cannot be written; what stood there stays.
        """
        path = self.path(step)
        with writing(path), replacing(path) as temporary:
            temporary.mkdir()
            write(temporary, state)
        self.tidy(step)

    def newest(self, ranks: Ranks = ALONE) -> Path | None:
        """The folder of the newest checkpoint that can be read, None if there is none yet. Says which ones cannot.

        All ranks find the same one, each having checked some of its files.

        Raises:
            InputError: there are checkpoints, but none can be read.
        """
        paths = ranks.told(self.paths())
        for path in reversed(paths):
            try:
                check(path, ranks)
            except InputError as error:
                if ranks.rank == 0:
                    print(f"{error}; passing over this checkpoint", file=sys.stderr)
            else:
                return path
        if paths:
            raise InputError(f"{self.folder}: no checkpoint can be read; begin again with resume=False")
        return None

    def path(self, step: int) -> Path:
        """The folder of `step`."""
        return self.folder / _name(step)

    def paths(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def tidy(self, step: int) -> None:
        """Remove all up to `step` but the last `keep`, and what a run that was killed left half-written."""
        done = [path for path in self.paths() if path.name <= _name(step)]
        for path in [*done[: -self.keep], *self.folder.glob(".step-*.tmp")]:
            shutil.rmtree(path)

    def clear(self) -> None:
        """Remove them all."""
        for path in self.paths():
            shutil.rmtree(path)


def write(folder: Path, state: State) -> None:
    """Write `state` into an existing folder."""
    plain = {}
    for part, value in state.items():
        tensors: dict[str, Tensor] = {}
        plain[part] = take_tensors(value, "", tensors)
        if tensors:
            save_file(
                {name: x.detach().cpu().contiguous() for name, x in tensors.items()}, folder / f"{part}.safetensors"
            )
    seal(folder, plain, {path.name: sha256(path) for path in sorted(folder.iterdir())})


def seal(folder: Path, plain: State, sums: Mapping[str, str]) -> None:
    """Add what has no tensors, and the digests of all files: `sums` are those of the others. Both are on disk then."""
    (folder / PLAIN).write_text(json.dumps(plain, indent=1) + "\n")
    sums = {**sums, PLAIN: sha256(folder / PLAIN)}
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    for name in (PLAIN, SUMS):
        sync(folder / name)


def check(folder: Path, ranks: Ranks = ALONE) -> None:
    """Hold the files against their digests; every rank takes some of them, and all come to the same end.

    Raises:
        InputError: a file is missing, not what was written, or has no digest.
    """
    try:
        lines = [line.partition("  ") for line in read_text(folder / SUMS).splitlines()]
        fault = _unpaired(folder, {name for _, _, name in lines})
    except InputError as error:
        lines, fault = [], str(error)
    for digest, _, name in lines[ranks.rank :: ranks.world]:
        fault = fault or _fault(folder / name, digest)
    if fault := ranks.first(fault):
        raise InputError(fault)


def read(folder: Path) -> State:
    """The state that `write` wrote and `check` found whole, tensors on the CPU."""
    state = read_plain(folder)
    for path in sorted(folder.glob("*.safetensors")):
        _read_tensors(path, state[part_of(path)])
    return state


def read_plain(folder: Path) -> State:
    """What of it has no tensors."""
    state: State = read_json(folder / PLAIN)
    return state


def part_of(path: Path) -> str:
    """The part of the state that a file holds, whole or in slices.

    >>> part_of(Path("model-00003.safetensors")), part_of(Path("model.safetensors"))
    ('model', 'model')
    """
    return re.sub(r"-\d{5}$", "", path.stem)


def layout(file: Any) -> tuple[dict[str, Sequence[int]], dict[str, Sequence[int]]]:
    """Where the slices in an open safetensors file begin, and of what sizes the tensors are; of whole ones nothing."""
    metadata = file.metadata() or {}
    return json.loads(metadata.get(OFFSETS, "{}")), json.loads(metadata.get(SIZES, "{}"))


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers of `module` by name; what is shared is named once. Frozen parameters are left
    out: they are what the caller brings again, and beside adapters nearly everything.
    """
    saved = module.state_dict()
    learned = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return {name: x.detach() for name, x in [*learned, *module.named_buffers()] if name in saved}


def fill(tensors: dict[str, Tensor], values: dict[str, Tensor], source: Path) -> None:
    """Copy `values`, read from `source`, into the `tensors` of the same names.

    Raises:
        InputError: other names or other shapes.
    """
    for name in sorted(tensors.keys() | values.keys()):
        here, there = (f"{tuple(t[name].shape)}" if name in t else "missing" for t in (tensors, values))
        if here != there:
            raise InputError(f"{source}: of another model: {name} is {there} in it and {here} in this one")
    for name, x in tensors.items():
        x.copy_(values[name])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, a full disk and the like become one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        line = f"{path}: cannot be written: {reason}; the last checkpoint stands, and the run can go on from it"
        raise InputError(line) from None


def _name(step: int) -> str:
    return f"step-{step:08d}"


def take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` without its tensors, which go to `tensors` under the path of their keys."""
    if not isinstance(value, dict):
        return value
    rest = {}
    for key, child in value.items():
        below = f"{path}/{key}" if path else key
        if isinstance(child, Tensor):
            tensors[below] = child
        else:
            rest[key] = take_tensors(child, below, tensors)
    return rest


def put(tree: State, path: str, tensor: Tensor) -> Tensor:
    """Put `tensor` where `path` says, unless there is one; the one that is there."""
    *above, last = path.split("/")
    there: Tensor = reduce(operator.getitem, above, tree).setdefault(last, tensor)
    return there


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Until a file, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_tensors(path: Path, tree: State) -> None:
    """Put the tensors of a file in their places, slices into the whole ones they are of."""
    with safe_open(path, framework="pt") as file:
        offsets, sizes = layout(file)
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_tensor(name)
            whole = put(tree, name, tensor.new_empty(sizes.get(name, tensor.shape)))
            starts = zip(offsets.get(name, [0] * tensor.dim()), tensor.shape, strict=True)
            whole[tuple(slice(start, start + length) for start, length in starts)] = tensor


def _unpaired(folder: Path, named: set[str]) -> str:
    """The first file without a digest or digest without a file, if any: what was cut short vouches for nothing."""
    there = {PLAIN, *(path.name for path in folder.iterdir())} - {SUMS}
    unpaired = sorted(there ^ named)
    return f"{folder / unpaired[0]}: in the folder or in {SUMS}, but not in both" if unpaired else ""


def _fault(path: Path, digest: str) -> str:
    """What is wrong with a file, if anything."""
    try:
        return "" if sha256(path) == digest else f"{path}: not what was written, its digest differs from {SUMS}"
    except OSError as error:
        return f"{path}: {error.strerror}"
