"""RWKV's weighted sum of values (Peng et al. 2023, eq. 16; app. D for its recurrent form):

wkv_t = (Σ_{i<t} e^{−(t−1−i)w + k_i} v_i + e^{u+k_t} v_t) / (Σ_{i<t} e^{−(t−1−i)w + k_i} + e^{u+k_t}), by channel.

What a token finds of those before it are two sums, kept divided by the largest exponential in them, so that none has an
argument above 0: the state is (a, b, p, n) with Σ e^… v = e^{p − nw} a and Σ e^… = e^{p − nw} b, where p is a key as it
was and n how many tokens ago. One number p, from which each token takes w, would be rounded at every token, within a
power of two always the same way: over 4,096 tokens with keys of 60 the largest error was 1e-3.

`step` is the recurrent form. `wkv` is the parallel one, with a gradient of its own: on a CPU one sweep of
`native/wkv.cpp`, channels side by side; elsewhere chunks of tokens walk side by side, then are joined. The gradient is
a sum of the same kind, from the last token to the first.

Shapes: B rows, T tokens, D channels, C chunks of L tokens; a state is (B, 4, D), fp32 or wider.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from allyouneed import core
from allyouneed.nn import native

Sums = tuple[Tensor, ...]  # a, b, p, n, all of one shape

NOTHING = -1e38  # the exponent of an empty sum; −∞ would make NaN of differences
CHUNK = 32  # tokens: of T = 1,024 as many as chunks, so that neither of the two loops is long


def empty(rows: int, dim: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The state of `rows` rows of which nothing was read, for values of `dtype`, never less than fp32: (rows, 4, dim).

    >>> empty(1, 2)[0, :2].tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    state = torch.zeros(rows, 4, dim, device=device, dtype=torch.promote_types(dtype, torch.float32))
    state[:, 2] = NOTHING
    return state


def step(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: w, u (D), k, v (B, D) and the state before -> what it sees (B, D), and the state after.

    >>> w, u, k, v = torch.ones(2), torch.zeros(2), torch.zeros(1, 2), torch.ones(1, 2)
    >>> step(w, u, k, v, empty(1, 2))[0].tolist()
    [[1.0, 1.0]]
    """
    a, b, p, n = state.unbind(1)
    k, v = k.to(state.dtype), v.to(state.dtype)
    past, now = _weights(((p - k) - n * w) - u)
    after = _joined(w, (a, b, p, n + 1), (v, torch.ones_like(v), k, torch.zeros_like(k)))
    return (past * a + now * v) / (past * b + now), torch.stack(after, 1)


def wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    begins: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What every token sees (B, T, D) in v's dtype, and the state after each row's last.

    Gradients reach w, u, k and v; not the state, which is what was read before.

    Args:
        w: (D) how fast each channel forgets, above 0.
        u: (D) what is added to the exponent of a token's own key.
        k: (B, T, D) keys.
        v: (B, T, D) values.
        state: (B, 4, D) to begin from; None: nothing was read.
        begins: (B, T), or (1, T) for all rows, true at tokens that follow on `state`, not on the token before them.
        counts: (B), how many tokens of each row the state after it is to hold; None: all.

    Raises:
        InputError: `begins` of another shape, or `counts` of another shape or beyond T.

    >>> w, u, k, v = torch.ones(2), torch.zeros(2), torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    >>> wkv(w, u, k, v)[0][0, -1].tolist()
    [1.0, 1.0]
    """
    if state is None:
        state = empty(len(k), k.shape[2], k.device, k.dtype)
    begins = _checked(w, u, k, v, state, begins, counts)
    dtype = v.dtype
    w, u, k, v = (x.to(state.dtype) for x in (w, u, k, v))
    if torch.is_grad_enabled():
        seen, after = _Wkv.apply(w, u, k, v, state, begins, counts)
    else:
        seen, after, _ = _read(w, u, k, v, state, begins, counts, saves=False)
    return seen.to(dtype), after


def _checked(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, begins: Tensor | None, counts: Tensor | None
) -> Tensor | None:
    """`begins` of every row. What stands here the kernels rely on: they are given addresses and sizes, no shapes."""
    rows, length, dim = k.shape
    assert v.shape == k.shape and w.shape == u.shape == (dim,) and state.shape == (rows, 4, dim)
    given = (w, u, v, state, *(x for x in (begins, counts) if x is not None))
    assert all(x.device == k.device for x in given), "all on one device"
    if counts is not None:
        # where the numbers are on a GPU, to read them would wait for it; there the index that takes the states refuses
        inside = not counts.is_cpu or bool(((counts >= 0) & (counts <= length)).all())
        if counts.shape != (rows,) or not inside:
            raise core.InputError(f"counts={counts.tolist()}: for each of {rows} rows one from 0 to {length} is wanted")
    if begins is None:
        return None
    assert begins.dtype is torch.bool
    if begins.shape not in ((rows, length), (1, length)):
        raise core.InputError(f"segments of shape {(*begins.shape,)} for {rows} rows of {length} tokens; give as many")
    return begins.expand(rows, length)


class Read(NamedTuple):
    """What the gradient needs of a pass: `states` (3, B, T, D) are a, b and p − nw as each token found them."""

    w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    states: Tensor
    begins: Tensor | None


class _Wkv(torch.autograd.Function):
    """`wkv`, and its gradient by w, u, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        u: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor,
        begins: Tensor | None,
        counts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        w, u, k, v, state = (x.contiguous() for x in (w, u, k, v, state))
        saves = any(ctx.needs_input_grad)
        seen, after, states = _read(w, u, k, v, state, begins, counts, saves=saves)
        if saves:
            ctx.save_for_backward(w, u, k, v, seen, states)
            ctx.begins = begins
        ctx.mark_non_differentiable(after)
        return seen, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        w, u, k, v, seen, states = ctx.saved_tensors
        read = Read(w, u, k, v, seen, states, ctx.begins)
        kernels = _kernels(gradient)
        if kernels is not None:
            return *_differentiate_natively(kernels, read, gradient.contiguous()), None, None, None
        return *_differentiate_in_chunks(read, gradient), None, None, None


