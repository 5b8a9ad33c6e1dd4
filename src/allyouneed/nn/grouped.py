"""Tokens sorted by expert, and each expert's products over its own run of them: nothing is padded, nothing dropped.

On the CPU each run passes through an expert in pieces that stay in the cache, and the gradient is written down: what
autograd would do instead, adding up one gradient of the whole bank for each expert, costs more than the products save.
Elsewhere PyTorch's own grouped product computes the same. Shapes: N tokens, k experts a token, R = N·k pairs of a token
and an expert, E experts, H = hidden_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 512  # rows: with a hidden layer of some thousands, what lies between two products stays in the cache

Middle = Callable[[Sequence[Tensor], Tensor | None], Tensor]  # what the first products give, and a mask -> hidden layer


@dataclass(frozen=True)
class Order:
    """Pairs of a token and an expert, sorted by expert, those that go nowhere last.

    `pairs` (R,) are numbers of pairs (pair p is of token p // k), `places` (R,) where each pair stands among them,
    `counts` (E,) how many each expert has.

    >>> order = Order.by_expert(torch.tensor([[1, 0], [0, 2]]), torch.ones(2, 2, dtype=torch.bool), 3)
    >>> order.pairs.tolist(), order.counts.tolist()
    ([1, 2, 0, 3], [2, 1, 1])
    """

    pairs: Tensor
    places: Tensor
    counts: Tensor
    k: int

    @staticmethod
    def by_expert(experts: Tensor, kept: Tensor | None, num_experts: int) -> Order:
        """The order of what is `kept` of `experts`, both (N, k); None: all is."""
        numbers = (experts if kept is None else torch.where(kept, experts, num_experts)).flatten()
        pairs = numbers.argsort(stable=True)
        places = torch.empty_like(pairs).scatter_(0, pairs, torch.arange(len(pairs), device=pairs.device))
        counts = torch.bincount(numbers, minlength=num_experts + 1)[:num_experts]
        return Order(pairs, places, counts, experts.shape[1])

    def spread(self, x: Tensor) -> Tensor:
        """Each pair's token: (N, dim) -> (R, dim)."""
        spread: Tensor = _Spread.apply(x, self.pairs, self.places, self.k)
        return spread

    def gather(self, y: Tensor, gates: Tensor) -> Tensor:
        """Σ over a token's pairs of gate · output: (R, dim), (N, k) -> (N, dim)."""
        gathered: Tensor = _Gather.apply(y, gates.to(y.dtype), self.pairs, self.places)
        return gathered


class _Spread(torch.autograd.Function):
    """Its gradient reads in order too, where autograd's would add row by row into place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Tensor, places: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = (len(x), k)
        return x[pairs // k]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return gradient[places].unflatten(0, ctx.shape).sum(1), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gates: Tensor, pairs: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(y, gates, pairs, places)
        return torch.bmm(gates[:, None], y[places].unflatten(0, gates.shape))[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, gates, pairs, places = ctx.saved_tensors
        wide = gradient[pairs // gates.shape[1]]
        to_gates = (wide * y).sum(-1)[places].view_as(gates)
        return wide.mul_(gates.flatten()[pairs, None]), to_gates, None, None


def feed_forward(
    x: Tensor, counts: Sequence[int], middle: Middle, ups: Sequence[Tensor], out: Tensor, mask: Tensor | None = None
) -> Tensor:
    """out_e · middle(up_e · x, …) for the rows of each expert e: (R, dim) -> (R, dim).

    Args:
        x: rows sorted by expert; those beyond the sum of `counts` belong to none, and give zeros.
        counts: rows of each expert.
        middle: the hidden layer of what `ups` give, number by number.
        ups: matrices (E, H, dim).
        out: matrices (E, dim, H).
        mask: (R, H), handed to `middle` with the rows it belongs to.
    """
    ends = list(accumulate(counts))
    if torch.is_autocast_enabled(x.device.type):
        x, out, *ups = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, out, *ups))
        mask = None if mask is None else mask.to(x.dtype)
    if x.device.type != "cpu" and all(t.shape[-1] * t.element_size() % 16 == 0 for t in (x, out)):  # what it asks for
        return by_grouped_product(x, ends, middle, ups, out, mask)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, out, *ups)):
        found: Tensor = _FeedForward.apply(ends, middle, mask, x, out, *ups)
        return found
    return _forward(ends, middle, mask, x, out, ups, None)


def by_grouped_product(
    x: Tensor, ends: Sequence[int], middle: Middle, ups: Sequence[Tensor], out: Tensor, mask: Tensor | None
) -> Tensor:
    """The same by PyTorch's grouped product, one kernel for all experts where the device has one."""
    rows = ends[-1]
    offsets = torch.tensor(ends, dtype=torch.int32, device=x.device)
    firsts = [F.grouped_mm(x[:rows], up.transpose(-2, -1), offs=offsets) for up in ups]
    hidden = middle(firsts, None if mask is None else mask[:rows])
    return F.pad(F.grouped_mm(hidden, out.transpose(-2, -1), offs=offsets), (0, 0, 0, len(x) - rows))


def _pieces(ends: Sequence[int]) -> list[tuple[int, slice]]:
    """Runs of at most `PIECE` rows, each with its expert."""
    starts = [0, *ends[:-1]]
    return [
        (expert, slice(row, min(row + PIECE, end)))
        for expert, (start, end) in enumerate(zip(starts, ends, strict=True))
        for row in range(start, end, PIECE)
    ]


def _forward(
    ends: Sequence[int],
    middle: Middle,
    mask: Tensor | None,
    x: Tensor,
    out: Tensor,
    ups: Sequence[Tensor],
    kept: list[Tensor] | None,
) -> Tensor:
    """What each of `ups` gives goes to `kept` too, piece by piece, if somebody wants to keep it: small tensors that the
    allocator has at hand, where the pages of large ones would be asked of the system anew each time.
    """
    y = x.new_empty(len(x), out.shape[1])
    y[ends[-1] :] = 0.0
    for expert, rows in _pieces(ends):
        given = [torch.mm(x[rows], up[expert].t()) for up in ups]
        if kept is not None:
            kept += given
        torch.mm(middle(given, None if mask is None else mask[rows]), out[expert].t(), out=y[rows])
    return y


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ends: Sequence[int], middle: Middle, mask: Tensor | None, x: Tensor, out: Tensor, *ups: Tensor
    ) -> Tensor:
        kept: list[Tensor] = []
        y = _forward(ends, middle, mask, x, out, ups, kept)
        ctx.ends, ctx.middle, ctx.mask, ctx.count = ends, middle, mask, len(ups)
        ctx.save_for_backward(x, out, *ups, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, out, *rest = ctx.saved_tensors
        ups, kept = rest[: ctx.count], iter(rest[ctx.count :])
        to_x = torch.empty_like(x)
        to_x[ctx.ends[-1] :] = 0.0
        to_out, *to_ups = (torch.empty_like(t) for t in (out, *ups))
        begun = -1
        for expert, rows in _pieces(ctx.ends):
            for matrix in (to_out, *to_ups):
                matrix[begun + 1 : expert] = 0.0  # experts without tokens
            first, begun = float(expert == begun), expert
            given = [next(kept).detach().requires_grad_() for _ in ups]
            with torch.enable_grad():
                hidden = ctx.middle(given, None if ctx.mask is None else ctx.mask[rows])
            above, below = gradient[rows], x[rows]
            _add(to_out[expert], above.t(), hidden.detach(), first)
            to_given = torch.autograd.grad(hidden, given, torch.mm(above, out[expert]))
            for number, (slope, up, to_up) in enumerate(zip(to_given, ups, to_ups, strict=True)):
                _add(to_up[expert], slope.t(), below, first)
                _add(to_x[rows], slope, up[expert], float(number > 0))
        for matrix in (to_out, *to_ups):
            matrix[begun + 1 :] = 0.0
        return None, None, None, to_x, to_out, *to_ups


def _add(total: Tensor, a: Tensor, b: Tensor, keep: float) -> None:
    """total ← keep · total + a b, in place; with `keep` 0, what stood there does not matter."""
    torch.addmm(total, a, b, beta=keep, out=total)
