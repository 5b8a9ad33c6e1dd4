"""What a training step will cost on a mesh, before anybody pays for it: memory a rank, arithmetic, messages, time.

What one row takes is counted (`train.tracing`), and everything else is division. What is assumed beyond that is said by
`Machine` and at each formula; `docs/scale.md` says how estimates compare with measurements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.train.mesh import Mesh, spread
from allyouneed.train.ranks import BUCKET
from allyouneed.train.tracing import Traced

WIDE = 4  # bytes of a weight, of its gradient and of each of AdamW's two moments, which stay float32


@dataclass(frozen=True, kw_only=True)
class Machine(core.Config):
    """The ranks' hardware. Defaults are an A100 with 80 GB: its peak in bfloat16, NVLink within a node (300 GB/s each
    way) and 200 Gbit/s a rank between nodes; of the peak, half is reached by matrix products of such sizes.
    """

    memory: float = 80e9  # bytes a rank
    usable: float = 0.9  # share of it; the rest is the allocator's and the messages'
    peak: float = 312e12  # floating-point operations a second
    reached: float = 0.5  # share of the peak
    node: int = 8  # ranks that share a fast network
    inside: float = 300e9  # bytes a second within a node
    between: float = 25e9  # bytes a second and rank between nodes


@dataclass(frozen=True)
class Plan:
    """A mesh and what a step costs on it: bytes of a rank, seconds."""

    mesh: Mesh
    rows: int  # that a rank computes at once
    accumulate: int
    recompute: bool
    weights: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float  # weights of the blocks at work, whole, or other copies
    arithmetic: float  # seconds
    messages: float  # seconds

    @property
    def memory(self) -> float:
        """Bytes of a rank."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered

    @property
    def seconds(self) -> float:
        """Of a step, if nothing is sent while anything is computed: the worst case."""
        return self.arithmetic + self.messages

    def to_json(self) -> dict[str, Any]:
        """As a program reads it."""
        mesh = {name: size for name, size in self.mesh.to_json().items() if name != "type"}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "mesh"}
        return {"mesh": mesh, **rest, "memory": self.memory, "seconds": self.seconds}


@dataclass(frozen=True)
class _Way:
    """How a step is computed."""

    rows: int
    accumulate: int
    recompute: bool
    slices: bool  # gradients are added up in slices
    narrow: bool

    @property
    def size(self) -> int:
        """Bytes of a weight as it is gathered."""
        return 2 if self.narrow else WIDE

    @property
    def passes(self) -> int:
        """In units of a forward pass, of which a backward one is two."""
        return 4 if self.recompute else 3