def _kernels(x: Tensor) -> ctypes.CDLL | None:
    real = type(x) is Tensor  # others, those of `train.planner` for one, have no memory to read
    return native.library() if real and x.is_cpu and x.dtype is torch.float32 else None


def _read(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    begins: Tensor | None,
    counts: Tensor | None,
    *,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What every token sees, the states after each row's last, and where they are wanted those each token found."""
    kernels = _kernels(k)
    if kernels is None:
        return _read_in_chunks(w, u, k, v, state, begins, counts)
    w, u, k, v, state = (x.contiguous() for x in (w, u, k, v, state))
    seen, after = torch.empty_like(k), torch.empty_like(state)
    states = k.new_empty(3, *k.shape) if saves else None
    begins = None if begins is None else begins.contiguous()
    counts = None if counts is None else counts.long().contiguous()
    tensors = (w, u, k, v, begins, counts, state, after, seen, states)
    kernels.wkv_read(*k.shape, *(None if x is None else x.data_ptr() for x in tensors), torch.get_num_threads())
    return seen, after, states


def _differentiate_natively(kernels: ctypes.CDLL, read: Read, gradient: Tensor) -> tuple[Tensor, ...]:
    k = read.k
    of_w, of_u = k.new_empty(len(k), k.shape[2]), k.new_empty(len(k), k.shape[2])  # of each row
    of_k, of_v = torch.empty_like(k), torch.empty_like(k)
    begins = None if read.begins is None else read.begins.contiguous()
    tensors = (read.w, read.u, k, read.v, begins, read.seen, read.states, gradient, of_w, of_u, of_k, of_v)
    places = (None if x is None else x.data_ptr() for x in tensors)
    kernels.wkv_differentiate(*k.shape, *places, torch.get_num_threads())
    return of_w.sum(0), of_u.sum(0), of_k, of_v


def _read_in_chunks(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, begins: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    found, last = _scan(w, k, v, torch.ones_like(v), state, begins)
    a, b, p, n = found
    past, now = _weights(((p - k) - n * w) - u)
    seen, states = (past * a + now * v) / (past * b + now), torch.stack((a, b, p - n * w))
    if counts is None:
        return seen, last, states
    after = torch.cat((found.permute(1, 2, 0, 3), last[:, None]), 1)  # by how many tokens were read
    return seen, after[torch.arange(len(k), device=k.device), counts], states


def _differentiate_in_chunks(read: Read, gradient: Tensor) -> tuple[Tensor, ...]:
    """With A = e^p a and B = e^p b before token t and D_t = B + e^{u+k_t} the denominator, the derivatives by the sums
    after it are those by A_{t'} and B_{t'}, 1/D_{t'} and −wkv_{t'}/D_{t'}, of all later tokens t', decayed.
    """
    w, k, v, begins = read.w, read.k, read.v, read.begins
    a, b, p = read.states
    beyond = (p - k) - read.u
    past, now = _weights(beyond)
    most = torch.where(beyond > 0, p, read.u + k)
    scaled = gradient / (past * b + now)  # times e^most
    direct = now * scaled
    through = direct * (v - read.seen)
    turned = None if begins is None else torch.cat((begins[:, 1:], begins[:, :1]), 1).flip(1)
    nothing = empty(len(k), k.shape[2], k.device, k.dtype)
    sums, _ = _scan(w, -most.flip(1), scaled.flip(1), -(scaled * read.seen).flip(1), nothing, turned)
    by_a, by_b, exponent, n = sums.flip(2)
    later, decayed = ((k + exponent) - n * w).exp_(), ((p + exponent) - (n + 1) * w).exp_()
    of_w = -(decayed * (by_a * a + by_b * b)).sum((0, 1))
    return of_w, through.sum((0, 1)), through + later * (by_a * v + by_b), direct + later * by_a


def _scan(
    w: Tensor, exponents: Tensor, first: Tensor, second: Tensor, state: Tensor, begins: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The decaying sums of e^exponent·first and e^exponent·second, all (B, T, D): as each token finds them,
    (4, B, T, D), and after the last, (B, 4, D).

    All chunks walk once from nothing, which gives each one's own share; the shares are joined from chunk to chunk; then
    all walk again from what came before them.
    """
    rows, length, dim = exponents.shape
    excess = -length % CHUNK
    if excess:  # tokens that add nothing; that the sums decay over them touches nothing that is given back
        exponents = torch.nn.functional.pad(exponents, (0, 0, 0, excess), value=NOTHING)
        first, second = (torch.nn.functional.pad(x, (0, 0, 0, excess)) for x in (first, second))
        begins = None if begins is None else torch.nn.functional.pad(begins, (0, excess))
    exponents, first, second = (x.unflatten(1, (-1, CHUNK)) for x in (exponents, first, second))  # (B, C, L, D)
    marks = None if begins is None else begins.unflatten(1, (-1, CHUNK))[..., None]
    start = tuple(x[:, None] for x in state.unbind(1))  # (B, 1, D)
    nothing = tuple(x[:, None] for x in empty(rows, dim, exponents.device, exponents.dtype).unbind(1))

    def step(sums: Sums, *token: Tensor) -> Sums:
        a, b, p, n = sums
        return _joined(w, (a, b, p, n + 1), (*token, torch.zeros_like(n)))

    def walk(sums: Sums, found: Tensor | None = None) -> Sums:
        for j in range(CHUNK):
            if marks is not None:
                sums = tuple(torch.where(marks[:, :, j], s, x) for s, x in zip(start, sums, strict=True))
            if found is not None:
                found[:, :, :, j] = torch.stack(sums)
            sums = step(sums, *(x[:, :, j] for x in (first, second, exponents)))
        return sums

    own = walk(tuple(x.expand(exponents.shape[0], exponents.shape[1], dim) for x in nothing))
    fresh = None if marks is None else marks.any(2)
    sums, before = tuple(x[:, 0] for x in start), []
    for c in range(exponents.shape[1]):
        before.append(sums)
        (a, b, p, n), mine = sums, tuple(x[:, c] for x in own)
        sums = _joined(w, (a, b, p, n + CHUNK), mine)
        if fresh is not None:
            sums = tuple(torch.where(fresh[:, c], m, s) for m, s in zip(mine, sums, strict=True))
    found = exponents.new_empty(4, *exponents.shape)
    walk(tuple(torch.stack(x, 1) for x in zip(*before, strict=True)), found)
    states = found.flatten(2, 3)
    last = step(tuple(states[:, :, length - 1]), *(x.flatten(1, 2)[:, length - 1] for x in (first, second, exponents)))
    return states[:, :, :length], torch.stack(last, 1)


def _joined(w: Tensor, one: Sums, other: Sums) -> Sums:
    """The sum of two pairs of sums, with the larger of their exponents."""
    difference = (one[2] - other[2]) - (one[3] - other[3]) * w
    by_one, by_other = _weights(difference)
    a, b = (by_one * x + by_other * y for x, y in zip(one[:2], other[:2], strict=True))
    larger = difference > 0
    p, n = (torch.where(larger, x, y) for x, y in zip(one[2:], other[2:], strict=True))
    return a, b, p, n


def _weights(difference: Tensor) -> tuple[Tensor, Tensor]:
    """e^x and e^y over the larger of them, by x − y."""
    return difference.clamp(max=0).exp_(), (-difference).clamp_(max=0).exp_()
