"""Checkpoints of a module that is split: each rank writes its slices and reads what its own slices need of others'.

PyTorch's distributed checkpointing (DCP) plans who writes what, copies it to the host and writes while training goes
on, and on another mesh finds the overlap of new slices with old ones. Its own files end in `.metadata`, a pickle, which
runs code when a stranger's is opened. So storage is ours: `<part>-<rank>.safetensors`, where each tensor is a slice and
the file's metadata say at which offsets of which size; beside them `state.json` and `SHA256SUMS` as in `checkpoints`,
whose folders, files of whole tensors, are read as slices that begin at 0. A folder appears when all ranks are done.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future as Promise
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from allyouneed.train import checkpoints
from allyouneed.train.checkpoints import OFFSETS, SIZES, Checkpoints, State

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Saver:
    """Writes the checkpoints of a run in the background, one at a time, on all ranks."""

    def __init__(self, kept: Checkpoints) -> None:
        self.kept = kept
        self.group = _group()
        self.path = kept.folder
        self.pending: Promise[Any] | None = None

    def save(self, step: int, state: State) -> None:
        """Begin to write the checkpoint of `step`, as soon as the one before is done. `state` is copied at once.

        Raises:
            InputError: the one before could not be written.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}
        plain = {part: checkpoints.take_tensors(value, part, tensors) for part, value in state.items()}
        self.path = self.kept.path(step)
        writer = _Writer(self.path, plain, lambda: self.kept.tidy(step))
        with checkpoints.writing(self.path):
            begun = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        assert isinstance(begun, Promise)
        self.pending = begun

    def wait(self) -> None:
        """Until what was begun is on disk.

        Raises:
            InputError: it could not be written; the same line on all ranks.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except dcp.CheckpointException as error:
            first = error.failures[min(error.failures)][0]
            with checkpoints.writing(self.path):
                raise first from None


def read(folder: Path, places: Mapping[str, Tensor]) -> State:
    """The state in `folder`, whatever mesh wrote it, on all ranks: of tensors like those of `places`, named
    `<part>/<name>`, and of what a part keeps for each of these, this rank's slices only.
    """
    tensors: dict[str, Tensor] = {}
    for name, stored in _Reader(folder).read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        near, dtype = places.get(name, places.get(name.rpartition("/")[0])), stored.properties.dtype
        if near is not None and near.shape == stored.size:
            tensors[name] = torch.empty_like(near, dtype=dtype)
        else:
            tensors[name] = torch.empty(stored.size, dtype=dtype)
    dcp.load(dict(tensors), storage_reader=_Reader(folder))
    state = checkpoints.read_plain(folder)
    for name, tensor in tensors.items():
        checkpoints.put(state, name, tensor)
    return state


@cache
def _group() -> dist.ProcessGroup:
    """The ranks once more: messages about checkpoints must not mix with those of training."""
    return dist.new_group(backend="gloo")


class _Writer(dcp.StorageWriter):
    """Slices by part and rank under a temporary name, which becomes `path` when all ranks have written theirs."""

    def __init__(self, path: Path, plain: State, done: Callable[[], None]) -> None:
        self.path, self.plain, self.done = path, plain, done
        self.temporary = path.with_name(f".{path.name}.slices.tmp")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Folders are given at construction."""
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *given: Any, **further: Any) -> None:
        """The first rank makes the folder, before any other is told to write."""
        if is_coordinator:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Each rank is told its number."""
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One file a part; each slice's result carries the file's name and digest."""
        items, results = defaultdict(list), []
        for item in plan.items:
            items[item.index.fqn.partition("/")[0]].append(item)
        for part, slices in items.items():
            tensors, offsets, sizes = {}, {}, {}
            for item in slices:
                assert item.tensor_data is not None
                name = item.index.fqn.partition("/")[2]
                tensors[name] = planner.resolve_data(item).detach().cpu().contiguous()  # type: ignore[union-attr]
                offsets[name], sizes[name] = list(item.tensor_data.chunk.offsets), list(item.tensor_data.size)
            path = self.temporary / f"{part}-{plan.storage_data:05d}.safetensors"
            save_file(tensors, path, {OFFSETS: json.dumps(offsets), SIZES: json.dumps(sizes)})
            checkpoints.sync(path)
            kept = (path.name, checkpoints.sha256(path))
            results += [
                WriteResult(item.index, tensors[item.index.fqn.partition("/")[2]].nbytes, kept) for item in slices
            ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all are done: name the files, then let the folder appear."""
        sums = dict(result.storage_data for of_rank in results for result in of_rank)
        checkpoints.seal(self.temporary, self.plain, sums)
        checkpoints.sync(self.temporary)
        if self.path.exists():
            shutil.rmtree(self.path)
        self.temporary.replace(self.path)
        checkpoints.sync(self.path.parent)
        self.done()


class _Reader(dcp.StorageReader):
    """Slices, and whole tensors as slices that begin at 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Folders are given at construction."""
        return False

    def read_metadata(self, *given: Any, **further: Any) -> Metadata:
        """From the headers of the files: which tensors there are, and where their slices lie."""
        tensors: dict[str, TensorStorageMetadata] = {}
        places: dict[MetadataIndex, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                part, (offsets, sizes) = checkpoints.part_of(path), checkpoints.layout(file)
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    header = file.get_slice(name)
                    shape, key = header.get_shape(), f"{part}/{name}"
                    at = torch.Size(offsets.get(name, [0] * len(shape)))
                    of = TensorProperties(dtype=DTYPES[header.get_dtype()])
                    whole = TensorStorageMetadata(of, torch.Size(sizes.get(name, shape)), [])
                    tensors.setdefault(key, whole).chunks.append(ChunkStorageMetadata(at, torch.Size(shape)))
                    places[MetadataIndex(key, at)] = path
        return Metadata(dict(tensors), storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *given: Any, **further: Any) -> None:
        """Remember where slices lie."""
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what of each slice is wanted, file by file."""
        by_file: dict[Path, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.places[item.storage_index]].append(item)
        for path, items in by_file.items():
            with safe_open(path, framework="pt") as file:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_piece(file, item))
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def _piece(file: Any, item: ReadItem) -> Tensor:
    name = item.storage_index.fqn.partition("/")[2]
    if not item.lengths:
        scalar: Tensor = file.get_tensor(name)
        return scalar
    ends = (start + length for start, length in zip(item.storage_offsets, item.lengths, strict=True))
    cut = tuple(slice(start, end) for start, end in zip(item.storage_offsets, ends, strict=True))
    piece: Tensor = file.get_slice(name)[cut]
    return piece