def cost(
    traced: Traced,
    sizes: dict[str, int],
    batch: int,
    rows: int,
    machine: Machine,
    *,
    narrow: bool,
    recompute: bool = False,
    slices: bool = False,
) -> Plan:
    """What a step of `batch` rows costs, of which a rank computes `rows` at once, on a grid of these sizes; with
    `slices` gradients are added up in slices (`Mesh.slice_gradients`).
    """
    data, expert, shard, tensor = (sizes[name] for name in ("data", "expert", "shard", "tensor"))
    way = _Way(rows, max(1, -(-batch // (data * expert * shard * rows))), recompute, slices, narrow)
    held = sum(share.of_one(tensor, expert) for share in traced.weights)  # by the ranks that share a row, of all units
    reached = machine.peak * machine.reached * (1.0 if narrow else 0.5)
    return Plan(
        mesh=Mesh(data=data, expert=expert, shard=shard, tensor=tensor, slice_gradients=slices),
        rows=rows,
        accumulate=way.accumulate,
        recompute=recompute,
        weights=WIDE * held / shard,
        gradients=WIDE * held / (shard if way.accumulate == 1 or slices else 1),
        optimizer=2 * WIDE * held / shard,
        activations=rows * _kept(traced, tensor, recompute),
        gathered=_gathered(traced, sizes, held, way),
        arithmetic=way.passes * way.accumulate * rows * traced.flops.of_one(tensor, expert) / reached,
        messages=_messages(traced, sizes, held, way, machine),
    )


def _kept(traced: Traced, tensor: int, recompute: bool) -> float:
    """Bytes kept of a row; of recomputed blocks what enters them, and all of the one at work."""
    if not recompute:
        return traced.kept.of_one(tensor)
    return traced.entering + traced.outside.of_one(tensor) + traced.largest.of_one(tensor)


def _gathered(traced: Traced, sizes: dict[str, int], held: float, way: _Way) -> float:
    """Bytes that are there twice. With FSDP weights: of the block at work and the next under way, and of what is no
    block for the whole step. Where no rank holds slices: autocast's copies of weights, and of gradients a message.
    """
    data, expert, shard, tensor = (sizes[name] for name in ("data", "expert", "shard", "tensor"))
    if data * expert * shard > 1 and max(expert, shard, tensor) > 1:
        *units, rest = (share.of_one(tensor, expert) for share in traced.weights)
        return way.size * (rest + sum(sorted(units)[-2:]))
    return (way.size * held if way.narrow else 0.0) + (min(BUCKET, WIDE * held) if data > 1 else 0.0)


def _messages(traced: Traced, sizes: dict[str, int], held: float, way: _Way, machine: Machine) -> float:
    """Seconds of sending: a ring moves (n − 1)/n of a gathered or scattered tensor past each of n ranks, an all-reduce
    twice that (Thakur et al. 2005, sec. 4).
    """
    tensor, shard, copies = sizes["tensor"], sizes["shard"], sizes["data"] * sizes["expert"]

    def past(ranks: int, reach: int, amount: float) -> float:
        return (ranks - 1) / ranks * amount / (machine.inside if reach <= machine.node else machine.between)

    gathers = 2 * way.accumulate * past(shard, tensor * shard, way.size * held)  # before forward and backward pass
    scatters = (way.accumulate if way.slices else 1) * past(shard, tensor * shard, WIDE * held)
    reduced = 2 * past(copies, tensor * shard * copies, WIDE * held / shard)
    added = 2 * (way.passes - 1) * way.accumulate * past(tensor, tensor, way.rows * traced.exchanged)
    return gathers + scatters + reduced + added


def grids(ranks: int, machine: Machine, module: nn.Module) -> Iterator[dict[str, int]]:
    """Every grid of `ranks` that fits the model; tensor ranks stay within a node, the others are powers of two."""
    has_experts = any(spread(module))
    for tensor in _powers(min(machine.node, ranks)):
        for expert in _powers(ranks // tensor) if has_experts else (1,):
            try:
                Mesh(tensor=tensor, expert=expert).check(module)
            except InputError:
                continue
            for shard in _powers(ranks // tensor // expert):
                if ranks % (tensor * expert * shard) == 0:
                    yield Mesh(tensor=tensor, expert=expert, shard=shard).sizes(ranks)


def plan(
    traced: Traced, ranks: int, batch: int, module: nn.Module, machine: Machine, *, narrow: bool = True
) -> list[Plan]:
    """The plans that fit into the ranks' memory, the fastest first.

    Args:
        traced: of one row.
        ranks: how many there are.
        batch: rows a step.
        module: on any device; what can be divided is asked of it.
        machine: what the ranks are.
        narrow: whether products are computed in bfloat16.
    """
    found = []
    for sizes in grids(ranks, machine, module):
        parts = ranks // sizes["tensor"]
        if parts > batch:
            continue
        for recompute, slices in itertools.product((False, True), (False, True) if sizes["shard"] > 1 else (False,)):
            for rows in _powers(batch // parts):
                found.append(
                    cost(traced, sizes, batch, rows, machine, narrow=narrow, recompute=recompute, slices=slices)
                )
    return sorted(
        (p for p in found if p.memory <= machine.usable * machine.memory), key=lambda p: (p.seconds, p.accumulate)
    )


def _powers(most: int) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [1 << n for n in range(int(math.log2(most)) + 1)] if most >= 1 else []
