"""One training step of a LLaMA beside `transformers`' own modules at the same batch: interleaved, medians.

    python benchmarks/training.py [--json FILE]

Both use SDPA attention, their own loss, the same AdamW, float32 and the same data. The limit is arithmetic: about
6 · parameters · tokens floating-point operations a step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from allyouneed.models import llama
from allyouneed.objectives.next_token import next_token

SIZES = {
    "2 M": ({"vocab_size": 2048, "dim": 160, "num_layers": 5, "num_heads": 5, "hidden_dim": 432}, 8, 128),
    "20 M": ({"vocab_size": 8192, "dim": 384, "num_layers": 8, "num_heads": 6, "hidden_dim": 1024}, 4, 128),
}
ROUNDS = 31
Loss = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]


def pair(sizes: dict[str, int]) -> tuple[torch.nn.Module, torch.nn.Module]:
    ours = llama.architecture(**sizes, context=512, tied=False).build()
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["dim"],
        intermediate_size=sizes["hidden_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_heads"],
        max_position_embeddings=512,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config), ours


def step_theirs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss


def step_ours(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return next_token(model, {"ids": ids[:, :-1], "targets": ids[:, 1:]}).mean


def step(model: torch.nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    loss(model, ids).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name, (sizes, batch, length) in SIZES.items():
        models = pair(sizes)
        counts = [sum(p.numel() for p in model.parameters()) for model in models]
        assert counts[0] == counts[1], counts
        optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
        ids = torch.randint(0, sizes["vocab_size"], (batch, length + 1))
        losses = (step_theirs, step_ours)
        agree = [loss(model, ids).item() for model, loss in zip(models, losses, strict=True)]
        assert all(abs(value - math.log(sizes["vocab_size"])) < 0.5 for value in agree), agree  # the same quantity
        sides = list(zip(models, losses, optimizers, strict=True))
        times = [[step(m, loss, o, ids) for m, loss, o in sides] for _ in range(ROUNDS + 3)][3:]
        peer, ours = (statistics.median(column) for column in zip(*times, strict=True))
        flops = 6 * counts[0] * batch * length
        rows.append(
            {
                "case": f"train step, {name}",
                "parameters": counts[0],
                "transformers_ms": peer * 1e3,
                "allyouneed_ms": ours * 1e3,
                "ratio": peer / ours,
                "allyouneed_gflop_s": flops / ours / 1e9,
            }
        )
        size = f"{counts[0] / 1e6:5.1f} M parameters, {batch} x {length} tokens"
        times_shown = f"transformers {peer * 1e3:7.1f} ms   allyouneed {ours * 1e3:7.1f} ms"
        print(
            f"train step, {size}   {times_shown}   x {peer / ours:.2f}   {flops / ours / 1e9:.0f} GFLOP/s", flush=True
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
