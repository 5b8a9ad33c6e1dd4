"""Attention that keeps its output and one number a row, and computes its scores again for the gradient.

So Dao et al. 2022 (algorithm 4) have memory linear in length. What runs forward and backward is handed in (`nn.tiled`,
`nn.flash`); here stand what is kept between them and the only roundings: results come in float32 at least and are
rounded to the type of the inputs at the very end. The gradient needs the row sums of P∘dP, which are those of dO∘O.
Taken from an output rounded to bfloat16 they spoil it (in short rows by 2 % of its largest element), so what was
rounded off is kept as well.

Shapes: B rows, T queries, S keys, H heads, K heads of keys, D = head_dim.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from allyouneed.nn.view import View


class Tiles(Protocol):
    """How tiles of the scores are gone through."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, view: View, scale: float) -> tuple[Tensor, Tensor]:
        """softmax(QKᵀ·scale + bias)V (B, H, T, D) and the logsumexp of the scores (B, H, T); 0 and −inf for queries
        that see nothing.
        """

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        view: View,
        scale: float,
        gradient: Tensor,
        logsumexp: Tensor,
        sums: Tensor,
        learned: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """The gradients of q, k, v and of the parameters of the bias. `sums` (B, H, T): of dO∘O."""


def wide(x: Tensor) -> torch.dtype:
    """What sums are kept in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def attend(
    tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, view: View, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ·scale + bias)V and the logsumexp of each row's scores.

    Args:
        tiles: the way to compute it.
        q: (B, H, T, D); k, v: (B, K, S, D), K a divisor of H.
        view: who sees whom, and the bias.
        scale: None: 1/√D.

    Returns:
        (B, H, T, D) of q's type, and (B, H, T) in float32 at least, which has no gradient. A query that sees nothing
        has zeros and −inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        out, logsumexp = _Recomputed.apply(q, k, v, view, scale, tiles, *view.learned)
    return out, logsumexp


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, view: View, scale: float, tiles: Tiles, *learned: Tensor
    ) -> tuple[Tensor, Tensor]:
        exact, logsumexp = tiles.forward(q, k, v, view, scale)
        out = exact.to(q.dtype)
        rest = None if out is exact else (exact - out).to(q.dtype)
        ctx.view, ctx.scale, ctx.tiles = view, scale, tiles
        ctx.save_for_backward(q, k, v, out, rest, logsumexp, *learned)
        ctx.mark_non_differentiable(logsumexp)
        return out, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
        q, k, v, out, rest, logsumexp, *learned = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            exact = out if rest is None else out.to(wide(q)) + rest
            sums = (gradient * exact).sum(-1)
            found = ctx.tiles.backward(q, k, v, ctx.view, ctx.scale, gradient, logsumexp, sums, tuple(learned))
            dq, dk, dv = (x.to(y.dtype) for x, y in zip(found, (q, k, v), strict=False))
        return (dq, dk, dv, None, None, None, *found[3:])
