"""Ways to tell a model where its tokens stand.

A model owns one `Positions`, which acts at up to three places, each the identity unless a part overrides it:
on the embeddings (`embed`), on queries and keys (`turn`), on the attention scores (`bias`).

Shapes: B rows, T queries, S keys, H heads, D = head_dim. Positions are counted from 0 within each document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from allyouneed import core

Rotation = tuple[Tensor, Tensor]  # cos (B, 1, T, D), 1 where nothing turns, and sin (B, 1, T, rotated/2)


class Positions(core.Configured, nn.Module):
    """No positions at all: order is known only through the causal mask (Haviv et al. 2022).

    >>> part = Positions.Config().build(dim=8, num_heads=2, head_dim=4, context=16)
    >>> part.bias(torch.arange(3)[None], torch.arange(3)[None])
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """Nothing to choose."""

    def __init__(self, config: core.Config, *, dim: int, num_heads: int, head_dim: int, context: int) -> None:
        super().__init__()

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add positions (B, T) to embeddings (B, T, dim)."""
        return x

    def rotation(self, positions: Tensor) -> Rotation | None:
        """What `turn` needs for positions (B, T), computed once for all layers."""
        return None

    def turn(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """Turn queries or keys (B, H, T, D)."""
        return x

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """What is added to the scores of queries at (B, T) for keys at (B, S): (B, H, T, S), or None for nothing."""
        return None

    def slopes(self) -> Tensor | None:
        """The bias in one number m a head, (H,), where it is −m · (query − key), for kernels that make no bias."""
        return None


class Learned(Positions):
    """A learned vector per position, added to the embeddings (Radford et al. 2018; Devlin et al. 2019).

    >>> part = Learned.Config().build(dim=8, num_heads=2, head_dim=4, context=16)
    >>> part.embed(torch.zeros(1, 3, 8), torch.arange(3)[None]).shape
    torch.Size([1, 3, 8])
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """Nothing to choose: as many vectors as the context is long."""

    def __init__(self, config: core.Config, *, dim: int, num_heads: int, head_dim: int, context: int) -> None:
        super().__init__(config, dim=dim, num_heads=num_heads, head_dim=head_dim, context=context)
        self.embedding = nn.Embedding(context, dim)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """x + P[position]."""
        return x + self.embedding(positions)


class Sinusoidal(Positions):
    """sin and cos of position/10000^(2i/dim), added to the embeddings (Vaswani et al. 2017, sec. 3.5).

    Sines fill the even dimensions and cosines the odd ones, as in the paper's formula. Their mean square is 1/2, which
    drowns embeddings that are much smaller: the paper's model multiplies its own by √dim.

    >>> part = Sinusoidal.Config().build(dim=8, num_heads=2, head_dim=4, context=16)
    >>> part.embed(torch.zeros(1, 1, 8), torch.tensor([[0]])).tolist()
    [[[0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]]]
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`base` is the longest wavelength over 2π."""

        base: float = 10000.0

    def __init__(self, config: Config, *, dim: int, num_heads: int, head_dim: int, context: int) -> None:
        super().__init__(config, dim=dim, num_heads=num_heads, head_dim=head_dim, context=context)
        self.dim, self.base = dim, config.base

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """x + PE(position); any position, however far."""
        angles = _angles(positions, self.dim, self.base)
        return x + torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).to(x.dtype)


