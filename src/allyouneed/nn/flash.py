"""FlashAttention in Triton: the tiles of `nn.tiled` as three kernels, for GPUs.

Forward is algorithm 1 of Dao et al. 2022 with its loops exchanged (Dao 2023, sec. 3.1): each program holds one block of
queries and goes through the keys. Backward is algorithm 4 in two kernels, one that holds a block of keys and gathers dK
and dV, one that holds a block of queries and gathers dQ. The scores are computed twice, but nothing is added
atomically, so gradients are the same bits in each run. Which tiles a block needs is read from the intervals of the
view: causal, banded, packed and cached sight all skip what they do not see.

Inputs are multiplied in their own type. P and dS, which are results, are not rounded to it: with bfloat16 that alone
costs 3e-3 to 6e-3 of the largest element. Their products are taken in TF32, which has float16's digits (8e-4), and with
float32 inputs in float32. Results come in float32.

`TRITON_INTERPRET=1`, set before the first use, runs the kernels on a CPU, slowly. Triton 3.9's interpreter multiplies
bfloat16 as whole numbers, so there the factors are widened first, which is exact; and where a GPU uses TF32 it uses
float32.

Shapes: B rows, T queries, S keys, H heads, K heads of keys, D = head_dim (in kernels the next power of two); M × N a
tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from allyouneed import core
from allyouneed.nn.view import View

INTERPRETED = triton.knobs.runtime.interpret
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
LARGEST = 256  # head_dim, beyond which no tile fits into shared memory
LOG2_E = tl.constexpr(1.4426950408889634)


def _tunings(*blocks: tuple[int, int, int, int]) -> list[triton.Config]:
    """Tiles to try, each (M, N, warps, stages). The interpreter cannot time them and takes the first."""
    found = [triton.Config({"M": m, "N": n}, num_warps=warps, num_stages=stages) for m, n, warps, stages in blocks]
    return found[:1] if INTERPRETED else found


def _fitting(tunings: list[triton.Config], given: dict[str, Any], **named: Any) -> list[triton.Config]:
    """Those worth trying: wide heads leave room for small tiles only, and few queries fill no more than 16 rows."""
    given = given | named
    most = 24 * 1024 // (given["D"] * (2 if given["PRECISION"] == "ieee" else 1))
    right = [t for t in tunings if (t.kwargs["M"] == 16) == given["SHORT"]]
    return [t for t in right if t.kwargs["M"] + t.kwargs["N"] <= most] or tunings[:1]


KEY = ["D", "PRECISION", "SLOPES", "SHARED", "SHORT"]
SHORT = ((16, 16, 4, 1), (16, 64, 4, 2), (16, 128, 4, 2))
FORWARD = _tunings(*SHORT, (128, 64, 4, 2), (128, 128, 8, 1), (128, 32, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2))
BACKWARD = _tunings(*SHORT, (64, 64, 4, 1), (128, 64, 8, 1), (64, 128, 8, 1), (32, 64, 4, 2), (32, 32, 4, 2))


@triton.jit
def _tile(pointer, rows, stride, dims, length, head_dim):
    """Rows of a matrix, zeros beyond its end: (M, D)."""
    inside = (rows[:, None] < length) & (dims[None, :] < head_dim)
    return tl.load(pointer + rows[:, None].to(tl.int64) * stride + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _bounds(bounds, rows, length, step, SHARED: tl.constexpr):
    """The intervals of queries, empty beyond the last one."""
    inside = rows < length
    first = tl.load(bounds + rows, mask=inside, other=0)
    last = tl.load(bounds + step + rows, mask=inside, other=0)
    shared_first, shared_last = first, last
    if SHARED:
        shared_first = tl.load(bounds + 2 * step + rows, mask=inside, other=0)
        shared_last = tl.load(bounds + 3 * step + rows, mask=inside, other=0)
    return first, last, shared_first, shared_last


@triton.jit
def _reach(first, last, shared_first, shared_last, total):
    """The first key that any of these queries sees, and the one after the last."""
    low = tl.minimum(tl.where(first < last, first, total), tl.where(shared_first < shared_last, shared_first, total))
    high = tl.maximum(tl.where(first < last, last, 0), tl.where(shared_first < shared_last, shared_last, 0))
    return tl.min(low, 0), tl.max(high, 0)


@triton.jit
def _forward(
    q, k, v, out, level, bounds, places, key_places, slopes,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    length, total, step, num_heads, sharing, head_dim, scale,
    D: tl.constexpr, PRECISION: tl.constexpr, SLOPES: tl.constexpr, SHARED: tl.constexpr, SHORT: tl.constexpr,
    FACTOR: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One block of queries: its output (T, D) and the logsumexp of its scores."""
    row, head = (tl.program_id(0) // num_heads).to(tl.int64), (tl.program_id(0) % num_heads).to(tl.int64)
    rows, dims = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, D)
    query = _tile(q + row * q_row + head * q_head, rows, q_token, dims, length, head_dim).to(FACTOR)
    k += row * k_row + head // sharing * k_head
    v += row * v_row + head // sharing * v_head
    first, last, shared_first, shared_last = _bounds(bounds + row * length, rows, length, step, SHARED)
    low, high = _reach(first, last, shared_first, shared_last, total)
    if SLOPES:
        slope = tl.load(slopes + head) * LOG2_E
        place = tl.load(places + row * length + rows, mask=rows < length, other=0)
    highest = tl.full((M,), float("-inf"), tl.float32)
    sum_ = tl.zeros((M,), tl.float32)
    gathered = tl.zeros((M, D), tl.float32)
    for start in range(low // N * N, high, N):
        columns = start + tl.arange(0, N)
        key = _tile(k, columns, k_token, dims, total, head_dim).to(FACTOR)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E)
        if SLOPES:
            key_place = tl.load(key_places + row * total + columns, mask=columns < total, other=0)
            scores -= slope * (place[:, None] - key_place[None, :]).to(tl.float32)
        seen = (first[:, None] <= columns[None, :]) & (columns[None, :] < last[:, None])
        if SHARED:
            seen |= (shared_first[:, None] <= columns[None, :]) & (columns[None, :] < shared_last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(raised == float("-inf"), 0.0, raised)  # nothing seen yet
        weights, decay = tl.exp2(scores - base[:, None]), tl.exp2(highest - base)
        value = _tile(v, columns, v_token, dims, total, head_dim).to(tl.float32)
        gathered = tl.dot(weights, value, gathered * decay[:, None], input_precision=PRECISION)
        sum_ = sum_ * decay + tl.sum(weights, 1)
        highest = raised
    sum_ = tl.where(sum_ == 0.0, 1.0, sum_)
    inside = rows < length
    tl.store(level + tl.program_id(0).to(tl.int64) * length + rows, (highest + tl.log2(sum_)) / LOG2_E, mask=inside)
    at = ((row * length + rows[:, None]) * num_heads + head) * head_dim + dims[None, :]
    tl.store(out + at, gathered / sum_[:, None], mask=inside[:, None] & (dims[None, :] < head_dim))


@triton.jit
def _gather_queries(
    q, k, v, gradient, level, sums, dq, bounds, places, key_places, slopes,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    length, total, step, num_heads, sharing, head_dim, scale,
    D: tl.constexpr, PRECISION: tl.constexpr, SLOPES: tl.constexpr, SHARED: tl.constexpr, SHORT: tl.constexpr,
    FACTOR: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One block of queries: dQ = scale · dS K."""
    row, head = (tl.program_id(0) // num_heads).to(tl.int64), (tl.program_id(0) % num_heads).to(tl.int64)
    rows, dims = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, D)
    inside, line = rows < length, tl.program_id(0).to(tl.int64) * length + rows
    at = ((row * length + rows[:, None]) * num_heads + head) * head_dim + dims[None, :]
    query = _tile(q + row * q_row + head * q_head, rows, q_token, dims, length, head_dim).to(FACTOR)
    do = tl.load(gradient + at, mask=inside[:, None] & (dims[None, :] < head_dim), other=0.0).to(FACTOR)
    top, mean = tl.load(level + line, mask=inside, other=0.0), tl.load(sums + line, mask=inside, other=0.0)
    top = tl.where(top == float("-inf"), float("inf"), top * LOG2_E)  # 2^(−inf − inf) is 0, 2^(−inf + inf) no number
    k += row * k_row + head // sharing * k_head
    v += row * v_row + head // sharing * v_head
    first, last, shared_first, shared_last = _bounds(bounds + row * length, rows, length, step, SHARED)
    low, high = _reach(first, last, shared_first, shared_last, total)
    if SLOPES:
        slope = tl.load(slopes + head) * LOG2_E
        place = tl.load(places + row * length + rows, mask=inside, other=0)
    gathered = tl.zeros((M, D), tl.float32)
    for start in range(low // N * N, high, N):
        columns = start + tl.arange(0, N)
        key = _tile(k, columns, k_token, dims, total, head_dim)
        value = _tile(v, columns, v_token, dims, total, head_dim).to(FACTOR)
        scores = tl.dot(query, tl.trans(key.to(FACTOR)), input_precision="ieee") * (scale * LOG2_E)
        if SLOPES:
            key_place = tl.load(key_places + row * total + columns, mask=columns < total, other=0)
            scores -= slope * (place[:, None] - key_place[None, :]).to(tl.float32)
        seen = (first[:, None] <= columns[None, :]) & (columns[None, :] < last[:, None])
        if SHARED:
            seen |= (shared_first[:, None] <= columns[None, :]) & (columns[None, :] < shared_last[:, None])
        p = tl.exp2(tl.where(seen, scores, float("-inf")) - top[:, None])
        ds = p * (tl.dot(do, tl.trans(value), input_precision="ieee") - mean[:, None])
        gathered = tl.dot(ds, key.to(tl.float32), gathered, input_precision=PRECISION)
    tl.store(dq + at, gathered * scale, mask=inside[:, None] & (dims[None, :] < head_dim))


@triton.jit
def _gather_keys(
    q, k, v, gradient, level, sums, dk, dv, bounds, places, key_places, slopes,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    length, total, step, num_heads, sharing, head_dim, scale,
    D: tl.constexpr, PRECISION: tl.constexpr, SLOPES: tl.constexpr, SHARED: tl.constexpr, SHORT: tl.constexpr,
    FACTOR: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One block of keys, over all heads of queries that share it: dV = Pᵀ dO, dK = scale · dSᵀ Q. Tiles lie N × M."""
    num_kv_heads = num_heads // sharing
    row, kv_head = (tl.program_id(0) // num_kv_heads).to(tl.int64), (tl.program_id(0) % num_kv_heads).to(tl.int64)
    columns, dims = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, D)
    key = _tile(k + row * k_row + kv_head * k_head, columns, k_token, dims, total, head_dim).to(FACTOR)
    value = _tile(v + row * v_row + kv_head * v_head, columns, v_token, dims, total, head_dim).to(FACTOR)
    bounds += row * length
    begin, end = length, 0  # of the queries that see any of these keys
    for start in range(0, length, M):
        first, last, shared_first, shared_last = _bounds(bounds, start + tl.arange(0, M), length, step, SHARED)
        low, high = _reach(first, last, shared_first, shared_last, total)
        if (low < tl.program_id(1) * N + N) & (high > tl.program_id(1) * N):
            begin, end = tl.minimum(begin, start), start + M
    if SLOPES:
        key_place = tl.load(key_places + row * total + columns, mask=columns < total, other=0)
    keys_gathered, values_gathered = tl.zeros((N, D), tl.float32), tl.zeros((N, D), tl.float32)
    for head in range(kv_head * sharing, kv_head * sharing + sharing):
        if SLOPES:
            slope = tl.load(slopes + head) * LOG2_E
        for start in range(begin, end, M):
            rows = start + tl.arange(0, M)
            inside, line = rows < length, (row * num_heads + head) * length + rows
            query = _tile(q + row * q_row + head * q_head, rows, q_token, dims, length, head_dim)
            at = ((row * length + rows[:, None]) * num_heads + head) * head_dim + dims[None, :]
            do = tl.load(gradient + at, mask=inside[:, None] & (dims[None, :] < head_dim), other=0.0)
            top, mean = tl.load(level + line, mask=inside, other=0.0), tl.load(sums + line, mask=inside, other=0.0)
            top = tl.where(top == float("-inf"), float("inf"), top * LOG2_E)
            first, last, shared_first, shared_last = _bounds(bounds, rows, length, step, SHARED)
            scores = tl.dot(key, tl.trans(query.to(FACTOR)), input_precision="ieee") * (scale * LOG2_E)
            if SLOPES:
                place = tl.load(places + row * length + rows, mask=inside, other=0)
                scores -= slope * (place[None, :] - key_place[:, None]).to(tl.float32)
            seen = (first[None, :] <= columns[:, None]) & (columns[:, None] < last[None, :])
            if SHARED:
                seen |= (shared_first[None, :] <= columns[:, None]) & (columns[:, None] < shared_last[None, :])
            p = tl.exp2(tl.where(seen, scores, float("-inf")) - top[None, :])
            values_gathered = tl.dot(p, do.to(tl.float32), values_gathered, input_precision=PRECISION)
            ds = p * (tl.dot(value, tl.trans(do.to(FACTOR)), input_precision="ieee") - mean[None, :])
            keys_gathered = tl.dot(ds, query.to(tl.float32), keys_gathered, input_precision=PRECISION)
    at = ((row * total + columns[:, None]) * num_kv_heads + kv_head) * head_dim + dims[None, :]
    inside = (columns[:, None] < total) & (dims[None, :] < head_dim)
    tl.store(dk + at, keys_gathered * scale, mask=inside)
    tl.store(dv + at, values_gathered, mask=inside)


FORWARD_TUNED, QUERIES_TUNED, KEYS_TUNED = (
    triton.autotune(tunings, key=KEY, prune_configs_by={"early_config_prune": _fitting})(kernel)
    for kernel, tunings in ((_forward, FORWARD), (_gather_queries, BACKWARD), (_gather_keys, BACKWARD))
)


@dataclass(frozen=True)
class FlashTiles:
    """Tiles in Triton; as `recomputed.Tiles` asks."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, view: View, scale: float) -> tuple[Tensor, Tensor]:
        """(B, H, T, D), (B, K, S, D), (B, K, S, D) -> (B, H, T, D), (B, H, T), both float32.

        Raises:
            InputError: a device, a type, a head_dim or a bias that the kernels cannot have.
        """
        _check(q, view)
        q, k, v = (_rows(x, q) for x in (q, k, v))
        out = _new(q)
        level = q.new_empty(q.shape[:3], dtype=torch.float32)
        grid, given, constants = _arguments(q, k, v, view, scale)
        with torch.cuda.device_of(q):  # Triton launches on the current device
            FORWARD_TUNED[grid(q.shape[2], "M", q.shape[1])](q, k, v, out, level, *given, **constants)
        return out.transpose(1, 2), level

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
        """Of q, k and v, in float32."""
        assert not learned, "a learned bias is refused before"
        q, k, v = (_rows(x, q) for x in (q, k, v))
        dq, dk, dv = (_new(x) for x in (q, k, v))
        saved = (gradient.transpose(1, 2).contiguous(), logsumexp, sums.float().contiguous())
        grid, given, constants = _arguments(q, k, v, view, scale)
        with torch.cuda.device_of(q):
            QUERIES_TUNED[grid(q.shape[2], "M", q.shape[1])](q, k, v, *saved, dq, *given, **constants)
            KEYS_TUNED[grid(k.shape[2], "N", k.shape[1])](q, k, v, *saved, dk, dv, *given, **constants)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, view: View, scale: float
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What all three kernels are given: a maker of grids, arguments, constants."""
    (batch, heads, length, head_dim), total = q.shape, k.shape[2]
    slopes, bounds = view.slopes, view.bounds(batch, length)
    told: tuple[Any, ...] = (bounds, bounds, bounds, bounds)
    if slopes is not None:
        told = (bounds, *view.places(batch), slopes.to(q.device, torch.float32))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    sizes = (length, total, batch * length, heads, heads // k.shape[1], head_dim, scale)
    exact = q.dtype == torch.float32
    constants = {
        "D": max(16, triton.next_power_of_2(head_dim)),
        "PRECISION": "ieee" if exact else "tf32",
        "SLOPES": slopes is not None,
        "SHARED": len(view.intervals) == 2,
        "SHORT": length <= 16,
        "FACTOR": tl.float32 if INTERPRETED else TYPES[q.dtype],
    }

    def grid(count: int, block: str, columns: int) -> Any:
        return lambda chosen: (batch * columns, triton.cdiv(count, chosen[block]))  # CUDA's y axis ends at 65,535

    return grid, (*told, *strides, *sizes), constants


def _check(q: Tensor, view: View) -> None:
    """Refuse what the kernels cannot have, in one line."""
    why, size = None, q.shape[-1]
    if q.device.type != "cuda" and not INTERPRETED:
        why = f"needs a CUDA device, these tensors are on {q.device.type}"
        raise core.InputError(f"kernel Flash {why}: use Tiled, or TRITON_INTERPRET=1 to try it slowly")
    if q.dtype not in TYPES:
        why = f"takes float32, float16 and bfloat16, not {q.dtype}"
    elif size > LARGEST:
        why = f"takes heads of up to {LARGEST} dimensions, not head_dim={size}"
    elif view.has_bias and view.slopes is None:
        why = f"cannot make the bias of {type(view.part).__name__}, only one of slopes"
    if why:
        raise core.InputError(f"kernel Flash {why}: use Tiled")


def _rows(x: Tensor, q: Tensor) -> Tensor:
    """Of the queries' type, the numbers of a head side by side."""
    x = x.to(q.dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _new(x: Tensor) -> Tensor:
    """Room for results like x (B, H, T, D), the heads of a token side by side, as they are used: (B, T, H, D)."""
    return torch.empty_like(x.transpose(1, 2), dtype=torch.float32, memory_format=torch.contiguous_format)
