"""Attention alone, forward and backward: in tiles (`nn.tiled`) beside PyTorch's `scaled_dot_product_attention`, whose
kernel works in tiles too, and beside attention spelled out, where its matrices still fit.

    python benchmarks/attention.py [--rounds N] [--json FILE]

float32, heads of 64, inputs of the standard normal distribution; all sides give the same output to 1e-5, which is
asserted before anything is timed. They take turns; a ratio is the median over rounds of the peer's time over ours in
the same round, with the interval that encloses the true median with 95 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from turns import turns

from allyouneed.evaluate.memory import peak_allocated
from allyouneed.evaluate.statistics import median
from allyouneed.nn.kernels import Sdpa, Tiled, attention_weights
from allyouneed.nn.positions import Alibi, Positions
from allyouneed.nn.sight import Sight, whole_rows, within_segments
from allyouneed.nn.view import View

ROUNDS, WARMUP, TOLERANCE, HEAD_DIM = 9, 1, 1e-5, 64
SPELLED_OUT = 8192  # tokens times heads times rows, up to which it is tried
Kernel = Callable[[Tensor, Tensor, Tensor, View], Tensor]
# name: rows, heads, heads of keys, tokens, positions, documents in a row, window
CASES: dict[str, tuple[int, int, int, int, type[Positions], int, int | None]] = {
    "4 x 1024, 8 heads": (4, 8, 8, 1024, Positions, 1, None),
    "1 x 2048, 8 heads on 2": (1, 8, 2, 2048, Positions, 1, None),
    "1 x 2048, 8 heads, ALiBi": (1, 8, 8, 2048, Alibi, 1, None),
    "1 x 4096, 2 heads, 16 documents": (1, 2, 2, 4096, Positions, 16, None),
    "1 x 4096, 2 heads, window 256": (1, 2, 2, 4096, Positions, 1, 256),
    "1 x 8192, 1 head": (1, 1, 1, 8192, Positions, 1, None),
    "1 x 16384, 1 head": (1, 1, 1, 16384, Positions, 1, None),
}


def spelled_out(q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    return attention_weights(q, k, view.tile(slice(None), slice(None))) @ v


def passes(
    kernel: Kernel, inputs: list[Tensor], sight: Callable[[], Sight], window: int | None
) -> Callable[[], Tensor]:
    """One forward and backward, masks included; gives the output."""
    q, k, v, gradient = inputs

    def work() -> Tensor:
        out = kernel(q, k, v, sight().view(window))
        torch.autograd.grad(out, (q, k, v), gradient)
        return out.detach()

    return work


def measure(name: str, rounds: int) -> dict[str, Any]:
    rows, heads, kv_heads, length, positions, documents, window = CASES[name]
    part = positions.Config().build(dim=heads * HEAD_DIM, num_heads=heads, head_dim=HEAD_DIM, context=length)
    segments = (torch.arange(length) // (length // documents) + 1).expand(rows, -1)

    def sight() -> Sight:
        return whole_rows(part, segments) if documents == 1 else within_segments(part, segments)

    shapes = [(rows, n, length, HEAD_DIM) for n in (heads, kv_heads, kv_heads, heads)]
    inputs = [torch.randn(shape).requires_grad_(i < 3) for i, shape in enumerate(shapes)]
    ours, theirs, naive = (passes(kernel, inputs, sight, window) for kernel in (Tiled(), Sdpa(), spelled_out))
    assert (ours() - theirs()).abs().max() <= TOLERANCE, f"{name}: the outputs differ"
    found = turns(theirs, ours, rounds=rounds, warmup=WARMUP)
    ratio = median([peer.clock / mine.clock for peer, mine in found])
    row = {
        "case": name,
        "peer_ms": 1e3 * statistics.median(peer.clock for peer, _ in found),
        "allyouneed_ms": 1e3 * statistics.median(mine.clock for _, mine in found),
        "ratio": ratio.estimate,
        "ratio_interval": [ratio.low, ratio.high],
        "ratio_of_processor_time": median([peer.processor / mine.processor for peer, mine in found]).estimate,
        "peer_mib": peak_allocated(theirs) / 2**20,
        "allyouneed_mib": peak_allocated(ours) / 2**20,
    }
    if rows * heads * length <= SPELLED_OUT:
        row |= {"spelled_out_mib": peak_allocated(naive) / 2**20}
    return row


def shown(row: dict[str, Any]) -> str:
    times = f"SDPA {row['peer_ms']:8.1f} ms {row['peer_mib']:7.1f} MiB   tiles {row['allyouneed_ms']:8.1f} ms"
    ratio = f"x {row['ratio']:.2f} [{row['ratio_interval'][0]:.2f}, {row['ratio_interval'][1]:.2f}]"
    work = f"processor time x {row['ratio_of_processor_time']:.2f}"
    return f"{row['case']:34} {times} {row['allyouneed_mib']:7.1f} MiB   {ratio}   {work}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds < 6:
        parser.error("--rounds: 6 at least")
    rows = []
    for name in CASES:
        torch.manual_seed(0)
        rows.append(measure(name, arguments.rounds))
        print(shown(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
