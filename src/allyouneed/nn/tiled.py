"""Exact attention in tiles, in PyTorch, with memory linear in length (Dao et al. 2022; the order of Dao 2023).

Forward, for each block of queries, one block of keys after another: the softmax is corrected as its maximum rises, so
that no row of scores is ever whole (Milakov & Gimelshein 2018; algorithm 1 of the paper). Backward, each tile is
computed again from the logsumexp of its rows (algorithm 4). Biases of positions are made tile by tile, and so are the
gradients of learned ones.

Shapes: B rows, T queries, S keys, H heads, K heads of keys, G = H/K, D = head_dim; t × s a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from allyouneed.nn.recomputed import wide
from allyouneed.nn.view import View


@dataclass(frozen=True)
class PlainTiles:
    """Tiles of `queries` × `keys` scores of all rows and heads at once; as `recomputed.Tiles` asks.

    >>> from allyouneed.nn.recomputed import attend
    >>> q, none = torch.randn(1, 2, 3, 4), torch.zeros(1, 1, dtype=torch.long)
    >>> attend(PlainTiles(16, 16), q, q, q, View([(none, none)], 3))[0].abs().max().item()
    0.0
    """

    queries: int
    keys: int

    def forward(self, q: Tensor, k: Tensor, v: Tensor, view: View, scale: float) -> tuple[Tensor, Tensor]:
        """(B, H, T, D), (B, K, S, D), (B, K, S, D) -> (B, H, T, D), (B, H, T)."""
        out = torch.empty_like(q.transpose(1, 2), dtype=wide(q)).transpose(1, 2)  # as heads are put together again
        logsumexp = q.new_empty(q.shape[:3], dtype=wide(q))
        for rows, tiles in self._blocks(view, q):
            block, level = _attend(_grouped(q, k, rows) * scale, k, v, view, rows, tiles)
            out[:, :, rows], logsumexp[:, :, rows] = _by_head(block, q), _by_head(level, q)[..., 0]
        return out, logsumexp

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        view: View,
        scale: float,
        gradient: Tensor,
        logsumexp: Tensor,
        sums: Tensor,
        learned: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """Of q, k, v and the learned parameters of the bias."""
        dq, dk, dv = (torch.zeros_like(x, dtype=wide(x)) for x in (q, k, v))
        dlearned = [torch.zeros_like(p) for p in learned]
        for rows, tiles in self._blocks(view, q):
            block, do = _grouped(q, k, rows) * scale, _grouped(gradient, k, rows)
            level, total = (_grouped(x[..., None], k, rows) for x in (logsumexp, sums))
            level = level.masked_fill(level == -torch.inf, torch.inf)  # e^(−inf − inf) is 0, e^(−inf + inf) no number
            for columns, whole in tiles:
                keys, values = _block(k, columns), _block(v, columns)
                p = _scores(block, keys, view, rows, columns, whole).sub_(level).exp_()
                dv[:, :, columns] += p.transpose(-1, -2) @ do
                ds = p.mul_((do @ values.transpose(-1, -2)).sub_(total))
                dq[:, :, rows] += _by_head(ds @ keys, q)
                dk[:, :, columns] += ds.transpose(-1, -2) @ block
                for whole_sum, part in zip(
                    dlearned, _of_bias(_by_head(ds, q), view, rows, columns, learned), strict=True
                ):
                    whole_sum += part
        return (dq.mul_(scale), dk, dv, *dlearned)

    def _blocks(self, view: View, q: Tensor) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
        """Each block of queries and the tiles that it needs."""
        return ((span.rows, span.tiles(self.keys)) for span in view.spans(q.shape[2], self.queries))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, view: View, rows: slice, tiles: list[tuple[slice, bool]]
) -> tuple[Tensor, Tensor]:
    """One block of queries (B, K, G·t, D), already scaled -> its output (B, K, G·t, D) and logsumexp (B, K, G·t, 1)."""
    highest = q.new_full((*q.shape[:-1], 1), -torch.inf)  # m of the paper
    total, out = torch.zeros_like(highest), torch.zeros_like(q)  # ℓ, and O before it is divided by ℓ
    for columns, whole in tiles:
        scores = _scores(q, _block(k, columns), view, rows, columns, whole)
        raised = torch.maximum(highest, scores.amax(-1, keepdim=True))
        level = raised.masked_fill(raised == -torch.inf, 0.0)  # nothing seen yet
        weights, decay = scores.sub_(level).exp_(), (highest - level).exp_()
        total = total.mul_(decay).add_(weights.sum(-1, keepdim=True))
        out = out.mul_(decay).add_(weights @ _block(v, columns))
        highest = raised
    return out / total.masked_fill(total == 0, 1.0), highest + total.log()


def _scores(q: Tensor, keys: Tensor, view: View, rows: slice, columns: slice, whole: bool) -> Tensor:
    """Queries (B, K, G·t, D), already scaled, and keys (B, K, s, D) -> their scores (B, K, G·t, s)."""
    scores = q @ keys.transpose(-1, -2)
    if not whole or view.has_bias:
        by_head = scores.unflatten(2, (-1, rows.stop - rows.start)).flatten(1, 2)
        by_head.add_(view.tile(rows, columns))
    return scores


def _of_bias(ds: Tensor, view: View, rows: slice, columns: slice, learned: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a tile's gradient (B, H, t, s) adds to those of the parameters that made its bias."""
    if not learned:
        return ()
    with torch.enable_grad():
        bias = view.bias(rows, columns)
    assert bias is not None
    return torch.autograd.grad(bias, learned, ds.sum_to_size(bias.shape).to(bias.dtype))


def _grouped(x: Tensor, k: Tensor, rows: slice) -> Tensor:
    """Queries `rows`, those that share keys one after the other: (B, H, T, …) -> (B, K, G·t, …)."""
    return _block(x, rows).unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def _by_head(x: Tensor, q: Tensor) -> Tensor:
    """(B, K, G·t, …) -> (B, H, t, …)."""
    return x.unflatten(2, (q.shape[1] // x.shape[1], -1)).flatten(1, 2)


def _block(x: Tensor, part: slice) -> Tensor:
    return x[:, :, part].to(wide(x))
