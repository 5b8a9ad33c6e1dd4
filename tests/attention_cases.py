"""Random attention, with who sees whom spelled out token by token: what kernels are held against.

Queries, keys and values are of the standard normal distribution; the reference is their softmax in float64.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from allyouneed.nn.caches import Cache, Rows
from allyouneed.nn.positions import Alibi, Positions
from allyouneed.nn.sight import Memory, branches, prefixed, whole_rows, within_segments
from allyouneed.nn.view import View

KINDS = (
    "whole",
    "both ways",
    "packed",
    "packed both ways",
    "prefix",
    "cached",
    "ragged cache",
    "alternatives",
    "memory",
)


@dataclass
class Case:
    """`seen` (B, T, S) and `bias` (B or 1, H, T, S) are the slow, obvious twins of `view`."""

    kind: str
    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor
    view: View
    seen: Tensor
    bias: Tensor | None

    def __str__(self) -> str:
        return f"{self.kind} q{tuple(self.q.shape)} k{tuple(self.k.shape)} bias={self.bias is not None}"

    def to(self, dtype: torch.dtype) -> Case:
        """Rounded to another type."""
        tensors = [x.to(dtype) for x in (self.q, self.k, self.v, self.gradient)]
        return Case(self.kind, *tensors, self.view, self.seen, self.bias)

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q.requires_grad_(), self.k.requires_grad_(), self.v.requires_grad_()

    def expected(self) -> list[Tensor]:
        """The output and the gradients of q, k and v, in float64."""
        q, k, v = leaves = [x.detach().double().requires_grad_() for x in (self.q, self.k, self.v)]
        shared = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(shared, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores if self.bias is None else scores + self.bias.double()
        exponentials = torch.where(self.seen[:, None], (scores - scores.detach().amax(-1, keepdim=True)).exp(), 0.0)
        totals = exponentials.sum(-1, keepdim=True)
        out = exponentials / torch.where(totals == 0, 1.0, totals) @ v.repeat_interleave(shared, 1)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.gradient.double())]


def random_case(
    seed: int, kind: str, longest: int = 70, head_dims: tuple[int, ...] = (3, 8, 16, 20), pairs: int = 12
) -> Case:
    """`pairs`: rows × heads, at most."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = [(b, k, g) for b in (1, 2) for k in (1, 2) for g in (1, 1, 2, 3) if b * k * g <= pairs]
    rows, kv_heads, shared = chance.choice(sizes)
    size, heads = chance.choice(head_dims), kv_heads * shared
    length = chance.choice((1, chance.randint(2, 15), chance.randint(16, longest), longest - longest % 16))
    part = (
        (Alibi if chance.random() < 0.4 else Positions)
        .Config()
        .build(dim=size, num_heads=heads, head_dim=size, context=longest)
    )
    window = chance.choice((None, None, 1, chance.randint(2, 12), 1000))
    view, seen, places = KIND[kind](chance, part, rows, length, window)
    queries, keys = places if places else (None, None)
    bias = None
    if isinstance(part, Alibi) and places:
        slopes = [2 ** (-8 * h / part.num_heads) for h in range(1, part.num_heads + 1)]
        if part.num_heads in (3, 6):  # no power of two: Press et al. 2022, the authors' code
            slopes = {3: [2**-4, 2**-8, 2**-2], 6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]}[part.num_heads]
        bias = -torch.tensor(slopes)[:, None, None] * (queries[:, None, :, None] - keys[:, None, None, :])
    counts = {"q": (heads, seen.shape[1]), "k": (kv_heads, seen.shape[2]), "v": (kv_heads, seen.shape[2])}
    counts["gradient"] = counts["q"]
    drawn = {
        name: torch.randn(rows, count, n, size, generator=generator).transpose(1, 2)
        for name, (n, count) in counts.items()
    }
    return Case(kind, **drawn, view=view, seen=seen, bias=bias)


