"""Linear layers and embeddings with weights in blocks of codes of 4 or 8 bits (`nn.blockwise`), computed with in fp32.

Weights are frozen; gradients reach the input. Nothing of the weight is kept unpacked: backward unpacks it again
(Dettmers et al. 2023, eq. 5 and 6). On a CPU the native kernels unpack (`native/quantised.cpp`), a few rows at a time
where there are few rows of the input; elsewhere, and where rows are not of whole blocks, PyTorch does.

Shapes: N outputs, K inputs, M rows of the input.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from allyouneed.core.errors import InputError
from allyouneed.nn import native
from allyouneed.nn.blockwise import Blocks, Scales, blockwise
from allyouneed.nn.codebooks import BOOKS, DYNAMIC

FEW = 64  # rows of the input up to which a weight is unpacked a few rows at a time instead of as a whole


class QuantisedWeight(nn.Module):
    """A matrix (N, K) in blocks, its parts buffers, which a layer and an embedding may share.

    >>> weight = QuantisedWeight(blockwise(torch.eye(64), "nf4", double=False))
    >>> torch.equal(weight.dequantised(), torch.eye(64))
    True
    """

    codes: Tensor
    scales: Tensor  # bits of fp32 as integers, so that a change of the module's dtype leaves them alone
    scale_codes: Tensor | None
    offset: Tensor | None

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.kind, self.block, self.shape = blocks.kind, blocks.block, blocks.shape
        scales = blocks.scales
        self.register_buffer("codes", blocks.codes)
        self.register_buffer("scales", scales.values.view(torch.int32))
        self.register_buffer("scale_codes", scales.codes)
        self.register_buffer("offset", None if scales.offset is None else scales.offset.view(torch.int32))

    @property
    def blocks(self) -> Blocks:
        """The codes and scales, as they lie here."""
        offset = None if self.offset is None else self.offset.view(torch.float32)
        scales = Scales(self.scales.view(torch.float32), self.scale_codes, offset)
        return Blocks(self.kind, self.block, self.shape, self.codes, scales)

    def dequantised(self) -> Tensor:
        """W (N, K) fp32: exactly the numbers that are stored."""
        kernels = self._kernels()
        if kernels is None:
            return self.blocks.dequantised()
        out = self.codes.new_empty(self.shape, dtype=torch.float32)
        kernels.quantised_unpack(*self._places(), out.data_ptr(), out.numel(), torch.get_num_threads())
        return out

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ, (…, K) -> (…, N), unseen by autograd.

        Raises:
            ValueError: x has not K features.
        """
        *rows, features = x.shape
        if features != self.shape[1]:  # the kernels would read beyond x
            raise ValueError(f"x has {features} features where the layer takes {self.shape[1]}")
        kernels, count = self._kernels(), math.prod(rows)
        if kernels is None or count > FEW or not x.is_cpu:
            with torch.autocast(x.device.type, enabled=False):  # in fp32 as the kernels are, however many the rows
                return F.linear(x.float(), self.dequantised()).to(x.dtype)
        values = x.float().contiguous()
        y = values.new_empty((*rows, self.shape[0]))
        sizes = count, *self.shape
        kernels.quantised_linear(*self._places(), values.data_ptr(), y.data_ptr(), *sizes, torch.get_num_threads())
        return y.to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W by their numbers: (…) integers -> (…, K) fp32."""
        return self.blocks.rows(ids)

    def extra_repr(self) -> str:
        """What `repr` shows of the matrix."""
        return f"{tuple(self.shape)}, {self.kind}, block={self.block}, double={self.scale_codes is not None}"

    def _kernels(self) -> ctypes.CDLL | None:
        return native.library() if self.codes.is_cpu and self.shape[1] % self.block == 0 else None

    def _places(self) -> tuple[int | None, ...]:
        """What the kernels take of a weight."""
        book, double = BOOKS[self.kind], self.scale_codes is not None
        parts = (
            self.codes,
            book.values,
            self.scales,
            self.scale_codes,
            DYNAMIC.values if double else None,
            self.offset,
        )
        return book.bits, self.block, *(None if part is None else part.data_ptr() for part in parts)


class QuantisedLinear(nn.Module):
    """x Wᵀ + b with W (N, K) in blocks: `F.linear(x, self.dequantised(), bias)` up to the rounding of fp32.

    >>> layer = QuantisedLinear.of(nn.Linear(64, 3), "nf4")
    >>> layer(torch.ones(2, 64)).shape, list(layer.parameters())
    (torch.Size([2, 3]), [])
    """

    bias: Tensor | None

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None = None) -> None:
        """`bias` (N,)."""
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, layer: nn.Linear, kind: str, block: int = 64, *, double: bool = True) -> QuantisedLinear:
        """The layer with its weight stored in `kind`; see `blockwise`."""
        bias = None if layer.bias is None else layer.bias.detach()
        return cls(QuantisedWeight(blockwise(layer.weight, kind, block, double=double)), bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) -> (…, N) in x's dtype; computed in fp32."""
        seen = x.requires_grad and torch.is_grad_enabled()
        y = cast(Tensor, _Product.apply(x, self.weight)) if seen else self.weight.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantised(self) -> Tensor:
        """W (N, K) fp32: exactly the numbers that are stored."""
        return self.weight.dequantised()


class QuantisedEmbedding(nn.Module):
    """Rows of a table (N, K) in blocks; only the rows asked for are unpacked. `weight` may be a tied head's.

    >>> table = QuantisedEmbedding(QuantisedWeight(blockwise(torch.ones(5, 64), "int8", double=False)))
    >>> table(torch.tensor([[4, 0, 4]])).shape
    torch.Size([1, 3, 64])
    """

    def __init__(self, weight: QuantisedWeight) -> None:
        super().__init__()
        self.weight = weight
        self.num_embeddings, self.embedding_dim = weight.shape
        if self.embedding_dim % weight.block:
            raise InputError(
                f"block={weight.block}: rows of an embedding of {self.embedding_dim} numbers are not of whole blocks; "
                "choose a smaller block, or leave embeddings as they are"
            )

    def forward(self, ids: Tensor) -> Tensor:
        """(…) integers -> (…, K) fp32."""
        return self.weight.rows(ids)


class _Product(torch.autograd.Function):
    """x Wᵀ with a gradient for x; W is frozen and unpacked anew for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantisedWeight) -> Tensor:
        ctx.weight = weight
        return weight.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return (gradient.float() @ ctx.weight.dequantised()).to(gradient.dtype), None
