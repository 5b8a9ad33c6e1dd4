"""One module over many ranks, by PyTorch's own engine: tensor parallel layers, experts and FSDP2 on one `DeviceMesh`.

A module is split block by block: a block's weights are put on the device as rank 0 has them, its layers split among
tensor ranks, its experts among expert ranks, and what is left of it sharded, before the next block takes up memory. So
rank 0 draws all weights in the order in which one process would, and a run begins with the same ones on any mesh; the
others may build on the meta device (`deferred`). No device ever holds more than its slices and one block.

Gradients come out summed over rows: of experts over all dimensions of the mesh but `expert`, which their tokens have
crossed already, of everything else over all but `tensor`, whose ranks have the same rows.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from allyouneed.core.errors import InputError
from allyouneed.train.mesh import Narrowed, blocks, divided, spread
from allyouneed.train.ranks import Ranks, join

# Ways into a model other than calling it, which objectives take; PyTorch gathers weights before each.
ENTRANCES = ("hidden", "read", "remember")
Module = TypeVar("Module", bound=nn.Module)
_WHOLE: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # what a split module was, on the meta device


def deferred(build: Callable[[], nn.Module]) -> nn.Module:
    """The module of `build`, for `train`: on rank 0 with its weights, in host memory, elsewhere on the meta device."""
    if join().rank == 0:
        return build()
    with torch.device("meta"):
        return build()


def begin(module: nn.Module, ranks: Ranks) -> None:
    """Let all ranks begin with rank 0's weights, split over the mesh if there is one. Done before, nothing is done."""
    if ranks.mesh is None:
        _follow(module, ranks)
    elif module not in _WHOLE:
        _WHOLE[module] = _outline(module)
        _split(module, ranks, ranks.mesh)


def is_split(module: nn.Module) -> bool:
    """Whether this process holds a slice of `module` only."""
    return module in _WHOLE


def whole(module: Module) -> Module:
    """`module` with all its weights, on the CPU of rank 0; to be called on all ranks, the others get an empty one.

    Gathered tensor by tensor: no device holds more than one of them beside its slices, and nobody two models. A module
    that is not split is handed back as it is.
    """
    if module not in _WHOLE:
        return module
    settle(module)
    gathered, first = cast("Module", copy.deepcopy(_WHOLE[module])), join().rank == 0
    state: dict[str, Tensor] = {}
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        full = x.full_tensor().detach() if isinstance(x, DTensor) else x.detach()
        if first:
            state[name] = full.cpu()
    if first:
        gathered.load_state_dict(state, strict=False, assign=True)
        _retie(gathered)
    return gathered.train(module.training)


def settle(module: nn.Module) -> None:
    """Let go of weights that a forward pass gathered, so that what is changed from outside is what is gathered next."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def reduce_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass ends in gradients of this rank's slices, summed, or only adds to its own."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)


def copies(x: Tensor, world: int) -> int:
    """How many of `world` ranks hold the same slice of a tensor: all of them, where it is not split."""
    if not isinstance(x, DTensor):
        return world
    sizes = zip(x.placements, x.device_mesh.shape, strict=True)
    distinct = 1
    for placement, size in sizes:
        distinct *= size if placement.is_shard() else 1
    return world // distinct


def local(x: Tensor) -> Tensor:
    """This rank's slice of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


@contextmanager
def recomputed(module: nn.Module, asked: bool) -> Iterator[None]:
    """Within, what a block computes is thrown away after the forward pass and computed again in the backward one, so
    that a layer keeps its input only (Chen et al. 2016), where `asked`. Dropout falls as it did.
    """
    changed = blocks(module) if asked else []
    if asked and not changed:
        raise InputError(f"recompute=True: {type(module).__name__} has no blocks to compute twice")
    for block in changed:
        block.forward = partial(_twice, block.forward)
    try:
        yield
    finally:
        for block in changed:
            del block.forward


def _twice(forward: Callable[..., Tensor], *given: Any) -> Tensor:
    """`forward`, computed again for its gradient. What remembers results must not, or both times would differ."""
    if not torch.is_grad_enabled():
        return forward(*given)
    return cast("Tensor", checkpoint(lambda *x: forward(*map(_fresh, x)), *given, use_reentrant=False))


def _fresh(given: Any) -> Any:
    return given.fresh() if hasattr(given, "fresh") else given


def _split(module: nn.Module, ranks: Ranks, mesh: DeviceMesh) -> None:
    done: set[nn.Parameter] = set()
    for unit in (*blocks(module), module):
        _follow(unit, ranks, done)
        if mesh["tensor"].size() > 1:
            _divide(unit, mesh["tensor"])
        apart = _spread(unit, mesh) if mesh["expert"].size() > 1 else set[nn.Parameter]()
        if ranks.parts > 1:
            _shard(unit, _grid(mesh), apart)
        done |= set(unit.parameters())
    if isinstance(module, FSDPModule):
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody here changes
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


def _follow(unit: nn.Module, ranks: Ranks, done: set[nn.Parameter] | None = None) -> None:
    """Bring weights and buffers to the device, from the meta one too, and take over rank 0's."""
    moved: dict[Tensor, Tensor] = {}
    for part in unit.modules():
        for held in (part._parameters, part._buffers):
            for name, x in held.items():
                if x is not None and x not in (done or ()):
                    held[name] = moved[x] if x in moved else moved.setdefault(x, _placed(x, ranks))  # type: ignore[assignment]
    ranks.follow_first([x.detach() for x in moved.values()])


def _placed(x: Tensor, ranks: Ranks) -> Tensor:
    if ranks.mesh is None and not x.is_meta:
        return x  # the caller has chosen the device
    there = torch.empty_like(x, device=ranks.device) if x.is_meta else x.detach().to(ranks.device)
    if there.device == x.device:
        return x
    return nn.Parameter(there, x.requires_grad) if isinstance(x, nn.Parameter) else there


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


def _spread(unit: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Split experts; their parameters, none of which may be summed over `expert`."""
    apart: set[nn.Parameter] = set()
    for _, part in spread(unit):
        module = cast("nn.Module", part)
        if not any(isinstance(x, DTensor) for x in module.parameters()):
            part.spread(mesh["expert"])
            if mesh["data"].size() * mesh["shard"].size() > 1:
                _shard(module, mesh["shard"] if mesh["data"].size() == 1 else mesh["data", "shard"], set())
        apart |= set(module.parameters())
    return apart


def _grid(mesh: DeviceMesh) -> DeviceMesh:
    """Where what is no expert is sharded: over `shard`, the same on all replicas (HSDP) if there are any."""
    replicas = mesh["data", "expert"]._flatten("replicas")
    return mesh["shard"] if replicas.size() == 1 else DeviceMesh._concatenate([replicas, mesh["shard"]])


def _shard(unit: nn.Module, grid: DeviceMesh, apart: set[nn.Parameter]) -> None:
    sharded = fully_shard(unit, mesh=grid, ignored_params=apart)
    sharded.set_gradient_divide_factor(1.0)  # sums, not means: `train.gradients` divides by the number of targets
    sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other way to divide by 1


def _outline(module: nn.Module) -> nn.Module:
    """A copy without memory, shared tensors shared."""
    tensors: Sequence[Tensor] = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {id(x): _empty(x) for x in tensors}
    return copy.deepcopy(module, memo)


def _empty(x: Tensor) -> Tensor:
    there = torch.empty_like(x, device="meta")
    return nn.Parameter(there, x.requires_grad) if isinstance(x, nn.Parameter) else there


def _retie(module: nn.Module) -> None:
    if callable(retie := getattr(module, "retie", None)):
        retie()
