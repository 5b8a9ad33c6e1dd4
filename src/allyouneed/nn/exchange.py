"""Experts spread over ranks: rows travel to the rank that holds their expert and their results travel back.

Each rank sends to each other rank as many rows as are for it, so that nothing is padded (all-to-all with uneven parts).
Shapes: R rows sent, S rows received, P ranks, E experts of which each rank holds L = E / P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from allyouneed.nn.grouped import Order

Compute = Callable[[Tensor, list[int]], Tensor]  # rows sorted by expert, how many each has -> their results


def exchanged(x: Tensor, counts: Sequence[int], compute: Compute, group: dist.ProcessGroup, arriving: Tensor) -> Tensor:
    """`compute` of every row, on the rank that holds its expert.

    Args:
        x: (R, dim), sorted by expert; rows beyond the sum of `counts` stay here, and give zeros.
        counts: of all E experts.
        compute: of this rank's L experts.
        group: the P ranks.
        arriving: (P, L), how many rows each rank sends to each expert here, as `announced` found.
    """
    ranks, local = arriving.shape
    sent = [sum(counts[r * local : (r + 1) * local]) for r in range(ranks)]
    received = arriving.sum(1).tolist()
    rows = _AllToAll.apply(x[: sum(sent)], sent, received, group)
    # they come by rank and within that by expert: sort them by expert
    experts = torch.arange(local, device=x.device).repeat(ranks).repeat_interleave(arriving.flatten().to(x.device))
    order = Order.by_expert(experts[:, None], None, local)
    results = compute(order.spread(rows), arriving.sum(0).tolist())
    back = order.gather(results, results.new_ones(len(results), 1))
    returned: Tensor = _AllToAll.apply(back, received, sent, group)
    return torch.nn.functional.pad(returned, (0, 0, 0, len(x) - len(returned)))


def announced(counts: Tensor, broken: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """How many rows each rank sends to each expert here, (P, L), and how many tokens are broken on all ranks together,
    from this rank's `counts` (E,) and `broken` ().
    """
    ranks = group.size()
    told = torch.cat((counts.view(ranks, -1), broken.expand(ranks, 1)), 1).contiguous()
    heard = torch.empty_like(told)
    dist.all_to_all_single(heard, told, group=group)
    heard = heard.cpu()
    return heard[:, :-1], int(heard[:, -1].sum())


class _AllToAll(torch.autograd.Function):
    """Rows there; their gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    y = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
    return y
