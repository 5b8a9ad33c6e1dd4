"""Normalisation layers. Where in the block they stand is `nn.block`'s business."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class NoNorm(core.Configured, nn.Identity):
    """The identity, where an architecture has no norm."""

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """Nothing to choose."""

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()


Norm = LayerNorm.Config | RMSNorm.Config | NoNorm.Config
