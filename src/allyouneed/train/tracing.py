"""What a model does with one row, counted on fake tensors that have shapes and no memory: `train.planner` divides it.

Which tensors the forward pass keeps for the backward one, how many operations it takes, and what of both tensor ranks
share, told by the parts (`train.mesh`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from allyouneed.core.errors import InputError
from allyouneed.train.mesh import blocks, divided, spread


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
            weights=tuple(weights(self.module, self.blocks)),
            kept=sum(by_block.values(), outside),
            largest=largest,
            outside=outside,
            entering=self.entering,
            flops=Share(same=whole - self.divided_flops, divided=self.divided_flops),
            exchanged=self.exchanged,
        )


def weights(module: nn.Module, units: list[nn.Module]) -> Iterator[Share]:
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


def _attention(q: torch.Size, k: torch.Size, *_: Any, **further: Any) -> int:
    """Operations of QKᵀ and of the product with V, causal or not: (B, H, T, D), (B, H or fewer, S, D)."""
    return 4 * math.prod(q) * k[-2]


# the kernel that fake tensors choose, of which PyTorch's counter does not know
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
