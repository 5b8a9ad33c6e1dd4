"""Linear layers and embeddings whose weights stay in GGUF's blocks of 4, 8 or 16 bits, computed with in fp32.

On a CPU the blocks are unpacked in registers, once for several rows of the input, so that a token costs little more
than reading the packed bytes (`native/packed.cpp`). Elsewhere, and for kinds the kernels do not know, the weight is
unpacked to fp32 at first use and kept. Weights are frozen; gradients reach the input.

Shapes: N outputs, K inputs, B bytes of a row in blocks.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from allyouneed.core.errors import InputError
from allyouneed.nn import native

STEP = 32  # numbers the kernels take at a time
KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)  # those the kernels know


class PackedLinear(nn.Module):
    """x Wᵀ + b with W (N, K) in GGUF's blocks: `F.linear(x, self.dequantised(), bias)` up to the rounding of fp32.

    From the kernels, a row has the same bits alone and in any batch, on any number of threads.

    >>> raw = gguf.quants.quantize(np.eye(3, 32, dtype=np.float32), Kind.Q8_0)
    >>> PackedLinear.from_blocks(raw, Kind.Q8_0, in_features=32)(torch.arange(64.0).view(2, 32)).round()
    tensor([[ 0.,  1.,  2.],
            [32., 33., 34.]])
    """

    blocks: Tensor
    bias: Tensor | None

    def __init__(self, blocks: Tensor, kind: Kind, in_features: int, bias: Tensor | None = None) -> None:
        """`blocks` (N, B) uint8; `bias` (N,)."""
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, in_features, len(blocks)
        self.register_buffer("blocks", _checked(blocks, kind, in_features))
        self.register_buffer("bias", bias)
        self.unpacked: Tensor | None = None  # the weight, once it was needed where no kernel reads the blocks

    @classmethod
    def from_blocks(cls, raw: np.ndarray, kind: Kind, in_features: int, bias: Tensor | None = None) -> PackedLinear:
        """The layer over `raw` (N, B), shared and never written to: a memory map is read when computed with."""
        return cls(shared(raw), kind, in_features, bias)

    @staticmethod
    def fused(layers: Sequence[PackedLinear]) -> PackedLinears:
        """`layers` of one kind and one input as a single product."""
        return PackedLinears(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) -> (…, N) in x's dtype; computed in fp32."""
        y = cast(Tensor, _Product.apply(x, self)) if x.requires_grad and torch.is_grad_enabled() else self.product(x)
        bias = self._buffers["bias"]  # found by self.bias after 0.5 us, 200 times a token
        return y if bias is None else y + bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ, (…, K) -> (…, N), unseen by autograd.

        Raises:
            ValueError: x has not K features.
        """
        blocks = cast(Tensor, self._buffers["blocks"])
        kernels = _kernels(blocks, self.kind, self.in_features)
        if kernels is None or not x.is_cpu:
            return F.linear(x.float(), self.weight()).to(x.dtype)
        *rows, features = x.shape
        if features != self.in_features:  # the kernels would read beyond x
            raise ValueError(f"x has {features} features where the layer takes {self.in_features}")
        values = x.float().contiguous()
        y = values.new_empty((*rows, self.out_features))
        places = blocks.data_ptr(), values.data_ptr(), y.data_ptr()
        kernels.packed_linear(self.kind, *places, math.prod(rows), self.out_features, features, torch.get_num_threads())
        return y if x.dtype is torch.float32 else y.to(x.dtype)

    def weight(self) -> Tensor:
        """W (N, K) fp32: kept from then on where no kernel reads the blocks, else unpacked anew."""
        if _kernels(self.blocks, self.kind, self.in_features) is not None:
            return self.dequantised()
        if self.unpacked is None or self.unpacked.device != self.blocks.device:
            self.unpacked = self.dequantised()
        return self.unpacked

    def dequantised(self) -> Tensor:
        """W (N, K) fp32: exactly the numbers the format defines."""
        return unpack(self.blocks, self.kind, self.in_features)

    def extra_repr(self) -> str:
        """What `repr` shows of the layer."""
        return f"{self.in_features}, {self.out_features}, {self.kind.name}, bias={self.bias is not None}"


class PackedLinears(nn.Module):
    """Several packed linears of one input, their rows one below the other: one call, and more work to share in it.

    >>> raw = gguf.quants.quantize(np.ones((3, 32), np.float32), Kind.Q4_1)
    >>> layers = [PackedLinear.from_blocks(raw[:n], Kind.Q4_1, in_features=32) for n in (1, 3)]
    >>> [tuple(y.shape) for y in PackedLinear.fused(layers)(torch.ones(5, 32))]
    [(5, 1), (5, 3)]
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        super().__init__()
        first = layers[0]
        assert all(layer.kind == first.kind and layer.in_features == first.in_features for layer in layers)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers))
        blocks, bias = torch.cat([layer.blocks for layer in layers]), torch.cat(biases) if biases else None
        self.joint = PackedLinear(blocks, first.kind, first.in_features, bias)
        self.sizes = [layer.out_features for layer in layers]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(…, K) -> one (…, N) for each layer: views of one tensor."""
        return self.joint(x).split(self.sizes, -1)


class PackedEmbedding(nn.Module):
    """Rows of a table (N, K) in GGUF's blocks; only the rows asked for are unpacked. `blocks` may be a tied head's.

    >>> raw = gguf.quants.quantize(np.ones((5, 32), np.float32), Kind.Q8_0)
    >>> PackedEmbedding.from_blocks(raw, Kind.Q8_0, embedding_dim=32)(torch.tensor([[4, 0, 4]])).shape
    torch.Size([1, 3, 32])
    """

    blocks: Tensor

    def __init__(self, blocks: Tensor, kind: Kind, embedding_dim: int) -> None:
        """`blocks` (N, B) uint8."""
        super().__init__()
        self.kind, self.num_embeddings, self.embedding_dim = kind, len(blocks), embedding_dim
        self.register_buffer("blocks", _checked(blocks, kind, embedding_dim))

    @classmethod
    def from_blocks(cls, raw: np.ndarray, kind: Kind, embedding_dim: int) -> PackedEmbedding:
        """The table over `raw` (N, B), shared and never written to."""
        return cls(shared(raw), kind, embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """(…) integers -> (…, K) fp32."""
        return unpack(F.embedding(ids, self.blocks), self.kind, self.embedding_dim)

    def dequantised(self) -> Tensor:
        """The table (N, K) fp32."""
        return unpack(self.blocks, self.kind, self.embedding_dim)

    def extra_repr(self) -> str:
        """What `repr` shows of the table."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.kind.name}"


