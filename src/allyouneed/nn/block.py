"""Blocks: mixers over tokens, over a memory, over each token's dimensions, each on a residual branch with its norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.nn.attention import Attention, CrossAttention
from allyouneed.nn.caches import KeyValues, Rows
from allyouneed.nn.ffn import MLP, GatedMLP
from allyouneed.nn.flops import Reading
from allyouneed.nn.kernels import AnyKernel
from allyouneed.nn.moe import MoE
from allyouneed.nn.norms import LayerNorm, Norm
from allyouneed.nn.rwkv import RWKVBlock
from allyouneed.nn.sight import Sight


@dataclass(frozen=True, kw_only=True)
class PreNorm(core.Config):
    """x + f(norm(x)): the stream itself is never normalised (Xiong et al. 2020, fig. 1b)."""

    def __call__(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        return x + branch(norm(x))


@dataclass(frozen=True, kw_only=True)
class PostNorm(core.Config):
    """norm(x + f(x)), as in 2017 (Xiong et al. 2020, fig. 1a)."""

    def __call__(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        return norm(x + branch(x))


class Block(core.Configured, nn.Module):
    """Two residual branches: `mixer` over tokens, then `channel` over each token's dimensions."""

    remembers_all = True  # what it keeps of a text grows with it

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """The parts; `dropout` is applied to each branch's output."""

        mixer: Attention.Config
        channel: MLP.Config | GatedMLP.Config | MoE.Config
        norm: Norm = field(default_factory=LayerNorm.Config)
        placement: PreNorm | PostNorm = field(default_factory=PreNorm)
        dropout: float = 0.0

        def with_kernel(self, kernel: AnyKernel) -> Self:
            """The same block, attention computed another way."""
            return self.replace(mixer=self.mixer.replace(kernel=kernel))

        def heads(self, dim: int) -> tuple[int, int]:
            """Number and size of the mixer's heads in a model `dim` wide."""
            return self.mixer.num_heads, self.mixer.head_dim_of(dim)

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.placement, self.dropout = config.placement, config.dropout
        self.mixer_norm, self.mixer = config.norm.build(dim), config.mixer.build(dim)
        self.channel_norm, self.channel = config.norm.build(dim), config.channel.build(dim)

    def forward(self, x: Tensor, sight: Sight, cache: KeyValues | None = None) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        x = self.placement(x, self.mixer_norm, lambda h: self._drop(self.mixer(h, sight, cache)))
        return self.placement(x, self.channel_norm, lambda h: self._drop(self.channel(h)))

    def new_cache(self, rows: Rows, capacity: int, dtype: torch.dtype) -> KeyValues:
        """Room for what it keeps of up to `capacity` tokens in each of `rows`."""
        cache: KeyValues = self.mixer.new_cache(rows, capacity, dtype)
        return cache

    def flops(self, reading: Reading) -> int:
        """Of its mixers."""
        return self.mixer.flops(reading) + self.channel.flops(reading)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class ParallelBlock(Block):
    """Both branches read the same stream: x + mixer(norm₁(x)) + channel(norm₂(x)) (Wang & Komatsuzaki 2021; Biderman
    et al. 2023, sec. 2.2).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Block.Config):
        """As of the block; norms stand before both branches."""

        placement: PreNorm = field(default_factory=PreNorm)

    def forward(self, x: Tensor, sight: Sight, cache: KeyValues | None = None) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        mixed = self._drop(self.mixer(self.mixer_norm(x), sight, cache))
        return x + mixed + self._drop(self.channel(self.channel_norm(x)))


class CrossBlock(Block):
    """Three residual branches: `mixer` over the row, `cross` over a memory, `channel` (Vaswani et al. 2017, 3.1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Block.Config):
        """As of the block, and the reader of the memory."""

        cross: CrossAttention.Config

        def with_kernel(self, kernel: AnyKernel) -> Self:
            """The same block, both kinds of attention computed another way."""
            return super().with_kernel(kernel).replace(cross=self.cross.replace(kernel=kernel))

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__(config, dim)
        self.cross_norm, self.cross = config.norm.build(dim), config.cross.build(dim)

    def forward(self, x: Tensor, sight: Sight, cache: KeyValues | None = None) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        x = self.placement(x, self.mixer_norm, lambda h: self._drop(self.mixer(h, sight, cache)))
        x = self.placement(x, self.cross_norm, lambda h: self._drop(self.cross(h, sight, cache)))
        return self.placement(x, self.channel_norm, lambda h: self._drop(self.channel(h)))

    def flops(self, reading: Reading) -> int:
        """Of its mixers and the reader of the memory."""
        return super().flops(reading) + self.cross.flops(reading)


AnyBlock = Block.Config | ParallelBlock.Config | CrossBlock.Config | RWKVBlock.Config
