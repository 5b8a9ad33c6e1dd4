"""What a training step will cost on a mesh, before anybody pays for it: memory a rank, arithmetic, messages, time.

A model is traced once, on fake tensors that have shapes and no memory: which tensors the forward pass keeps for the
backward one, how many operations it takes, what of both tensor ranks share. Everything else is division. What is
assumed beyond that is said by `Machine` and at each formula; `docs/scale.md` holds estimates against measurements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.train.mesh import Mesh, blocks, divided, spread

WIDE = 4  # bytes of a weight, of its gradient and of each of AdamW's two moments, which stay float32


def _attention(q: torch.Size, k: torch.Size, *_: Any, **further: Any) -> int:
    """Operations of QKᵀ and of the product with V, causal or not: (B, H, T, D), (B, H or fewer, S, D)."""
    return 4 * math.prod(q) * k[-2]


# the kernel that fake tensors choose, of which PyTorch's counter does not know
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


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
class Share:
    """An amount by how it is shared: on every rank, among tensor ranks, among expert ranks."""

    same: float = 0.0
    divided: float = 0.0
    spread: float = 0.0

    def __add__(self, other: Share) -> Share:
        return Share(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def of_one(self, tensor: int = 1, expert: int = 1) -> float:
        """What one rank has of it."""
        return self.same + self.divided / tensor + self.spread / expert


@dataclass(frozen=True)
class Traced:
    """What a model does with one row."""

    context: int  # tokens of the row
    weights: tuple[Share, ...]  # parameters of each unit that is gathered at once: the blocks, then the rest
    kept: Share  # bytes kept for the backward pass
    largest: Share  # those of the block that keeps most
    outside: Share  # those of what is no block
    entering: float  # bytes that enter all blocks, which is all that is kept of them if they are recomputed
    flops: Share  # of a forward pass
    exchanged: float  # bytes that tensor ranks add up in a forward pass

    @property
    def parameters(self) -> int:
        """How many there are."""
        return round(sum(share.of_one() for share in self.weights))


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
    gathered: float  # weights of the blocks at work, whole
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


def trace(build: Callable[[], nn.Module], run: Callable[[nn.Module], Any], context: int, *, narrow: bool) -> Traced:
    """Measure `run(module)`, the forward pass of one row of `context` tokens, on a fake module.

    Args:
        build: the module.
        run: its forward pass up to the loss.
        context: tokens a row.
        narrow: compute in bfloat16.

    Raises:
        InputError: the pass asks for the value of a tensor, as routing by content does; it cannot be known here.
    """
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        module = build()
        if narrow:
            _narrow(module)
        counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
        ledger = _Ledger(module, counter)
        try:
            with counter, ledger.watching(), torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda x: x):
                run(module)
        except (DataDependentOutputException, DynamicOutputShapeException):
            name = type(module).__name__
            raise InputError(f"{name}: what it computes depends on its data, so that it cannot be planned") from None
        return ledger.traced(context)


def _narrow(module: nn.Module) -> None:
    """Weights in bfloat16, as blocks are gathered; `Module.to` cannot exchange fake ones."""
    done: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = done.setdefault(p, nn.Parameter(p.detach().to(torch.bfloat16)))


class _Ledger:
    """Books what a forward pass keeps and computes to the part that does it."""

    def __init__(self, module: nn.Module, counter: FlopCounterMode) -> None:
        self.module, self.counter = module, counter
        self.blocks = blocks(module)
        self.shared = [cast("nn.Module", part) for _, part in divided(module)]
        self.mine = {p.untyped_storage()._cdata for p in module.parameters()}
        self.inside: list[str] = []  # the kinds of parts that are at work, outermost first
        self.seen: list[Tensor] = []  # so that no storage's address is used twice
        self.kept: list[tuple[int | None, Share]] = []
        self.known: set[int] = set()
        self.at: int | None = None
        self.entering = self.exchanged = self.divided_flops = self.began = 0.0

    def keep(self, x: Tensor) -> Tensor:
        """A tensor is kept for the backward pass: count it once, and no weights."""
        storage = x.untyped_storage()
        if storage._cdata not in self.known | self.mine:
            self.known.add(storage._cdata)
            self.seen.append(x)
            size = float(storage.nbytes())
            self.kept.append((self.at, Share(divided=size) if self.inside else Share(same=size)))
        return x

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, it is noted which block and which shared part is at work."""
        hooks = []
        for i, block in enumerate(self.blocks):
            hooks.append(block.register_forward_pre_hook(lambda _, given, i=i: self._enter_block(i, given[0])))
            hooks.append(block.register_forward_hook(lambda *_: self._leave_block()))
        for part in self.shared:
            hooks.append(part.register_forward_pre_hook(lambda _, given: self._enter_part(given)))
            hooks.append(part.register_forward_hook(lambda _, given, out: self._leave_part(out)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter_block(self, number: int, x: Tensor) -> None:
        self.at = number
        self.entering += x.nbytes

    def _leave_block(self) -> None:
        self.at = None

    def _enter_part(self, given: Iterable[Any]) -> None:
        for x in given:
            if isinstance(x, Tensor):
                self.keep(x)  # what enters is whole on all tensor ranks, though it is kept by their first layers
        self.inside.append("divided")
        self.began = float(self.counter.get_total_flops())

    def _leave_part(self, out: Any) -> None:
        self.inside.pop()
        self.divided_flops += self.counter.get_total_flops() - self.began
        self.exchanged += out.nbytes if isinstance(out, Tensor) else 0

    def traced(self, context: int) -> Traced:
        """The sums."""
        by_block: dict[int | None, Share] = {}
        for at, share in self.kept:
            by_block[at] = by_block.get(at, Share()) + share
        outside = by_block.pop(None, Share())
        largest = max(by_block.values(), key=Share.of_one, default=Share())
        whole = float(self.counter.get_total_flops())
        return Traced(
            context=context,
            weights=tuple(_weights(self.module, self.blocks)),
            kept=sum(by_block.values(), outside),
            largest=largest,
            outside=outside,
            entering=self.entering,
            flops=Share(same=whole - self.divided_flops, divided=self.divided_flops),
            exchanged=self.exchanged,
        )


def _weights(module: nn.Module, units: list[nn.Module]) -> Iterator[Share]:
    """Parameters of each unit, by what shares them."""
    kinds: dict[nn.Parameter, str] = {}
    for _, part in divided(module):
        for name in (*part.by_columns, *part.by_rows):
            rows = name in part.by_rows  # whose biases are whole on every rank
            for key, p in part.get_submodule(name).named_parameters():  # type: ignore[attr-defined]
                kinds[p] = "same" if rows and key == "bias" else "divided"
    kinds |= {p: "spread" for _, part in spread(module) for p in part.parameters()}  # type: ignore[attr-defined]
    done: set[nn.Parameter] = set()
    for unit in (*units, module):
        share = Share()
        for p in unit.parameters():
            if p not in done:
                done.add(p)
                share += Share(**{kinds.get(p, "same"): float(p.numel())})
        yield share


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
    accumulate = max(1, -(-batch // (data * expert * shard * rows)))
    held = sum(share.of_one(tensor, expert) for share in traced.weights)  # by the ranks that share a row, of all units
    units = sorted((share.of_one(tensor, expert) for share in traced.weights[:-1]), reverse=True)
    size = 2 if narrow else WIDE
    if recompute:
        kept = traced.entering + traced.outside.of_one(tensor) + traced.largest.of_one(tensor)
    else:
        kept = traced.kept.of_one(tensor)
    alone = shard * data * expert == 1
    return Plan(
        mesh=Mesh(data=data, expert=expert, shard=shard, tensor=tensor, slice_gradients=slices),
        rows=rows,
        accumulate=accumulate,
        recompute=recompute,
        weights=WIDE * held / shard,
        gradients=WIDE * held / (shard if accumulate == 1 or slices else 1),
        optimizer=2 * WIDE * held / shard,
        activations=rows * kept,
        # the rest stays whole during a step; of the blocks one is at work and the next one under way
        gathered=0.0 if alone else size * (traced.weights[-1].of_one(tensor, expert) + sum(units[:2])),
        arithmetic=(4 if recompute else 3)  # a backward pass is twice a forward one
        * (accumulate * rows * traced.flops.of_one(tensor, expert))
        / (machine.peak * machine.reached * (1 if narrow else 0.5)),
        messages=_messages(traced, sizes, held, rows, accumulate, recompute, slices, machine, size),
    )


def _messages(
    traced: Traced,
    sizes: dict[str, int],
    held: float,
    rows: int,
    accumulate: int,
    recompute: bool,
    slices: bool,
    m: Machine,
    size: int,
) -> float:
    """Seconds of sending: a ring moves (n − 1)/n of a gathered or scattered tensor past each of n ranks, an all-reduce
    twice that (Thakur et al. 2005, sec. 4).
    """
    tensor, shard, copies = sizes["tensor"], sizes["shard"], sizes["data"] * sizes["expert"]

    def past(ranks: int, reach: int, amount: float) -> float:
        return (ranks - 1) / ranks * amount / (m.inside if reach <= m.node else m.between)

    gathers = 2 * accumulate * past(shard, tensor * shard, size * held)  # before the forward and the backward pass
    scatters = (accumulate if slices else 1) * past(shard, tensor * shard, WIDE * held)
    reduced = 2 * past(copies, tensor * shard * copies, WIDE * held / shard)
    passes = 3 if recompute else 2
    added = 2 * passes * accumulate * past(tensor, tensor, rows * traced.exchanged)
    return gathers + scatters + reduced + added


def grids(traced: Traced, ranks: int, machine: Machine, module: nn.Module) -> Iterator[dict[str, int]]:
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
    for sizes in grids(traced, ranks, machine, module):
        parts = ranks // sizes["tensor"]
        if parts > batch:
            continue
        for recompute, slices in itertools.product((False, True), (False, True) if sizes["shard"] > 1 else (False,)):
            for rows in _powers(batch // parts):
                found.append(
                    cost(traced, sizes, batch, rows, machine, narrow=narrow, recompute=recompute, slices=slices)
                )
    return sorted((p for p in found if p.memory <= machine.usable * machine.memory), key=lambda p: p.seconds)


def _powers(most: int) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [1 << n for n in range(int(math.log2(most)) + 1)] if most >= 1 else []
