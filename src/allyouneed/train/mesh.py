"""How the ranks of a run are laid out: which of them share rows, weights, heads and experts.

A mesh is what a configuration says; `train.ranks` holds what becomes of it. Everything that can be wrong with one is
found here, before any rank sends anything, so that all say the same line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol, runtime_checkable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.train.ranks import Ranks


@runtime_checkable
class Divided(Protocol):
    """A part that tensor ranks can share: each computes some of its columns, then adds up what comes of its rows."""

    by_columns: tuple[str, ...]  # layers whose outputs are split (Shoeybi et al. 2019, sec. 3)
    by_rows: tuple[str, ...]  # layers whose inputs are then split already, and whose outputs are summed

    def divisible(self) -> Mapping[str, int]:
        """What the number of tensor ranks has to divide, by the names of the configuration."""


@runtime_checkable
class Narrowed(Protocol):
    """A part that knows something of each head and has to be told which heads this rank computes."""

    def narrow(self, index: int, of: int) -> None:
        """Keep the `index`-th of `of` equal runs of heads."""


@runtime_checkable
class Spread(Protocol):
    """A part with experts, which expert ranks share."""

    def spread(self, mesh: DeviceMesh) -> None:
        """Keep this rank's experts, as DTensors split along their first dimension, and exchange tokens from now on."""


@dataclass(frozen=True, kw_only=True)
class Mesh(core.Config):
    """The ranks of a run as a grid, data × expert × shard × tensor; neighbours in the last dimensions talk most.

    Ranks along `data`, `expert` and `shard` compute different rows of a batch, those along `tensor` the same ones.

    >>> Mesh(shard=4, tensor=2).sizes(16)
    {'data': 2, 'expert': 1, 'shard': 4, 'tensor': 2}
    """

    data: int | None = None  # copies of everything; None: as many as the ranks allow, so that their number may change
    shard: int = 1  # ranks that keep a slice of weights, gradients and optimiser each (FSDP; Zhao et al. 2023)
    tensor: int = 1  # ranks that split heads and hidden dimensions (Shoeybi et al. 2019)
    expert: int = 1  # ranks that split experts (Lepikhin et al. 2020, sec. 3.1)
    # Micro-batches of a step can be added up whole and sent once, or in slices, sent each time, which takes less memory
    slice_gradients: bool = False

    @property
    def splits(self) -> bool:
        """Whether a rank holds less than the whole module."""
        return max(self.shard, self.tensor, self.expert) > 1

    def sizes(self, world: int) -> dict[str, int]:
        """The grid of `world` ranks.

        Raises:
            InputError: no such grid.
        """
        grid = {"data": self.data, "expert": self.expert, "shard": self.shard, "tensor": self.tensor}
        asked = {name: size for name, size in grid.items() if size is not None}
        for name, size in asked.items():
            if size < 1:
                raise InputError(f"mesh.{name}={size}; it must be 1 or more")
        inner = self.shard * self.tensor * self.expert
        data = world // inner if self.data is None else self.data
        if data * inner != world:
            shown = " x ".join(f"{name}={size}" for name, size in asked.items() if size > 1 or name == "data")
            product = inner * (self.data or 1)
            wants = f"{product} ranks" if self.data else f"a multiple of {product} ranks"
            raise InputError(
                f"mesh: {shown} wants {wants}, and there are {world}; change the mesh or torchrun's number"
            )
        return {"data": data, "expert": self.expert, "shard": self.shard, "tensor": self.tensor}

    def check(self, module: nn.Module) -> None:
        """Whether `module` can be split so.

        Raises:
            InputError: something does not divide, or there is nothing to divide.
        """
        for name, shared in divided(module) if self.tensor > 1 else ():
            for what, count in shared.divisible().items():
                if count % self.tensor:
                    raise InputError(f"mesh.tensor={self.tensor} does not divide {what}={count} of {name}")
        if self.tensor > 1 and not any(divided(module)):
            raise InputError(f"mesh.tensor={self.tensor}: no part of {_class_of(module)} can be split among ranks")
        for name, part in spread(module) if self.expert > 1 else ():
            experts = getattr(part, "num_experts", None)
            if experts is not None and experts % self.expert:
                raise InputError(f"mesh.expert={self.expert} does not divide num_experts={experts} of {name}")
        if self.expert > 1 and not any(spread(module)):
            raise InputError(f"mesh.expert={self.expert}: {_class_of(module)} has no experts")

    def lay(self, ranks: Ranks, module: nn.Module) -> Ranks:
        """`ranks` in this grid; as they are, where each holds the whole module.

        Raises:
            InputError: the grid fits neither the ranks nor the module.
        """
        sizes = self.sizes(ranks.world)
        if not self.splits:
            return ranks
        self.check(module)
        return replace(ranks, mesh=_grid(ranks.device, **sizes), slice_gradients=self.slice_gradients)


@cache
def _grid(device: str, **sizes: int) -> DeviceMesh:
    """One for each layout: its groups of ranks last as long as the process."""
    return init_device_mesh(device, (*sizes.values(),), mesh_dim_names=(*sizes,))


def mesh_for(parameters: float, memory: float = 80e9) -> Mesh:
    """A mesh for the published size of a paper: weights, gradients and AdamW's moments, 16 bytes a parameter, take up a
    third of each rank's `memory` (bytes) at most; from 32 ranks on, eight of them are tensor ranks, the rest shards.
    `allyouneed plan` finds better ones for a cluster at hand.

    >>> mesh_for(1e9) == Mesh(), mesh_for(13e9).shard, mesh_for(175e9).shard, mesh_for(175e9).tensor
    (True, 8, 16, 8)
    """
    ranks = 1 << max(0, math.ceil(math.log2(16 * parameters / (memory / 3))))
    tensor = 8 if ranks >= 32 else 1
    return Mesh(shard=ranks // tensor, tensor=tensor, slice_gradients=ranks > 1)


def divided(module: nn.Module) -> Iterator[tuple[str, Divided]]:
    """The parts of `module` that tensor ranks share, by name."""
    return ((name, part) for name, part in module.named_modules() if isinstance(part, Divided))


def spread(module: nn.Module) -> Iterator[tuple[str, Spread]]:
    """The parts of `module` that expert ranks share, by name."""
    return ((name, part) for name, part in module.named_modules() if isinstance(part, Spread))


def blocks(module: nn.Module) -> list[nn.Module]:
    """What repeats along the depth of `module`: the members of every list called `blocks`, in order."""
    lists = (getattr(part, "blocks", None) for part in module.modules())
    return [block for found in lists if isinstance(found, nn.ModuleList) for block in found]


def _class_of(module: nn.Module) -> str:
    return type(module).__name__
