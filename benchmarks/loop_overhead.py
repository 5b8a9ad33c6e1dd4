"""What the training loop costs beside the work: the share of a step outside forward, backward and optimiser.

    python benchmarks/loop_overhead.py [--steps N] [--json FILE]

One run of a 2 M-parameter LLaMA, everything on: clipping, a log line every step, progress, random windows as data. The
phases are timed inside that run, by clocks around the objective, `Tensor.backward` and the optimiser's step; the rest
of the time from one step's row to the next is the loop's. Medians over steps, the first few left out. Limit: 3 %.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from allyouneed.core.metrics import read
from allyouneed.data.batches import Windows
from allyouneed.models import llama
from allyouneed.objectives.next_token import next_token
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW

MODEL = {"vocab_size": 2048, "dim": 160, "num_layers": 5, "num_heads": 5, "hidden_dim": 432}
BATCH, LENGTH, WARMUP = 8, 128, 5


class Clocks:
    """A callback: seconds spent in each phase of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.now: dict[str, float] = {}
        self.before = time.perf_counter()

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.now[phase] = self.now.get(phase, 0.0) + time.perf_counter() - began

        return timed

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.perf_counter()
        self.steps.append(self.now | {"step": now - self.before})
        self.before, self.now = now, {}

    def on_end(self) -> None: ...


def measure(steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    module = llama.architecture(**MODEL, context=LENGTH).build()
    tokens = torch.randint(MODEL["vocab_size"], (1_000_000,))
    data, clocks = Windows(tokens, batch_size=BATCH, length=LENGTH, seed=0), Clocks()
    backward, update = torch.Tensor.backward, AdamW.step
    torch.Tensor.backward, AdamW.step = clocks.around("backward", backward), clocks.around("optimiser", update)
    try:
        with tempfile.TemporaryDirectory() as folder:
            objective = clocks.around("forward", next_token)
            train(module, objective, data, Training(steps=steps, log_every=1), folder=folder, callbacks=[clocks])
            assert len(list(read(Path(folder) / "metrics.jsonl"))) == steps
    finally:
        torch.Tensor.backward, AdamW.step = backward, update
    return summary(clocks.steps[WARMUP:], sum(p.numel() for p in module.parameters()))


def summary(steps: list[dict[str, float]], parameters: int) -> dict[str, Any]:
    phases = ("forward", "backward", "optimiser")
    rows = [{"loop": row["step"] - sum(row[p] for p in phases)} | row for row in steps]
    medians = {name: 1e3 * statistics.median(row[name] for row in rows) for name in (*phases, "loop", "step")}
    share = statistics.median(row["loop"] / row["step"] for row in rows)
    return {"parameters": parameters, "tokens": BATCH * LENGTH, "milliseconds": medians, "overhead": share}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.steps)
    for name, value in result["milliseconds"].items():
        print(f"{name:10} {value:8.2f} ms")
    print(f"overhead   {result['overhead']:8.2%}  of a step of {result['parameters'] / 1e6:.2f} M parameters")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
