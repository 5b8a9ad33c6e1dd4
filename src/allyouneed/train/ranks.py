"""Many processes training one model: who is who, and what they tell each other.

Each rank holds the whole module and computes its share of the rows of every batch. Splitting the module itself is not
done here.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them, numbered from 0. Alone, every method is the identity."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"  # where what is sent has to lie

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, in one message."""
        if self.world == 1:
            return
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, summed in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(summed.view_as(x))

    def any(self, flag: int) -> int:
        """The largest `flag` (≥ 0) of all ranks: not 0 if any of them raised one."""
        if self.world == 1:
            return flag
        raised = torch.tensor(flag, device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return int(raised)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's `x`, all of one shape, by rank."""
        if self.world == 1:
            return [x]
        sent = x.to(self.device)
        received = [torch.empty_like(sent) for _ in range(self.world)]
        dist.all_gather(received, sent)
        return [y.to(x.device) for y in received]

    def follow_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""
        if self.world > 1:
            for x in tensors:
                dist.broadcast(x, src=0)


def join() -> Ranks:
    """The ranks that `torchrun` started, from its environment variables; a process started otherwise is alone.

    The process group (NCCL where there is CUDA, else gloo) is joined once, unless the caller has, and left at exit:
    torchrun's store remembers a group, so that it cannot be joined a second time.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world == 1:
        return Ranks()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(_leave)
    return Ranks(rank, world, device)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
