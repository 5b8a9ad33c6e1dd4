"""The gradient of a batch's mean loss, whatever ranks and micro-batches its rows fall to.

Sums are what adds up: each piece contributes the gradient of its summed loss, and the total is divided once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from allyouneed.core.errors import InputError
from allyouneed.train.ranks import Ranks
from allyouneed.train.sharding import copies, local, placements, reduce_gradients

Batch = Mapping[str, Tensor]  # the first dimension of each tensor counts the batch's rows


class Loss(Protocol):
    """What an objective hands back: a sum over targets, and how many there were."""

    @property
    def total(self) -> Tensor:
        """The loss summed over the targets, (), to be differentiated."""

    @property
    def weight(self) -> Tensor:
        """The number of targets, ()."""

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """Further sums over the same targets, each ()."""

    @property
    def unit(self) -> str:
        """What a target is: tokens, pairs."""


Objective = Callable[[nn.Module, Batch], Loss]


@dataclass(frozen=True)
class Measured:
    """What was seen while a batch was differentiated."""

    means: dict[str, float]  # "loss" and the objective's metrics, per target
    targets: int
    unit: str
    norm: float  # of the gradient, before clipping


def differentiate(
    module: nn.Module,
    objective: Objective,
    batch: Batch,
    ranks: Ranks,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
) -> Measured:
    """Leave the gradient of `batch`'s mean loss in `.grad`, scaled down to the norm `clip` if it is longer.

    Args:
        module: its parameters have no gradients yet.
        objective: the loss of some rows.
        batch: the rows of all ranks; this one computes every `ranks.parts`-th.
        ranks: those who share the batch.
        accumulate: micro-batches that each rank computes one after the other; gradients travel after the last.
        clip: the largest norm (Pascanu et al. 2013, alg. 1).
        autocast: what to compute matrix products in, if not in the weights' own type.

    Raises:
        InputError: fewer rows than pieces, no targets, a loss or gradient that is not finite.
    """
    mine = (ranks.part + i * ranks.parts for i in range(accumulate))
    pieces = [_rows(batch, first, ranks.parts * accumulate) for first in mine]
    sums, unit = _backward(module, objective, pieces, autocast, ranks)
    gradients = _gradients(module)
    norm = _summed(sums, gradients, ranks)
    targets, *totals, length = torch.stack([*sums.values(), norm.float()]).tolist()  # a step's one wait for the device
    if not targets:
        raise InputError("nothing to learn from: every target of the batch is masked")
    if not (math.isfinite(totals[0]) and math.isfinite(length)):
        raise InputError(f"the loss is {totals[0] / targets:g} and the gradient's norm {length / targets:g}")
    means = {name: total / targets for name, total in zip(list(sums)[1:], totals, strict=True)}
    measured = Measured(means, int(targets), unit, length / targets)
    scale = 1.0 if clip is None else min(1.0, clip / max(measured.norm, 1e-12))
    torch._foreach_mul_([local(g) for g in gradients], scale / targets)  # what PyTorch's own clipping calls
    return measured


def _summed(sums: dict[str, Tensor], gradients: list[Tensor], ranks: Ranks) -> Tensor:
    """Let sums, and gradients if that is still to be done, be those of all rows; the norm of the whole gradient."""
    if ranks.mesh is None:
        ranks.add([*sums.values(), *gradients])
        return torch.nn.utils.get_total_norm(gradients)
    ranks.add([*sums.values()])
    squares = [local(g).float().square().sum() / copies(g, ranks.world) for g in gradients]
    return ranks.add_over_all(torch.stack(squares).sum()).sqrt()


def _backward(
    module: nn.Module, objective: Objective, pieces: Sequence[Batch], autocast: torch.dtype | None, ranks: Ranks
) -> tuple[dict[str, Tensor], str]:
    """Add up the gradients of all pieces; what the objective summed over them, and what it counts in."""
    sums: dict[str, Tensor] = {}
    device = next(module.parameters()).device
    for i, piece in enumerate(pieces, start=1):
        reduce_gradients(module, last=i == len(pieces), slices=ranks.slice_gradients)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = objective(module, {name: x.to(device, non_blocking=True) for name, x in piece.items()})
        loss.total.backward()
        for name, x in {"targets": loss.weight, "loss": loss.total, **loss.metrics}.items():
            sums[name] = x.detach().float() + sums.get(name, 0.0)
    return sums, loss.unit


def _rows(batch: Batch, first: int, every: int) -> Batch:
    """Rows `first`, `first` + `every`, … of `batch`."""
    if every == 1:
        return batch
    for name, x in batch.items():
        if len(x) < every:
            raise InputError(f"a batch of {len(x)} rows ({name}) cannot be split in {every}: use larger batches")
    return {name: x[first::every].contiguous() for name, x in batch.items()}


def _gradients(module: nn.Module) -> list[Tensor]:
    """The gradients of all trainable parameters; zeros where no loss reached, the same on every rank."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if placements(p.grad) != placements(p):  # what tensor ranks have yet to add up
            p.grad = cast("Any", p.grad).redistribute(placements=placements(p))
    return [p.grad for p in trainable if p.grad is not None]
