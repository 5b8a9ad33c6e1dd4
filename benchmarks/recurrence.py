"""RWKV trained in parallel beside the same token by token, forward and backward: in turn, medians of processor time.

    python benchmarks/recurrence.py [--rounds N] [--json FILE]

The weighted sum alone – `nn.wkv.step` under autograd, `nn.wkv.wkv` by either path, the native sweep and chunks in
tensor code – and a whole model of four layers, trained as recurrent nets are and as it is. All sides give the same
values to 1e-5 before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import Case, turns

from allyouneed.evaluate.statistics import median
from allyouneed.models import rwkv
from allyouneed.models.decoder import Decoder
from allyouneed.nn import native, wkv
from allyouneed.nn.rwkv import Following

TOLERANCE = 1e-5
SIZES = ((4, 512, 256), (4, 1024, 512))  # rows, tokens, channels
Read = Callable[..., tuple[Tensor, Tensor]]
parallel = wkv.wkv


def by_tokens(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, *_: None
) -> tuple[Tensor, Tensor]:
    state, seen = wkv.empty(len(k), k.shape[2]) if state is None else state, []
    for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
        one, state = wkv.step(w, u, key, value, state)
        seen.append(one)
    return torch.stack(seen, 1), state


@contextmanager
def without_kernels() -> Iterator[None]:
    known, native.library = native.library, lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        native.library = known


def in_chunks(*given: Tensor) -> tuple[Tensor, Tensor]:
    """The same function; `alone` calls it, and its gradient, `without_kernels`."""
    return parallel(*given)


def alone(read: Read, rows: int, length: int, dim: int) -> Case:
    g = torch.Generator().manual_seed(0)
    w, u = torch.linspace(-5, 3, dim).exp(), torch.randn(dim, generator=g)
    given = [w, u, *(torch.randn(rows, length, dim, generator=g) for _ in range(2))]
    leaves, gradient = [x.requires_grad_() for x in given], torch.randn(rows, length, dim, generator=g)

    def work() -> Tensor:
        seen = read(*leaves)[0]
        seen.backward(gradient)
        for leaf in leaves:
            leaf.grad = None
        return seen.detach()

    return work if read is not in_chunks else under(work)


def within(read: Read, rows: int, length: int, dim: int) -> Case:
    torch.manual_seed(0)
    model = rwkv.architecture(vocab_size=256, context=length, dim=dim, num_layers=4).build()
    ids = torch.randint(256, (rows, length))
    logits = (lambda: model(ids).logits) if read is parallel else (lambda: as_recurrent_net(model, ids))

    def work() -> Tensor:
        loss = F.cross_entropy(logits()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return work


def as_recurrent_net(model: Decoder, ids: Tensor) -> Tensor:
    """Logits of `ids`, all layers token by token, with gradients through time."""
    states: list[Any] = [(None, None, None)] * model.config.num_layers
    seen = []
    wkv.wkv = by_tokens  # type: ignore[assignment]
    try:
        for x in model.embedding_norm(model.embedding(ids)).split(1, 1):
            for i, block in enumerate(model.blocks):
                mixed, read, sums = states[i]
                y, mixed, sums = block.mixer(block.mixer_norm(x), Following(), mixed, sums)
                x = x + y
                y, read = block.channel(block.channel_norm(x), Following(), read)
                x, states[i] = x + y, (mixed, read, sums)
            seen.append(x)
    finally:
        wkv.wkv = parallel
    return model.head(model.norm(torch.cat(seen, 1)))


def under(work: Case) -> Case:
    def inner() -> object:
        with without_kernels():
            return work()

    return inner


def measure(
    what: str, make: Callable[..., Case], size: tuple[int, int, int], reads: dict[str, Read], rounds: int
) -> list[dict[str, Any]]:
    slow = make(by_tokens, *size)
    found = []
    for name, read in reads.items():
        fast = make(read, *size)
        assert (slow() - fast()).abs().max() <= TOLERANCE, what  # type: ignore[operator]
        taken = turns(slow, fast, rounds=rounds, warmup=1)
        ratio = median([a.processor / b.processor for a, b in taken])
        clocks = [1e3 * median([pair[side].clock for pair in taken]).estimate for side in (0, 1)]
        row = {"case": f"{what}, {name}", "size": list(size), "token_by_token_ms": clocks[0], "parallel_ms": clocks[1]}
        found.append(row | {"ratio": ratio.estimate, "ratio_interval": [ratio.low, ratio.high]})
        shown = f"token by token {clocks[0]:7.1f} ms   in parallel {clocks[1]:6.1f} ms"
        print(
            f"{row['case']:20} {size!s:15} {shown}   x {ratio.estimate:.1f} [{ratio.low:.1f}, {ratio.high:.1f}]",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for size in SIZES:
        rows += measure("alone", alone, size, {"native": parallel, "chunks": in_chunks}, arguments.rounds)
    rows += measure("whole model", within, SIZES[0], {"native": parallel}, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
