"""One training step of each family beside its peer – `transformers`' own modules, for the Transformer of 2017
`torch.nn.Transformer` – at the same batch: interleaved, medians.

    python benchmarks/training.py [FAMILY ...] [--rounds N] [--json FILE]

Both have the same weights, their own loss, the same AdamW, clipping to the same norm, float32 and the same data; that
they compute the same loss is asserted before anything is timed. Theirs is differentiated and clipped as PyTorch users
do it, ours as our training loop does. A ratio is the median over rounds of the peer's time over ours in
the same round, with the interval that encloses the true median with 95 %. The limit is arithmetic: the matrix products
of a step of ours, forward and backward, are counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from families import FAMILIES, Pair
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from turns import Case, turns

from allyouneed.evaluate.statistics import median
from allyouneed.train.gradients import differentiate
from allyouneed.train.ranks import join

ROUNDS, WARMUP, TOLERANCE = 31, 3, 1e-4


def steps(pair: Pair) -> tuple[Case, Case]:
    """One training step of theirs and of ours."""
    theirs, ours = (torch.optim.AdamW(model.parameters(), fused=True) for model in (pair.theirs, pair.ours))
    ranks, batch = join(), dict(pair.batch)

    def take_theirs() -> None:
        pair.their_loss(pair.theirs, batch).backward()
        torch.nn.utils.clip_grad_norm_(pair.theirs.parameters(), 1.0)
        theirs.step()
        theirs.zero_grad(set_to_none=True)

    def take_ours() -> None:
        differentiate(pair.ours, pair.objective, batch, ranks, clip=1.0)
        ours.step()
        ours.zero_grad(set_to_none=True)

    return take_theirs, take_ours


def products(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Floating-point operations of the matrix products of one step; of SDPA's kernels only this one's are counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    model.zero_grad()
    return counter.get_total_flops()


def measure(family: str, pair: Pair, rounds: int) -> dict[str, Any]:
    sides = list(zip((pair.theirs.train(), pair.ours.train()), pair.losses(), strict=True))
    peer, ours = (loss().item() for _, loss in sides)
    assert abs(peer - ours) <= TOLERANCE, f"{family}: the losses are {peer} and {ours}"
    found = turns(*steps(pair), rounds=rounds, warmup=WARMUP)
    ratios = median([theirs.clock / ours.clock for theirs, ours in found])
    clock = statistics.median(ours.clock for _, ours in found)
    return {
        "case": f"train step, {family}",
        "parameters": sum(p.numel() for p in pair.ours.parameters()),
        "batch": list(pair.batch["ids"].shape),
        "peer_ms": 1e3 * statistics.median(theirs.clock for theirs, _ in found),
        "allyouneed_ms": 1e3 * clock,
        "ratio": ratios.estimate,
        "ratio_interval": [ratios.low, ratios.high],
        "ratio_of_processor_time": median([theirs.processor / ours.processor for theirs, ours in found]).estimate,
        "allyouneed_gflop_s": products(*sides[1]) / clock / 1e9,
    }


def shown(family: str, row: dict[str, Any]) -> str:
    times = f"peer {row['peer_ms']:7.1f} ms   allyouneed {row['allyouneed_ms']:7.1f} ms"
    ratio = f"x {row['ratio']:.2f} [{row['ratio_interval'][0]:.2f}, {row['ratio_interval'][1]:.2f}]"
    work = f"processor time x {row['ratio_of_processor_time']:.2f}   {row['allyouneed_gflop_s']:.0f} GFLOP/s"
    return f"{family:12} {row['parameters'] / 1e6:5.1f} M   {times}   {ratio}   {work}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    strange = [family for family in arguments.families if family not in FAMILIES]
    if strange or arguments.rounds < 6:
        parser.error(f"no family {strange[0]!r}; one of {', '.join(FAMILIES)}" if strange else "--rounds: 6 at least")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    for family in arguments.families or FAMILIES:
        torch.manual_seed(0)
        rows.append(measure(family, FAMILIES[family](), arguments.rounds))
        print(shown(family, rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
