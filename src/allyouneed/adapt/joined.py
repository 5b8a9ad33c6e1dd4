"""A product of low rank added to what a layer gave, in that output's own memory, with its gradient.

Shapes: n rows, N outputs, K inputs, r = rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def joined(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale·B(Ax): y (…, N), contiguous and overwritten, x (…, K), A (r, K), B (N, r), all of one type.

    Differentiable once, y too.

    >>> joined(torch.ones(1, 2), torch.ones(1, 3), torch.ones(1, 3), torch.ones(2, 1), 0.5)
    tensor([[2.5000, 2.5000]])
    """
    return cast(Tensor, _Joined.apply(y, x, A, B, scale))


class _Joined(torch.autograd.Function):
    """y + s·B(Ax) in y's own memory: no product, scaled product or sum has one of its own, forward or backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ A.t()
        y.view(-1, y.shape[-1]).addmm_(low, B.t(), alpha=scale)
        ctx.scale = scale
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, low, A, B)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, A, B = ctx.saved_tensors
        of_x, of_A, of_B = ctx.needs_input_grad[1:4]
        rows = gradient.reshape(-1, gradient.shape[-1])
        back = (rows @ B).mul_(ctx.scale)  # (n, r): what A's output would have as its gradient
        return (
            gradient,
            (back @ A).view_as(x) if of_x else None,
            back.t() @ x.reshape(-1, x.shape[-1]) if of_A else None,
            (rows.t() @ low).mul_(ctx.scale) if of_B else None,
            None,
        )