class SinesThenCosines(Sinusoidal):
    """The same numbers in another order: sines in the first half of the dimensions, cosines in the second.

    So tensor2tensor, the authors' code, and Marian have it (Junczys-Dowmunt et al. 2018). It is no other model, but
    other checkpoints.

    >>> part = SinesThenCosines.Config().build(dim=8, num_heads=2, head_dim=4, context=16)
    >>> part.embed(torch.zeros(1, 1, 8), torch.tensor([[0]])).tolist()
    [[[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]]
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Sinusoidal.Config):
        """As of sinusoidal positions."""

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """x + PE(position); any position, however far."""
        angles = _angles(positions, self.dim, self.base)
        return x + torch.cat((angles.sin(), angles.cos()), -1).to(x.dtype)


class Rotary(Positions):
    """Queries and keys turned by an angle that grows with position (Su et al. 2021, sec. 3.2).

    Pairs are dimension i and i + rotated/2, the layout of the Hugging Face checkpoints.

    >>> part = Rotary.Config().build(dim=8, num_heads=2, head_dim=4, context=16)
    >>> x = torch.randn(1, 2, 3, 4)
    >>> turned = part.turn(x, part.rotation(torch.arange(3)[None]))
    >>> torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
    True
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`fraction` of each head's dimensions is turned (Pythia: 0.25)."""

        base: float = 10000.0
        fraction: float = 1.0

    def __init__(self, config: Config, *, dim: int, num_heads: int, head_dim: int, context: int) -> None:
        super().__init__(config, dim=dim, num_heads=num_heads, head_dim=head_dim, context=context)
        self.rotated, self.head_dim, self.base = int(head_dim * config.fraction), head_dim, config.base
        if self.rotated % 2:
            raise core.InputError(
                f"rotary positions turn pairs, but {self.rotated} of head_dim={head_dim} are to be turned"
            )

    def frequencies(self) -> Tensor:
        """base^(−2i/rotated) of each pair, (rotated/2), in float32."""
        return _frequencies(self.rotated, self.base)

    def rotation(self, positions: Tensor) -> Rotation:
        """cos and sin of position · base^(−2i/rotated), in float32."""
        angles = _angles(positions, self.rotated, self.base)[:, None]
        cos = angles.cos()
        return torch.cat((cos, cos, cos.new_ones((*cos.shape[:-1], self.head_dim - self.rotated))), -1), angles.sin()

    def turn(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """Turn the first `rotated` dimensions of each head."""
        assert rotation is not None
        if not x.requires_grad:
            return _rotate(x, *rotation)
        turned: Tensor = Turned.apply(x, *rotation)
        return turned


class Alibi(Positions):
    """Scores lowered in proportion to distance, each head with its own slope (Press et al. 2022, sec. 3).

    For head counts n that are no power of two: the slopes of the next lower power of two, then every other slope of
    the next higher one, as in the authors' code.

    >>> Alibi.Config().build(dim=8, num_heads=4, head_dim=2, context=16).slopes().tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """Nothing to choose: the slopes are fixed by the number of heads."""

    def __init__(self, config: core.Config, *, dim: int, num_heads: int, head_dim: int, context: int) -> None:
        super().__init__(config, dim=dim, num_heads=num_heads, head_dim=head_dim, context=context)
        self.num_heads, self.heads = num_heads, slice(None)

    def narrow(self, index: int, of: int) -> None:
        """Lower the scores of the `index`-th of `of` equal runs of heads only, those of one tensor rank."""
        run = self.num_heads // of
        self.heads = slice(index * run, (index + 1) * run)

    def slopes(self) -> Tensor:
        """m_h = 2^(−8h/n) for h = 1 … n, of the heads that are computed here: (H,)."""
        lower = 2 ** math.floor(math.log2(self.num_heads))
        whole = [2 ** (-8 * h / lower) for h in range(1, lower + 1)]
        between = [2 ** (-4 * h / lower) for h in range(1, 2 * lower + 1, 2)]
        return torch.tensor((whole + between)[: self.num_heads][self.heads])

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        """−m_h · (query − key)."""
        distance = queries[:, None, :, None] - keys[:, None, None, :]
        return self.slopes().to(queries.device)[:, None, None] * -distance


class RelativeBias(Positions):
    """A learned bias per head and bucket of distance, shared by all layers (Raffel et al. 2020, sec. 2.1).

    Half of the buckets hold exact distances, the other half grow logarithmically up to `max_distance`, beyond which all
    distances share one bucket. This is the causal form: keys after the query fall into bucket 0.

    >>> part = RelativeBias.Config().build(dim=8, num_heads=2, head_dim=4, context=16)
    >>> part.bias(torch.arange(3)[None], torch.arange(5)[None]).shape
    torch.Size([1, 2, 3, 5])
    """

    by_columns, by_rows = ("embedding",), ()  # tensor ranks hold the biases of their own heads (`train.mesh`)

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """T5's numbers."""

        num_buckets: int = 32
        max_distance: int = 128

    def __init__(self, config: Config, *, dim: int, num_heads: int, head_dim: int, context: int) -> None:
        super().__init__(config, dim=dim, num_heads=num_heads, head_dim=head_dim, context=context)
        self.num_buckets, self.max_distance = config.num_buckets, config.max_distance
        self.embedding = nn.Embedding(config.num_buckets, num_heads)

    def divisible(self) -> Mapping[str, int]:
        """What the number of tensor ranks has to divide."""
        return {"num_heads": self.embedding.embedding_dim}

    def buckets(self, distance: Tensor) -> Tensor:
        """The bucket of each distance query − key."""
        return _bucket(distance.clamp(min=0), self.num_buckets, self.max_distance)

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        """E[bucket(query − key)]."""
        return self.embedding(self.buckets(queries[:, :, None] - keys[:, None, :])).permute(0, 3, 1, 2)


class RelativeBiasBothWays(RelativeBias):
    """The form of encoders: half of the buckets are for keys up to the query, the other half for those after it.

    >>> part = RelativeBiasBothWays.Config().build(dim=8, num_heads=2, head_dim=4, context=16)
    >>> part.buckets(torch.tensor([1, 0, -1])).tolist()
    [1, 0, 17]
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RelativeBias.Config):
        """As of the causal form."""

    def buckets(self, distance: Tensor) -> Tensor:
        """The bucket of each distance query − key."""
        half = self.num_buckets // 2
        return torch.where(distance < 0, half, 0) + _bucket(distance.abs(), half, self.max_distance)


AnyPositions = (
    Positions.Config
    | Learned.Config
    | Sinusoidal.Config
    | SinesThenCosines.Config
    | Rotary.Config
    | Alibi.Config
    | RelativeBias.Config
    | RelativeBiasBothWays.Config
)


def _bucket(distance: Tensor, count: int, max_distance: int) -> Tensor:
    """Distances from 0 on in `count` buckets: exact up to count/2, then logarithmic up to `max_distance`."""
    exact = count // 2
    grown = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (grown * (count - exact)).long()).clamp(max=count - 1)
    return torch.where(distance < exact, distance, far)


def _angles(positions: Tensor, dim: int, base: float) -> Tensor:
    """position · base^(−2i/dim) for i < dim/2: (B, T) -> (B, T, dim/2), float32."""
    return positions[..., None].float() * _frequencies(dim, base, positions.device)


def _frequencies(dim: int, base: float, device: torch.device | str = "cpu") -> Tensor:
    return base ** -(torch.arange(0, dim, 2, device=device).float() / dim)


class Turned(torch.autograd.Function):
    """`_rotate` with its gradient, which is the same turn the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, H, T, D) -> the same."""
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Of x; the angles are given."""
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = slice(sin.shape[-1]), slice(sin.shape[-1], 2 * sin.shape[-1])
    turned = x * cos
    turned[..., left].addcmul_(x[..., right], sin, value=-1)
    turned[..., right].addcmul_(x[..., left], sin)
    return turned.to(x.dtype)
