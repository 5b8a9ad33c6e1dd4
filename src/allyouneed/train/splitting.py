"""Taking a module apart over a mesh, with PyTorch's tensor parallel layers and FSDP2; see `train.sharding`.

Stands by itself because what it imports takes a second that whoever trains alone need not wait.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from allyouneed.train.mesh import Narrowed, blocks, divided, spread
from allyouneed.train.ranks import Ranks
from allyouneed.train.sharding import follow

# Ways into a model other than calling it, which objectives take; weights are to be gathered before each
ENTRANCES = ("hidden", "read", "remember")


def split(module: nn.Module, ranks: Ranks, mesh: DeviceMesh, precision: torch.dtype | None) -> None:
    """Leave this rank's slices in `module`; see `train.sharding`."""
    policy = MixedPrecisionPolicy(precision, torch.float32 if precision else None, cast_forward_inputs=False)
    done: set[nn.Parameter] = set()
    for unit in (*blocks(module), module):
        follow(unit, ranks, done)
        if mesh["tensor"].size() > 1:
            _divide(unit, mesh["tensor"])
        apart = _spread(unit, mesh, policy) if mesh["expert"].size() > 1 else set[nn.Parameter]()
        if ranks.parts > 1:
            _shard(unit, _grid(mesh), policy, apart)
        done |= set(unit.parameters())
    if isinstance(module, FSDPModule):
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody here changes
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # slices of slices are slow
        _open(module)


def _open(module: nn.Module) -> None:
    """Let weights be gathered before any of the `ENTRANCES`, and once where one leads to another."""
    inside: list[bool] = []

    def entered(first: Callable[..., Any], later: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(later)
        def enter(*given: Any, **further: Any) -> Any:
            method = later if inside else first
            inside.append(True)
            try:
                return method(*given, **further)
            finally:
                inside.pop()

        return enter

    for name in ("forward", *(name for name in ENTRANCES if hasattr(module, name))):
        plain = getattr(module, name)
        if name != "forward":  # around which PyTorch has its hooks already
            register_fsdp_forward_method(module, name)
        setattr(module, name, entered(getattr(module, name), plain))


def _divide(unit: nn.Module, mesh: DeviceMesh) -> None:
    """Split what its parts say can be split among tensor ranks."""
    for _, part in divided(unit):
        styles: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in part.by_columns}
        styles |= {name: RowwiseParallel() for name in part.by_rows}
        module = cast("nn.Module", part)
        if not any(isinstance(x, DTensor) for x in module.parameters()):
            parallelize_module(module, mesh, styles)
    for narrowed in unit.modules():
        if isinstance(narrowed, Narrowed):
            narrowed.narrow(mesh.get_local_rank(), mesh.size())


def _spread(unit: nn.Module, mesh: DeviceMesh, precision: MixedPrecisionPolicy) -> set[nn.Parameter]:
    """Split experts; their parameters, none of which may be summed over `expert`."""
    apart: set[nn.Parameter] = set()
    for _, part in spread(unit):
        module = cast("nn.Module", part)
        if not any(isinstance(x, DTensor) for x in module.parameters()):
            part.spread(mesh["expert"])
            if mesh["data"].size() * mesh["shard"].size() > 1:
                _shard(module, mesh["shard"] if mesh["data"].size() == 1 else mesh["data", "shard"], precision)
        apart |= set(module.parameters())
    return apart


def _grid(mesh: DeviceMesh) -> DeviceMesh:
    """Where what is no expert is sharded: over `shard`, the same on all replicas (HSDP) if there are any."""
    replicas = mesh["data", "expert"]._flatten("replicas")
    return mesh["shard"] if replicas.size() == 1 else DeviceMesh._concatenate([replicas, mesh["shard"]])


def _shard(
    unit: nn.Module, grid: DeviceMesh, precision: MixedPrecisionPolicy, apart: set[nn.Parameter] | None = None
) -> None:
    sharded = fully_shard(unit, mesh=grid, mp_policy=precision, ignored_params=apart)
    sharded.set_gradient_divide_factor(1.0)  # sums, not means: `train.gradients` divides by the number of targets
    sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other way to divide by 1
