"""The computation inside attention, softmax(QKᵀ·scale + bias)V, in several ways that give the same numbers.

`Sdpa` leaves it to PyTorch and has the whole mask made, where there is one. `Tiled` and `Flash` are exact attention in
tiles (Dao et al. 2022): memory linear in length, no mask of all queries and keys, queries that see nothing give zeros.

| kernel | runs on | learned biases | dropout of the weights |
|---|---|---|---|
| `Sdpa` | every device | yes | yes |
| `Tiled` | every device | yes, tile by tile | no |
| `Flash` | CUDA; elsewhere under Triton's interpreter | no: slopes only | no |

Shapes: B rows, T queries, S keys, H heads, D = head_dim. Keys and values may have fewer heads, each shared by as many
heads of queries that follow one another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from allyouneed import core
from allyouneed.nn.recomputed import attend
from allyouneed.nn.tiled import PlainTiles
from allyouneed.nn.view import View


@dataclass(frozen=True, kw_only=True)
class Sdpa(core.Config):
    """PyTorch's `scaled_dot_product_attention`, which picks a kernel by device and mask.

    >>> import torch
    >>> from allyouneed.nn.sight import whole_rows
    >>> from allyouneed.nn.positions import Positions
    >>> q = torch.randn(1, 2, 5, 4)
    >>> view = whole_rows(Positions.Config().build(dim=8, num_heads=2, head_dim=4, context=8), q[0, 0][None]).view(None)
    >>> torch.allclose(Sdpa()(q, q, q, view), Tiled()(q, q, q, view), atol=1e-6)
    True
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, view: View, *, scale: float | None = None, dropout: float = 0.0
    ) -> Tensor:
        """(B, H, T, D), (B, H, S, D), (B, H, S, D) -> (B, H, T, D). `scale` None: 1/√D."""
        mask = view.mask
        if mask is not None and mask.requires_grad and mask.device.type == "cpu":
            # a learned bias: no fused kernel has its gradient here, and what PyTorch falls back on costs more than this
            weights = attention_weights(q, k, mask, scale=scale)
            return F.dropout(weights, dropout) @ for_all_heads(v, q.shape[1])
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask.to(q.dtype),
            is_causal=view.causal and mask is None and q.shape[2] > 1,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=k.shape[1] < q.shape[1],
        )


@dataclass(frozen=True, kw_only=True)
class Tiled(core.Config):
    """Tiles in PyTorch, for any device and any bias (`nn.tiled`): `queries` × `keys` scores of every head at a time."""

    queries: int = 128  # as fast as any with 1 to 32 rows × heads (benchmarks/attention.py)
    keys: int = 256

    def __post_init__(self) -> None:
        if min(self.queries, self.keys) < 1:
            raise core.InputError(f"kernel Tiled: tiles of {self.queries} × {self.keys}; at least 1 × 1 is needed")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, view: View, *, scale: float | None = None, dropout: float = 0.0
    ) -> Tensor:
        """(B, H, T, D), (B, H, S, D), (B, H, S, D) -> (B, H, T, D). `scale` None: 1/√D."""
        _fit(self, q, k, v, dropout)
        return attend(PlainTiles(self.queries, self.keys), q, k, v, view, scale=scale)[0]


@dataclass(frozen=True, kw_only=True)
class Flash(core.Config):
    """Tiles in Triton (`nn.flash`), their sizes tuned by head_dim on the GPU at hand. Needs `allyouneed[triton]`."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, view: View, *, scale: float | None = None, dropout: float = 0.0
    ) -> Tensor:
        """(B, H, T, D), (B, H, S, D), (B, H, S, D) -> (B, H, T, D). `scale` None: 1/√D."""
        _fit(self, q, k, v, dropout)
        try:
            from allyouneed.nn import flash
        except ModuleNotFoundError:
            raise core.InputError("kernel Flash needs Triton: pip install 'allyouneed[triton]', or use Tiled") from None
        return attend(flash.FlashTiles(), q, k, v, view, scale=scale)[0]


AnyKernel = Sdpa | Tiled | Flash


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    """softmax(QKᵀ·scale + mask), spelled out: (B, H, T, D), (B, H, S, D) -> (B, H, T, S)."""
    scores = (scale or q.shape[-1] ** -0.5) * q @ for_all_heads(k, q.shape[1]).transpose(-1, -2)
    return (scores if mask is None else scores + mask.to(q.dtype)).softmax(-1)


def for_all_heads(x: Tensor, num_heads: int) -> Tensor:
    """Keys or values, each repeated for the heads that share it."""
    shared = num_heads // x.shape[1]
    return x.repeat_interleave(shared, 1) if shared > 1 else x


def _fit(kernel: core.Config, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> None:
    """Refuse what a kernel in tiles would compute wrongly."""
    name = type(kernel).__name__
    if dropout:
        raise core.InputError(f"kernel {name} has no dropout of the attention weights; dropout={dropout:g} needs Sdpa")
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        sizes = ", ".join(str(x.shape[-1]) for x in (q, k, v))
        raise core.InputError(f"kernel {name}: queries, keys and values have head_dim {sizes}; one is wanted")
    if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
        heads = ", ".join(str(x.shape[1]) for x in (q, k, v))
        raise core.InputError(f"kernel {name}: queries, keys and values have {heads} heads; keys' must divide queries'")
