"""What packed weights cost beside fp32 ones: time of each product of SmolLM2-135M, and of a token's worth of them.

Both sides go through their modules, in turn, each over as many distinct weights as the model has layers, so that no
cache hides the memory; medians. `python benchmarks/kernels.py --rows 1 8 512 --threads 2`
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn

from allyouneed.nn.packed import PackedLinear

LAYERS = 30
# kind, outputs, inputs, how many of them a token passes (arXiv:2502.02737, the 135M model)
PRODUCTS = {
    "query, out": (Kind.Q4_1, 576, 576, 2 * LAYERS),
    "key, value": (Kind.Q4_1, 192, 576, 2 * LAYERS),
    "gate, up": (Kind.Q4_1, 1536, 576, 2 * LAYERS),
    "down": (Kind.Q4_1, 576, 1536, LAYERS),
    "head": (Kind.Q8_0, 49152, 576, 1),
}
FUSED = {"query+key+value": (192, 192, 576), "gate+up": (1536, 1536)}


def packed(kind: Kind, outputs: int, inputs: int) -> PackedLinear:
    weight = np.random.default_rng(0).standard_normal((outputs, inputs)).astype(np.float32)
    return PackedLinear.from_blocks(gguf.quants.quantize(weight, kind), kind, inputs)


def plain(layer: PackedLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    linear.weight.data = layer.dequantised()
    return linear


def another(layer: PackedLinear) -> PackedLinear:
    return PackedLinear(layer.blocks.clone(), layer.kind, layer.in_features)


def seconds(sides: Sequence[Sequence[nn.Module]], x: Tensor, rounds: int) -> list[float]:
    """The median time of one product of each side, taken in turn."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, found in zip(sides, times, strict=True):
            start = time.perf_counter()
            for module in side:
                module(x)
            found.append((time.perf_counter() - start) / len(side))
    return [statistics.median(found) for found in times]


def table(rows: int, rounds: int) -> None:
    print(f"\n{rows} row{'s' * (rows > 1)} of x, {torch.get_num_threads()} threads")
    print(f"{'':16}{'weight':>18}{'packed':>10}{'GB/s':>7}{'GFLOP/s':>9}{'fp32':>10}{'ratio':>7}")
    totals = [0.0, 0.0]
    for name, (kind, outputs, inputs, count) in PRODUCTS.items():
        first = packed(kind, outputs, inputs)
        layers = [first, *(another(first) for _ in range(min(count, LAYERS) - 1))]
        ours, theirs = seconds([layers, [plain(layer) for layer in layers]], torch.randn(rows, inputs), rounds)
        totals = [totals[0] + count * ours, totals[1] + count * theirs]
        rate, speed = first.blocks.nbytes / ours / 1e9, 2 * rows * outputs * inputs / ours / 1e9
        shape = f"{kind.name} {outputs}x{inputs}"
        print(f"{name:16}{shape:>18}{ours * 1e6:8.1f}us{rate:7.1f}{speed:9.1f}", end="")
        print(f"{theirs * 1e6:8.1f}us{theirs / ours:7.2f}")
    print(f"{'the whole model':16}{'':18}{totals[0] * 1e3:8.2f}ms{'':16}{totals[1] * 1e3:8.2f}ms", end="")
    print(f"{totals[1] / totals[0]:7.2f}")


def fusion(rows: int, rounds: int) -> None:
    print(f"\nproducts of one input as one, {rows} row of x: separate, fused")
    for name, sizes in FUSED.items():
        first = [packed(Kind.Q4_1, outputs, 576) for outputs in sizes]
        separate = [another(layer) for _ in range(LAYERS) for layer in first]
        fused = [PackedLinear.fused([another(layer) for layer in first]) for _ in range(LAYERS)]
        one, joint = seconds([separate, fused], torch.randn(rows, 576), rounds)
        print(f"{name:16}{one * len(sizes) * 1e6:8.1f}us{joint * 1e6:8.1f}us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        for rows in arguments.rows:
            table(rows, arguments.rounds if rows < 100 else 3)
        fusion(1, arguments.rounds)


if __name__ == "__main__":
    main()
