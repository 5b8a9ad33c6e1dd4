"""Attention over the row itself and over a memory.

Positions and who sees whom come from `Sight`, remembered tokens from a cache, and what is computed of queries, keys and
values is a kernel's; none of them is chosen here.

Shapes: B rows, T queries, S keys, M tokens of memory, H heads, D = head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from allyouneed import core
from allyouneed.nn.caches import KeyValues, OwnKeyValues, Recalled, Rows
from allyouneed.nn.flops import Reading, product
from allyouneed.nn.kernels import AnyKernel, Sdpa, attention_weights
from allyouneed.nn.sight import Sight
from allyouneed.nn.view import View


class Attention(core.Configured, nn.Module):
    """Multi-head softmax(QKᵀ·scale + bias)V (Vaswani et al. 2017, sec. 3.2).

    Heads share fewer keys and values where `num_kv_heads` says so (Ainslie et al. 2023); sight is banded where `window`
    does (Child et al. 2019; Brown et al. 2020).

    >>> import torch
    >>> from allyouneed.nn.positions import Positions
    >>> from allyouneed.nn.sight import whole_rows
    >>> positions = Positions.Config().build(dim=8, num_heads=2, head_dim=4, context=16)
    >>> x = torch.randn(1, 3, 8)
    >>> Attention.Config(num_heads=2).build(8)(x, whole_rows(positions, x)).shape
    torch.Size([1, 3, 8])
    """

    by_columns, by_rows = ("q", "k", "v"), ("out",)  # how tensor ranks share it: whole heads each (`train.mesh`)

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`head_dim` None: dim / num_heads. `scale` None: 1/√head_dim."""

        num_heads: int
        num_kv_heads: int | None = None  # None: as many as heads
        head_dim: int | None = None
        bias: bool = False  # of queries, keys and values
        out_bias: bool = False
        window: int | None = None  # a token sees itself and window - 1 before it; None: all before it
        scale: float | None = None
        dropout: float = 0.0  # of the attention weights
        kernel: AnyKernel = field(default_factory=Sdpa)

        def head_dim_of(self, dim: int) -> int:
            """The size of a head in a model `dim` wide."""
            if self.head_dim is None and (self.num_heads < 1 or dim % self.num_heads):
                raise core.InputError(
                    f"num_heads={self.num_heads} does not divide dim={dim}; set head_dim or change one"
                )
            return self.head_dim or dim // self.num_heads

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        if min(self.num_heads, self.num_kv_heads) < 1:
            raise core.InputError(f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}; at least 1 is needed")
        if self.num_heads % self.num_kv_heads:
            raise core.InputError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        self.head_dim = config.head_dim_of(dim)
        self.window, self.scale, self.dropout, self.kernel = config.window, config.scale, config.dropout, config.kernel
        self.q = nn.Linear(dim, self.num_heads * self.head_dim, bias=config.bias)
        self.k = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=config.bias)
        self.v = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=config.bias)
        self.out = nn.Linear(self.num_heads * self.head_dim, dim, bias=config.out_bias)

    def forward(self, x: Tensor, sight: Sight, cache: KeyValues | None = None) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        q, k, v = self._heads(self.q(x)), self._heads(self.k(x)), self._heads(self.v(x))
        q, k = sight.turn(q), sight.turn(k)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self._attend(q, k, v, sight.view(self.window))

    def new_cache(self, rows: Rows, capacity: int, dtype: torch.dtype) -> KeyValues:
        """Room for the keys and values of up to `capacity` tokens in each of `rows`."""
        shape = (len(rows.lengths), self.num_kv_heads, capacity, self.head_dim)
        return OwnKeyValues(rows, torch.zeros(shape, dtype=dtype, device=rows.lengths.device))

    def flops(self, reading: Reading) -> int:
        """Of queries, keys, values and what is made of them; scores and their sums, hidden ones too."""
        layers = sum(product(layer, reading.tokens) for layer in (self.q, self.k, self.v, self.out))
        return layers + self._scoring(reading.tokens, reading.keys)

    def _scoring(self, tokens: int, keys: int) -> int:
        """QKᵀ and the weights times V."""
        return 2 * 2 * tokens * keys * self.num_heads * self.head_dim

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
        attended = self.kernel(q, k, v, view, scale=self.scale, dropout=self.dropout if self.training else 0.0)
        return self.out(attended.transpose(1, 2).flatten(2))

    def divisible(self) -> Mapping[str, int]:
        """What the number of tensor ranks has to divide."""
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads·D) -> (B, heads, T, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class CrossAttention(Attention):
    """Queries of the row, keys and values of a memory that every query sees whole (Vaswani et al. 2017, sec. 3.2.3).

    >>> import torch
    >>> from allyouneed.nn.positions import Positions
    >>> from allyouneed.nn.sight import Memory, whole_rows
    >>> positions = Positions.Config().build(dim=8, num_heads=2, head_dim=4, context=16)
    >>> x, memory = torch.randn(1, 3, 8), Memory(torch.randn(1, 5, 8))
    >>> CrossAttention.Config(num_heads=2).build(8)(x, whole_rows(positions, x, memory=memory)).shape
    torch.Size([1, 3, 8])
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        """As of attention; there is no window on a memory."""

    def weights(self, x: Tensor, memory: Tensor) -> Tensor:
        """How much each query of x (B, T, dim) looks at each token of a memory (B, M, dim): (B, H, T, M)."""
        return attention_weights(self._heads(self.q(x)), self._heads(self.k(memory)), scale=self.scale)

    def flops(self, reading: Reading) -> int:
        """Queries of the row, keys and values of the memory."""
        memory = reading.memory
        assert memory is not None, "cross attention without a memory"
        own = sum(product(layer, reading.tokens) for layer in (self.q, self.out))
        theirs = sum(product(layer, memory.tokens) for layer in (self.k, self.v))
        return own + theirs + self._scoring(reading.tokens, memory.keys)

    def forward(self, x: Tensor, sight: Sight, cache: KeyValues | None = None) -> Tensor:
        """(B, T, dim) -> (B, T, dim), reading `sight.memory`, whose keys and values a cache computes once."""
        memory = sight.memory
        assert memory is not None, "cross attention without a memory"

        def project() -> Recalled:
            return self._heads(self.k(memory.states)), self._heads(self.v(memory.states))

        k, v = project() if cache is None else cache.recall(project)
        return self._attend(self._heads(self.q(x)), k, v, memory.view)


def use_kernel(module: nn.Module, kernel: AnyKernel) -> None:
    """Have every attention of a model, a loaded one say, computed by `kernel`; its weights stay as they are.

    >>> from allyouneed.nn.kernels import Tiled
    >>> part = Attention.Config(num_heads=2).build(8)
    >>> use_kernel(part, Tiled())
    >>> part.kernel
    Tiled(queries=128, keys=256)
    """
    for part in module.modules():
        if isinstance(part, Attention):
            part.kernel = kernel
