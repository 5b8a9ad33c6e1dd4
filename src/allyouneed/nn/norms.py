"""Normalisation layers. Where in the block they stand is `nn.block`'s business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from allyouneed import core


class LayerNorm(core.Configured, nn.LayerNorm):
    """y = g ⊙ (x − μ)/σ + b over the last dimension (Ba et al. 2016, eq. 4).

    >>> LayerNorm.Config().build(8)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`eps` is added to the variance."""

        eps: float = 1e-5

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__(dim, eps=config.eps)


class RMSNorm(core.Configured, nn.Module):
    """y = g ⊙ x/√(mean(x²) + ε): layer norm without centring and bias (Zhang & Sennrich 2019, eq. 4).

    >>> RMSNorm.Config().build(8)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`eps` is added to the mean square."""

        eps: float = 1e-6

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, dim)."""
        if x.requires_grad and x.device.type == "cpu":  # PyTorch has a kernel for this gradient on GPUs only
            normed: Tensor = RootMeanSquare.apply(x, self.weight, self.eps)
            return normed
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RootMeanSquare(torch.autograd.Function):
    """y = g ⊙ xr with r = 1/√(mean(x²) + ε), and its gradient r (g ⊙ ∂y − xr mean(xr ⊙ g ⊙ ∂y)).

    A few passes over memory; PyTorch on a CPU differentiates square, mean, root and products one by one. As there,
    16-bit inputs are computed in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """(…, dim), (dim) -> (…, dim)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, r)
        return (wide * r).mul_(gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Of x and of the gain."""
        x, gain, r = ctx.saved_tensors
        normed, gradient, wide_gain = x * r, gradient.to(r.dtype), gain.to(r.dtype)
        products = gradient * normed
        mean = (products @ wide_gain).div_(x.shape[-1])[..., None]
        of_x = (gradient * wide_gain).sub_(normed.mul_(mean)).mul_(r)
        return of_x.to(x.dtype), products.reshape(-1, x.shape[-1]).sum(0).to(gain.dtype), None


class BatchNorm(core.Configured, nn.Module):
    """y = g ⊙ (x − μ)/σ + b, with μ and σ of each dimension over all rows of the batch (Ioffe & Szegedy 2015, alg. 1).

    In eval mode μ and σ are running averages of what training saw. In training a row's output depends on the others,
    and where a batch's tokens are rows, a token's on later ones.

    >>> BatchNorm.Config().build(8)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`eps` is added to the variance, `momentum` is the newest batch's share in the running averages, `gain` is
        what g begins with (inside recurrent nets 0.1, Cooijmans et al. 2017, sec. 4).
        """

        eps: float = 1e-5
        momentum: float = 0.1
        gain: float = 1.0

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.eps, self.momentum = config.eps, config.momentum
        self.weight, self.bias = nn.Parameter(torch.full((dim,), config.gain)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, dim).

        Raises:
            InputError: training on a single row, whose variance is zero.
        """
        rows = x.flatten(0, -2)
        if self.training and len(rows) < 2:
            raise core.InputError("batch norm over 1 row: its variance is 0; use more rows a batch, or layer norm")
        mean, var = self.running_mean, self.running_var
        y = F.batch_norm(rows, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return y.view_as(x)


class NoNorm(core.Configured, nn.Identity):
    """The identity, where an architecture has no norm."""

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """Nothing to choose."""

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()


def weight_normalised(v: Tensor, gain: Tensor) -> Tensor:
    """The matrix with rows wᵢ = gᵢ vᵢ/‖vᵢ‖ (Salimans & Kingma 2016, eq. 2): (out, in), (out) -> (out, in).

    >>> weight_normalised(torch.tensor([[3.0, 4.0]]), torch.tensor([10.0])).tolist()
    [[6.0, 8.0]]
    """
    return gain[:, None] * v / v.norm(dim=1, keepdim=True)


Norm = LayerNorm.Config | RMSNorm.Config | BatchNorm.Config | NoNorm.Config
