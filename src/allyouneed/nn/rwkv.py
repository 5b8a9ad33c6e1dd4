"""RWKV-4's block (Peng et al. 2023, sec. 3): time mixing in attention's place, channel mixing in the feed-forward's.

Both look at the token before (the token shift), time mixing at all before it through two decaying sums (`nn.wkv`); so a
layer remembers six vectors, however long the text. Shapes: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from allyouneed import core
from allyouneed.nn import wkv
from allyouneed.nn.caches import RecurrentState, Rows
from allyouneed.nn.flops import Reading, product
from allyouneed.nn.kernels import AnyKernel
from allyouneed.nn.norms import LayerNorm, Norm
from allyouneed.nn.sight import Sight


class TimeMix(core.Configured, nn.Module):
    """W_o (σ(r) ⊙ wkv) with r, k, v read off μ ⊙ x_t + (1 − μ) ⊙ x_{t−1}, each with its own μ (eq. 11–13, 16–17).

    Channel i forgets by e^{−w_i} a token, w = exp(log_decay), and gives a token's own value e^u more weight.

    >>> part = TimeMix.Config().build(8)
    >>> y, last, state = part(torch.randn(2, 5, 8), Following())
    >>> y.shape, last.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8]), torch.Size([2, 4, 8]))
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """Nothing to choose."""

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.log_decay, self.bonus = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))  # log w, u
        self.mix_r, self.mix_k, self.mix_v = (nn.Parameter(torch.full((dim,), 0.5)) for _ in range(3))  # μ
        self.r, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(
        self, x: Tensor, following: Following, before: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, dim) -> (B, T, dim), and what to go on from.

        Args:
            x: the inputs.
            following: which tokens follow which.
            before: (B, dim) the input before the first; None: zeros.
            state: (B, 4, dim) of `nn.wkv`; None: nothing was read.
        """
        shifted, last = following.shift(x, before)
        r, k, v = (torch.lerp(shifted, x, mix) for mix in (self.mix_r, self.mix_k, self.mix_v))
        w = self.log_decay.to(torch.promote_types(self.log_decay.dtype, torch.float32)).exp()
        seen, state = wkv.wkv(w, self.bonus, self.k(k), self.v(v), state, following.begins, following.counts)
        return self.out(self.r(r).sigmoid() * seen), last, state

    def flops(self, reading: Reading) -> int:
        """Of its four layers; the weighted sum itself takes no matrix products."""
        return sum(product(layer, reading.tokens) for layer in (self.r, self.k, self.v, self.out))


class ChannelMix(core.Configured, nn.Module):
    """σ(r) ⊙ W_v max(k, 0)² with r, k read off the token and the one before (eq. 14, 15, 18).

    >>> y, last = ChannelMix.Config(hidden_dim=32).build(8)(torch.randn(2, 5, 8), Following())
    >>> y.shape, last.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8]))
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """The size of k; the paper's is 4·dim."""

        hidden_dim: int

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.mix_r, self.mix_k = (nn.Parameter(torch.full((dim,), 0.5)) for _ in range(2))
        self.r, self.k = nn.Linear(dim, dim, bias=False), nn.Linear(dim, config.hidden_dim, bias=False)
        self.out = nn.Linear(config.hidden_dim, dim, bias=False)

    def forward(self, x: Tensor, following: Following, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, dim) -> (B, T, dim), and the input to go on from; arguments as of `TimeMix`."""
        shifted, last = following.shift(x, before)
        r, k = (torch.lerp(shifted, x, mix) for mix in (self.mix_r, self.mix_k))
        return self.r(r).sigmoid() * self.out(_squared(self.k(k))), last

    def flops(self, reading: Reading) -> int:
        """Of its three layers."""
        return sum(product(layer, reading.tokens) for layer in (self.r, self.k, self.out))


def _squared(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    squared: Tensor = _SquaredReLU.apply(x)
    return squared


class _SquaredReLU(torch.autograd.Function):
    """max(x, 0)² and its gradient 2·max(x, 0): half the passes over memory that PyTorch makes of the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (gradient * positive).mul_(2)


@dataclass(frozen=True)
class Following:
    """Which tokens follow the one at their left: all, but those where `begins` (B, T); of each row the first `counts`
    (B) are read for good, None: all.

    >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> Following().shift(x)[0].flatten().tolist()
    [0.0, 1.0, 2.0]
    """

    begins: Tensor | None = None
    counts: Tensor | None = None

    def shift(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """For each token of (B, T, dim) the one before it, and each row's last, (B, dim)."""
        before = torch.zeros_like(x[:, 0]) if before is None else before
        extended = torch.cat((before[:, None], x), 1)
        shifted = extended[:, :-1]
        if self.begins is not None:
            shifted = torch.where(self.begins[..., None], before[:, None], shifted)
        if self.counts is None:
            return shifted, x[:, -1].clone()  # a view would keep all of x
        return shifted, extended[torch.arange(len(x), device=x.device), self.counts]


class RWKVBlock(core.Configured, nn.Module):
    """Two residual branches with norms before them: `mixer` over tokens, `channel` over each and the one before it.

    >>> from allyouneed.nn.positions import Positions
    >>> from allyouneed.nn.sight import whole_rows
    >>> block = RWKVBlock.Config(channel=ChannelMix.Config(hidden_dim=32)).build(8)
    >>> x = torch.randn(2, 5, 8)
    >>> block(x, whole_rows(Positions.Config().build(dim=8, num_heads=1, head_dim=8, context=5), x)).shape
    torch.Size([2, 5, 8])
    """

    remembers_all = False  # what it keeps of a text does not grow with it

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """The parts; `dropout` is applied to each branch's output."""

        mixer: TimeMix.Config = field(default_factory=TimeMix.Config)
        channel: ChannelMix.Config
        norm: Norm = field(default_factory=LayerNorm.Config)
        dropout: float = 0.0

        def heads(self, dim: int) -> None:
            """There are none."""

        def with_kernel(self, kernel: AnyKernel) -> Self:
            """The same block: it has no attention to compute another way."""
            return self

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.dim, self.dropout = dim, config.dropout
        self.mixer_norm, self.mixer = config.norm.build(dim), config.mixer.build(dim)
        self.channel_norm, self.channel = config.norm.build(dim), config.channel.build(dim)

    def forward(self, x: Tensor, sight: Sight, cache: RecurrentState | None = None) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        mixed_before, channel_before, state = (None, None, None) if cache is None else cache.before
        following = Following(sight.begins, None if cache is None else cache.rows.counts)
        y, mixed_last, state = self.mixer(self.mixer_norm(x), following, mixed_before, state)
        x = x + F.dropout(y, self.dropout, self.training)
        y, channel_last = self.channel(self.channel_norm(x), following, channel_before)
        if cache is not None:
            cache.leave(mixed_last, channel_last, state)
        return x + F.dropout(y, self.dropout, self.training)

    def new_cache(self, rows: Rows, capacity: int, dtype: torch.dtype) -> RecurrentState:
        """What it remembers of `rows` of which nothing was read; the same size for any `capacity`."""
        batch, device = len(rows.lengths), rows.lengths.device
        last = torch.zeros(batch, self.dim, dtype=dtype, device=device)
        return RecurrentState(rows, last, last, wkv.empty(batch, self.dim, device, dtype))

    def flops(self, reading: Reading) -> int:
        """Of its mixers."""
        return self.mixer.flops(reading) + self.channel.flops(reading)
