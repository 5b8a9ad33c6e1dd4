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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from allyouneed.core.errors import InputError
from allyouneed.core.modes import evaluating
from allyouneed.core.outline import outlined
from allyouneed.train.mesh import blocks
from allyouneed.train.ranks import Ranks, join

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class _Split:
    """What is known of a module of which this process holds slices."""

    mesh: DeviceMesh
    outline: nn.Module  # what it was, on the meta device


_SPLIT: WeakKeyDictionary[nn.Module, _Split] = WeakKeyDictionary()


def deferred(build: Callable[[], nn.Module]) -> nn.Module:
    """The module of `build`, for `train`: on rank 0 with its weights, in host memory, elsewhere on the meta device."""
    if join().rank == 0:
        return build()
    with outlined():
        return build()


def begin(module: nn.Module, ranks: Ranks, precision: torch.dtype | None = None) -> None:
    """Let all ranks begin with rank 0's weights, split over the mesh if there is one. Done before, nothing is done.

    `precision` is what sharded weights are gathered in, if not their own; gradients are summed in float32.

    Raises:
        InputError: it is split over another mesh.
    """
    known = _SPLIT.get(module)
    if known is not None and known.mesh is not ranks.mesh:
        raise InputError("mesh: this module was split over another one before; train with the same, or a new module")
    if ranks.mesh is None:
        follow(module, ranks)
    elif known is None:
        from allyouneed.train.splitting import split

        _SPLIT[module] = _Split(ranks.mesh, _outline(module))
        split(module, ranks, ranks.mesh, precision)


def is_split(module: nn.Module) -> bool:
    """Whether this process holds a slice of `module` only."""
    return module in _SPLIT


def whole(module: Module) -> Module:
    """`module` with all its weights, on the CPU of rank 0; to be called on all ranks, the others get an empty one.

    Gathered tensor by tensor: no device holds more than one of them beside its slices, and nobody two models. A module
    that is not split is handed back as it is.
    """
    if module not in _SPLIT:
        return module
    settle(module)
    gathered, first = cast("Module", copy.deepcopy(_SPLIT[module].outline)), join().rank == 0
    state: dict[str, Tensor] = {}
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        full = cast("Any", x).full_tensor().detach() if placements(x) else x.detach()
        if first:
            state[name] = full.cpu()
    if first:
        gathered.load_state_dict(state, strict=False, assign=True)
        _retie(gathered)
    return gathered.train(module.training)


def settle(module: nn.Module) -> None:
    """Let go of weights that a forward pass gathered, so that what is changed from outside is what is gathered next."""
    for part in module.modules() if is_split(module) else ():
        if callable(reshard := getattr(part, "reshard", None)):
            reshard()


def reduce_gradients(module: nn.Module, *, last: bool, slices: bool) -> None:
    """How the next backward pass ends: the last of a step in gradients summed over rows, in this rank's slices; one
    before adds to the whole ones that this rank computes or, where `slices`, to slices summed over `shard` alone.
    """
    if hasattr(module, "set_requires_gradient_sync"):  # one of FSDP's
        cast("Any", module).set_requires_gradient_sync(last or slices)
        cast("Any", module).set_requires_all_reduce(last)


def copies(x: Tensor, world: int) -> int:
    """How many of `world` ranks hold the same slice of a tensor: all of them, where it is not split."""
    distinct = 1
    for place, size in zip(placements(x), cast("Any", x).device_mesh.shape if placements(x) else (), strict=True):
        distinct *= 1 if place.is_replicate() else size
    return world // distinct


def local(x: Tensor) -> Tensor:
    """This rank's slice of a tensor."""
    return cast("Any", x).to_local() if placements(x) else x


def placements(x: Tensor) -> tuple[Any, ...]:
    """How a DTensor lies on each dimension of its mesh; of other tensors nothing. Asked so, its class is not needed."""
    return getattr(x, "placements", ())


@contextmanager
def recomputed(module: nn.Module, asked: bool) -> Iterator[None]:
    """Within, what a block computes is thrown away after the forward pass and computed again in the backward one, so
    that a layer keeps its input only (Chen et al. 2016), where `asked`. Dropout falls as it did, or does not.
    """
    changed = blocks(module) if asked else []
    if asked and not changed:
        raise InputError(f"recompute=True: {type(module).__name__} has no blocks to compute twice")
    for block in changed:
        block.forward = partial(_twice, block, block.forward)
    try:
        yield
    finally:
        for block in changed:
            del block.forward


def _twice(block: nn.Module, forward: Callable[..., Tensor], *given: Any) -> Tensor:
    """`forward`, computed again for its gradient, in the mode that the block was in the first time. What remembers
    results must not, or both times would differ.
    """
    if not torch.is_grad_enabled():
        return forward(*given)
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext if block.training else partial(evaluating, block)

    def again(*x: Any) -> Tensor:
        with mode():
            return forward(*map(_fresh, x))

    return cast("Tensor", checkpoint(again, *given, use_reentrant=False))


def _fresh(given: Any) -> Any:
    return given.fresh() if hasattr(given, "fresh") else given


def follow(unit: nn.Module, ranks: Ranks, done: set[nn.Parameter] | None = None) -> None:
    """Bring weights and buffers to the device, from the meta one too, and take over rank 0's; but for those `done`."""
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
