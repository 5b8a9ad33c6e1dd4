"""Matrices in blocks of 4-bit codes beside float32, PyTorch and bitsandbytes: processor time, in turn.

    python benchmarks/quantised.py [--rounds N] [--json FILE]

For the shapes of SmolLM2: a matrix unpacked by the kernel and by PyTorch's look-up, by the kernel and by bitsandbytes;
its product with few rows of activations and with many beside `F.linear` with the float32 weight; and forward and
backward of many rows, where the weight is unpacked twice. All sides give the same values before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import Case, turns

from allyouneed.evaluate.statistics import median
from allyouneed.nn.blockwise import blockwise
from allyouneed.nn.quantised import QuantisedLinear, QuantisedWeight

SHAPES = ((1536, 576), (576, 1536))
ROWS = (1, 8, 1024)
REPEATS = 8  # calls a turn


def cases() -> dict[str, tuple[Case, Case]]:
    """Named pairs: what is compared with, and ours."""
    found: dict[str, tuple[Case, Case]] = {}
    for shape in SHAPES:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        stored = QuantisedWeight(blockwise(weight, "nf4"))
        layer, plain = QuantisedLinear(stored), stored.dequantised()
        name = f"{shape[0]} × {shape[1]}"
        assert torch.equal(stored.blocks.dequantised(), plain)
        found[f"unpacked, PyTorch, {name}"] = stored.blocks.dequantised, stored.dequantised
        found |= theirs(f"unpacked, bitsandbytes, {name}", weight, stored)
        for count in ROWS:
            x = torch.randn(count, shape[1])
            assert torch.allclose(layer(x), F.linear(x, plain), atol=1e-3)
            found[f"{count} rows, float32, {name}"] = (
                lambda x=x, plain=plain: F.linear(x, plain),
                lambda x=x, layer=layer: layer(x),
            )
        x = torch.randn(ROWS[-1], shape[1], requires_grad=True)
        found[f"{ROWS[-1]} rows and back, float32, {name}"] = (
            lambda x=x, plain=plain: F.linear(x, plain).sum().backward(),
            lambda x=x, layer=layer: layer(x).sum().backward(),
        )
    return found


def theirs(name: str, weight: Tensor, stored: QuantisedWeight) -> dict[str, tuple[Case, Case]]:
    try:
        from bitsandbytes import functional
    except ImportError:
        return {}
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    assert torch.allclose(functional.dequantize_4bit(codes, state), stored.dequantised(), rtol=0.02)
    return {name: (lambda: functional.dequantize_4bit(codes, state), stored.dequantised)}


def repeated(case: Case) -> Case:
    def work() -> None:
        for _ in range(REPEATS):
            case()

    return work


def measure(pair: tuple[Case, Case], rounds: int) -> dict[str, Any]:
    taken = turns(*map(repeated, pair), rounds=rounds, warmup=2)
    other, ours = (median([turn[i].processor / REPEATS for turn in taken]).estimate for i in (0, 1))
    ratio = median([turn[0].processor / turn[1].processor for turn in taken])
    return {"other_ms": 1e3 * other, "ours_ms": 1e3 * ours, "ratio": [ratio.estimate, ratio.low, ratio.high]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {}
    for name, pair in cases().items():
        rows[name] = row = measure(pair, options.rounds)
        ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"])
        print(f"{name:<44} {row['other_ms']:8.3f} ms  ours {row['ours_ms']:8.3f} ms  ratio {ratio}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
