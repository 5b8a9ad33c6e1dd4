"""Checkpoints: everything a run needs to go on as if it had never stopped, in files that any tool can read.

`checkpoints/step-00000100/` holds a `.safetensors` file for each part of the state that has tensors (model, optimizer,
…), `state.json` for the rest, and their `SHA256SUMS`. It appears whole or not at all. Knows nothing of what the parts
mean.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from allyouneed.core.errors import InputError
from allyouneed.core.files import read_json, read_text, replacing

SUMS, PLAIN = "SHA256SUMS", "state.json"
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
        path = self.folder / _name(step)
        with writing(path), replacing(path) as temporary:
            temporary.mkdir()
            write(temporary, state)
        self.tidy(step)

    def newest(self) -> State | None:
        """The state of the newest checkpoint that can be read, None if there is none yet. Says which ones cannot.

        Raises:
            InputError: there are checkpoints, but none can be read.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return read(path)
            except InputError as error:
                print(f"{error}; passing over this checkpoint", file=sys.stderr)
        if paths:
            raise InputError(f"{self.folder}: no checkpoint can be read; begin again with resume=False")
        return None

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
        plain[part] = _take_tensors(value, "", tensors)
        if tensors:
            save_file(tensors, folder / f"{part}.safetensors")
    (folder / PLAIN).write_text(json.dumps(plain, indent=1) + "\n")
    (folder / SUMS).write_text("".join(f"{_sha256(p)}  {p.name}\n" for p in sorted(folder.iterdir())))


def read(folder: Path) -> State:
    """The state that `write` wrote, tensors on the CPU.

    Raises:
        InputError: a file is missing or not what was written.
    """
    sums = {name: digest for digest, _, name in (x.partition("  ") for x in read_text(folder / SUMS).splitlines())}
    for name, digest in sums.items():
        try:
            intact = _sha256(folder / name) == digest
        except OSError as error:
            raise InputError(f"{folder / name}: {error.strerror}") from None
        if not intact:
            raise InputError(f"{folder / name}: not what was written, its digest differs from {SUMS}")
    state: State = read_json(folder / PLAIN)
    for part in state:
        if f"{part}.safetensors" in sums:
            for path, tensor in load_file(folder / f"{part}.safetensors").items():
                _put(state[part], path.split("/"), tensor)
    return state


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers of `module` by name; what is shared is named once."""
    saved = module.state_dict()
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: x.detach() for name, x in named if name in saved}


def fill(tensors: dict[str, Tensor], values: dict[str, Tensor], source: Path) -> None:
    """Copy `values`, read from `source`, into the `tensors` of the same names.

    Raises:
        InputError: other names or other shapes.
    """
    for name in sorted(tensors.keys() | values.keys()):
        here, there = (f"{tuple(t[name].shape)}" if name in t else "missing" for t in (tensors, values))
        if here != there:
            raise InputError(f"{source}: of another model: {name} is {there} in it and {here} in this one")
        tensors[name].copy_(values[name])


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


def _take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` without its tensors, which go to `tensors` under the path of their keys."""
    if not isinstance(value, dict):
        return value
    rest = {}
    for key, child in value.items():
        below = f"{path}/{key}" if path else key
        if isinstance(child, Tensor):
            tensors[below] = child.detach().cpu().contiguous()
        else:
            rest[key] = _take_tensors(child, below, tensors)
    return rest


def _put(tree: State, path: list[str], tensor: Tensor) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = tensor


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
