"""A mixture of experts beside `transformers`' Mixtral block: forward alone, and forward with backward.

The same weights and tokens, float32; outputs and gradients agree to 1e-5 before anything is timed. The peer computes
with either of its implementations: `grouped_mm`, which `MixtralForCausalLM` chooses by itself, and `eager`. Sides take
turns; a ratio is the median over rounds of the peer's time over ours in the same round.

    python benchmarks/experts.py --hidden 256 512 1024 --threads 1
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from turns import seconds

from allyouneed.nn.moe import GatedExperts, MoE
from allyouneed.nn.routers import TopK

TOLERANCE = 1e-5
PEERS = ("grouped_mm", "eager")


def peer(sizes: argparse.Namespace, hidden: int, implementation: str) -> MixtralSparseMoeBlock:
    config = MixtralConfig(
        hidden_size=sizes.dim,
        intermediate_size=hidden,
        num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.k,
        experts_implementation=implementation,
    )
    block = MixtralSparseMoeBlock(config)
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def ours(sizes: argparse.Namespace, hidden: int, theirs: MixtralSparseMoeBlock) -> MoE:
    experts = GatedExperts.Config(num_experts=sizes.experts, hidden_dim=hidden)
    module = MoE.Config(router=TopK.Config(k=sizes.k), experts=experts).build(sizes.dim)
    with torch.no_grad():
        module.router.weight.copy_(theirs.gate.weight)
        gate, up = theirs.experts.gate_up_proj.chunk(2, 1)
        for name, weight in (("gate", gate), ("up", up), ("out", theirs.experts.down_proj)):
            module.experts.get_submodule(name).weight.copy_(weight)
    return module


def check(module: MoE, block: MixtralSparseMoeBlock, x: Tensor) -> None:
    """Outputs and gradients are the same, that of each mean output being what training would send back."""
    found = []
    for side in (module, block):
        given = x.clone().requires_grad_()
        side.zero_grad()
        y = side(given)
        (y * y).mean().backward()
        found.append((y, given.grad))
    (y, to_x), (expected, to_x_expected) = found
    gate_up = torch.cat((module.experts.gate.weight.grad, module.experts.up.weight.grad), 1)
    pairs = [
        (y, expected),
        (to_x, to_x_expected),
        (gate_up, block.experts.gate_up_proj.grad),
        (module.experts.out.weight.grad, block.experts.down_proj.grad),
        (module.router.weight.grad, block.gate.weight.grad),
    ]
    for a, b in pairs:
        assert (a - b).abs().max() <= TOLERANCE, (a - b).abs().max()


def cases(side: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    def forward() -> None:
        with torch.no_grad():
            side(x)

    def both() -> None:
        side.zero_grad()
        given.grad = None
        side(given).sum().backward()

    given = x.clone().requires_grad_()
    return {"forward": forward, "forward, backward": both}


def compare(sizes: argparse.Namespace, hidden: int) -> list[dict[str, float | str]]:
    blocks = {name: peer(sizes, hidden, name) for name in PEERS}
    module, x = ours(sizes, hidden, blocks["eager"]), torch.randn(1, sizes.tokens, sizes.dim)
    for block in blocks.values():
        check(module, block, x)
    sides = {"ours": cases(module, x)} | {name: cases(block, x) for name, block in blocks.items()}
    rows: list[dict[str, float | str]] = []
    operations = 2 * sizes.tokens * sizes.k * 3 * sizes.dim * hidden
    for case, factor in (("forward", 1), ("forward, backward", 3)):
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(sizes.rounds + 1):
            names = list(sides) if number % 2 else list(reversed(sides))
            for name in names:
                took = seconds(sides[name][case]).clock
                if number:  # the first round warms up
                    times[name].append(took)
        middle = {name: statistics.median(found) for name, found in times.items()}
        row: dict[str, float | str] = {"case": case, "hidden": hidden, "ours_ms": 1e3 * middle["ours"]}
        row["GFLOP/s"] = factor * operations / middle["ours"] / 1e9
        for name in PEERS:
            row[f"{name}_ms"] = 1e3 * middle[name]
            row[f"ratio_{name}"] = statistics.median(t / o for t, o in zip(times[name], times["ours"], strict=True))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for hidden in arguments.hidden for row in compare(arguments, hidden)]
    for row in rows:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
