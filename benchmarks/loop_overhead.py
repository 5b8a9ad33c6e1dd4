"""How much of a training run's time the loop itself takes: all that is not forward, backward or the optimiser's step.

    python benchmarks/loop_overhead.py [--json FILE]

A 2 M-parameter LLaMA is trained as users train: metrics written, progress shown, gradients clipped, loss checked. The
three phases are timed by wrapping what the loop calls.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from allyouneed.data.batches import Windows
from allyouneed.models import llama
from allyouneed.objectives.next_token import next_token
from allyouneed.train.loop import Training, train

STEPS = 60
spent: dict[str, float] = {"forward": 0.0, "backward": 0.0, "optimiser": 0.0}


def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[phase] += time.perf_counter() - started

    return wrapper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    module = llama.architecture(
        vocab_size=2048, context=512, dim=160, num_layers=5, num_heads=5, hidden_dim=432, tied=False
    ).build()
    batches = Windows(torch.randint(0, 2048, (200_000,)), batch_size=8, length=128, seed=0)
    torch.Tensor.backward = timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    torch.optim.AdamW.step = timed("optimiser", torch.optim.AdamW.step)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        train(module, timed("forward", next_token), batches, Training(steps=5), quiet=True)  # warm up
        spent.update(dict.fromkeys(spent, 0.0))
        started = time.perf_counter()
        train(module, timed("forward", next_token), batches, Training(steps=STEPS, log_every=1), folder=folder)
        total = time.perf_counter() - started
    overhead = 1 - sum(spent.values()) / total
    print("  ".join(f"{phase} {seconds / total:.1%}" for phase, seconds in spent.items()))
    print(f"the loop itself, its one checkpoint included: {overhead:.2%} of {total / STEPS * 1e3:.1f} ms a step")
    if arguments.json:
        row = {"case": "loop overhead, 2 M parameters", "overhead": overhead, "step_ms": total / STEPS * 1e3}
        arguments.json.write_text(json.dumps([row], indent=1) + "\n")


if __name__ == "__main__":
    main()
