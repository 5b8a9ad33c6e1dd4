"""Many processes training one model: who is who, and what they tell each other."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from allyouneed.core.errors import InputError, RankLostError

PATIENCE = timedelta(minutes=10)  # for a rank that is alive but silent; one that died is noticed at once
BUCKET = 25 << 20  # bytes that travel together, as in PyTorch's own data parallelism (Li et al. 2020, sec. 3.2.2)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them, numbered from 0. Alone, every method is the identity.

    Without a `mesh` each rank holds the whole module. In either case a batch's rows are dealt out in `parts`, of which
    this rank computes the `part`-th; tensor ranks compute the same one together.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"  # where what is sent has to lie
    mesh: DeviceMesh | None = None
    slice_gradients: bool = False  # after each micro-batch

    @property
    def part(self) -> int:
        """Which rows this rank computes."""
        return self.rank if self.mesh is None else self._sharers.get_local_rank()

    @property
    def parts(self) -> int:
        """How many parts the rows are dealt out in."""
        return self.world if self.mesh is None else self._sharers.size()

    @cached_property
    def _sharers(self) -> DeviceMesh:
        """One rank for each part: this one and those that compute other rows."""
        assert self.mesh is not None
        return self.mesh["data", "expert", "shard"]._flatten("rows")

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self.mesh is None else self._sharers.get_group()

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all parts. Small ones are copied into messages of `BUCKET` bytes at most,
        larger ones travel as they lie.
        """
        for bucket in _buckets(tensors) if self.parts > 1 else ():
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0], group=self._group)
                continue
            flat = torch.cat([x.flatten() for x in bucket])
            dist.all_reduce(flat, group=self._group)
            for x, summed in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                x.copy_(summed.view_as(x))

    def add_over_all(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: int) -> int:
        """The largest `flag` (≥ 0) of all ranks: not 0 if any of them raised one."""
        if self.world == 1:
            return flag
        raised = torch.tensor(flag, device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return int(raised)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every part's `x`, all of one shape, in their order."""
        if self.parts == 1:
            return [x]
        sent = x.to(self.device)
        received = [torch.empty_like(sent) for _ in range(self.parts)]
        dist.all_gather(received, sent, group=self._group)
        return [y.to(x.device) for y in received]

    def follow_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""
        if self.world > 1:
            for x in tensors:
                dist.broadcast(x, src=0)

    def told(self, value: Value) -> Value:
        """What rank 0 was given; any value that pickles, for it comes from our own processes."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return cast("Value", box[0])

    def every(self, value: Value) -> list[Value]:
        """What each rank was given, in their order; any value that pickles."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def first(self, line: str) -> str:
        """The first of all ranks' lines that is not empty."""
        return next((found for found in self.every(line) if found), "")

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Within, what is wrong for one rank is raised on all of them at the end, for the price of a message.

        Raises:
            InputError: the first rank's that has one.
        """
        line = ""
        try:
            yield
        except InputError as error:
            line = str(error)
        if line := self.first(line):
            raise InputError(line)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, the death of another rank is one line.

        Raises:
            RankLostError: another rank died or was silent for too long.
        """
        try:
            yield
        except RuntimeError as error:  # what PyTorch's backends raise has no class of its own for this
            if self.world == 1 or not any(sign in str(error) for sign in _SIGNS):
                raise
            line = f"rank {self.rank}: another rank is gone ({str(error).splitlines()[0][:120]})"
            raise RankLostError(f"{line}; the last checkpoint stands, the same call goes on from it") from None


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors that take `BUCKET` bytes together, or more by themselves."""
    bucket, size = list[Tensor](), 0
    for x in tensors:
        if bucket and size + x.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(x)
        size += x.nbytes
    if bucket:
        yield bucket


# of gloo, of NCCL, and of both
_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket", "NCCL", "imed out", "abort")


def join() -> Ranks:
    """The ranks that `torchrun` started, from its environment variables; a process started otherwise is alone.

    The process group (NCCL where there is CUDA, and gloo for what lies on the CPU) is joined once, unless the caller
    has, and left at exit: torchrun's store remembers a group, so that it cannot be joined a second time, and after a
    restart has to be joined under another name.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world == 1:
        return Ranks()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
        named = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} of {world}", store)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=named, rank=rank, world_size=world, timeout=PATIENCE)
        atexit.register(_leave)
    return Ranks(rank, world, device)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