def random_segments(chance: random.Random, rows: int, length: int) -> Tensor:
    """Documents in a row, with padding before, after, or nowhere."""
    found = []
    for _ in range(rows):
        cuts = sorted(chance.randint(0, length) for _ in range(chance.randint(0, 3)))
        row = [n for n, (a, b) in enumerate(pairwise([0, *cuts, length]), 1) for _ in range(b - a)]
        before, after = (chance.choice((0, 0, length // 3)) for _ in range(2))
        row = [0 if i < before or i >= length - after else n for i, n in enumerate(row)]
        found.append(row)
    return torch.tensor(found)


def whole(chance, part, rows, length, window, causal=True):
    index = torch.arange(length)
    seen = _rule(index[None].expand(rows, -1), index[None].expand(rows, -1), window, causal)
    view = whole_rows(part, torch.zeros(rows, length), causal=causal).view(window)
    return view, seen, (index[None], index[None])


def packed(chance, part, rows, length, window, causal=True):
    segments = random_segments(chance, rows, length)
    places = _places(segments)
    seen = _rule(places, places, window, causal) & _own(segments)
    return within_segments(part, segments, causal=causal).view(window), seen, (places, places)


def prefix(chance, part, rows, length, window):
    segments = random_segments(chance, rows, length)
    places = _places(segments)
    inside = (places < chance.randint(0, 9)) & (segments != 0)
    before = torch.arange(length)[:, None] >= torch.arange(length)
    both = inside[:, :, None] & inside[:, None, :]
    seen = _rule(places, places, window, False) & _own(segments) & (before | both)
    return prefixed(part, segments, inside).view(window), seen, (places, places)


def cached(chance, part, rows, length, window, ragged=False):
    new = chance.choice((1, 1, 3))
    lengths = torch.tensor([chance.randint(0, length) if ragged else length for _ in range(rows)])
    cache = Cache(Rows(rows), [], capacity=length + new)
    cache.advance(lengths)
    queries = lengths[:, None] + torch.arange(new)
    keys = torch.arange(int(lengths.max()) + new)[None].expand(rows, -1)
    return cache.sight(part, new).view(window), _rule(queries, keys, window, True), (queries, keys)


def alternatives(chance, part, rows, length, window):
    before = chance.randint(1, 20)
    segments = random_segments(chance, rows, length)
    places = _places(segments)
    queries = before + places
    keys = torch.cat((torch.arange(before).expand(rows, -1), before + places), 1)
    seen = torch.cat((torch.ones(rows, length, before, dtype=torch.bool), _own(segments)), 2)
    return branches(part, segments, before).view(window), seen & _rule(queries, keys, window, True), (queries, keys)


def memory(chance, part, rows, length, window):
    segments = (random_segments(chance, rows, length) != 0).long()
    if chance.random() < 0.5:
        segments = segments.flip(1)
    if chance.random() < 0.3:
        segments[0] = 0  # a row that sees nothing
    new = chance.choice((1, 7, 33))
    view = Memory(torch.zeros(rows, length, 1), segments).view
    return view, (segments != 0)[:, None].expand(-1, new, -1), None


KIND = {
    "whole": whole,
    "both ways": lambda *given: whole(*given, causal=False),
    "packed": packed,
    "packed both ways": lambda *given: packed(*given, causal=False),
    "prefix": prefix,
    "cached": cached,
    "ragged cache": lambda *given: cached(*given, ragged=True),
    "alternatives": alternatives,
    "memory": memory,
}


def _rule(queries: Tensor, keys: Tensor, window: int | None, causal: bool) -> Tensor:
    distance = queries[:, :, None] - keys[:, None, :]
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() < window)


def _own(segments: Tensor) -> Tensor:
    same = segments[:, :, None] == segments[:, None, :]
    return same & ((segments != 0)[:, :, None] | torch.eye(segments.shape[1], dtype=torch.bool))


def _places(segments: Tensor) -> Tensor:
    found = torch.zeros_like(segments)
    for row, line in zip(found, segments.tolist(), strict=True):
        for i in range(1, len(line)):
            row[i] = row[i - 1] + 1 if line[i] == line[i - 1] else 0
    return found