def unpack(blocks: Tensor, kind: Kind, features: int) -> Tensor:
    """(…, B) uint8, contiguous -> (…, K) fp32: exactly the numbers the format defines.

    >>> unpack(torch.tensor([[0, 0, 128, 63]], dtype=torch.uint8), Kind.F32, 1)
    tensor([[1.]])
    """
    kernels = _kernels(blocks, kind, features)
    if kernels is None:
        return shared(gguf.quants.dequantize(blocks.cpu().numpy(), kind), np.float32).to(blocks.device)
    out = blocks.new_empty((*blocks.shape[:-1], features), dtype=torch.float32)
    kernels.packed_unpack(kind, blocks.data_ptr(), out.data_ptr(), out.numel() // STEP, torch.get_num_threads())
    return out


def shared(array: np.ndarray, dtype: Any = np.uint8) -> Tensor:
    """A tensor over the memory of `array`, seen as `dtype`. It must not be written to: the memory may be read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array).view(dtype))


class _Product(torch.autograd.Function):
    """x Wᵀ with a gradient for x; W is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient.float() @ ctx.layer.weight()).to(gradient.dtype), None


def _kernels(blocks: Tensor, kind: Kind, features: int) -> ctypes.CDLL | None:
    return native.library() if blocks.is_cpu and kind in KINDS and features % STEP == 0 else None


def _checked(blocks: Tensor, kind: Kind, features: int) -> Tensor:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if features % block or blocks.shape[1:] != (features // block * size,) or blocks.dtype != torch.uint8:
        raise InputError(
            f"packed weight: rows of {features} numbers in {kind.name} are {features / block * size:g} bytes, "
            f"found {tuple(blocks.shape)} of {blocks.dtype}"
        )
    return blocks.contiguous()
