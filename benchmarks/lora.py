"""One step of adapting SmolLM2 by LoRA beside `peft` on `transformers`: interleaved; time and memory.

    python benchmarks/lora.py [--rounds N] [--rank R] [--targets q,v] [--json FILE]

Both have the weights of the same GGUF as float32, adapters of the same numbers on the same layers, the same batch of
4 × 256 tokens, every one of them a target, the same AdamW over the adapters and the same clipping; that they compute
the same loss and the same gradients is asserted before anything is timed. Theirs is differentiated and clipped as its
users do it, ours as our training loop does. A ratio is the median over rounds of the peer's time over ours in the same
round, with the interval that encloses the true median with 95 %. Memory is the most that PyTorch's allocator gives out
in a step beyond weights and optimiser, and with both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from turns import Case, turns

from allyouneed.adapt import lora
from allyouneed.adapt.layers import Lora
from allyouneed.data import materials
from allyouneed.data.corpora import corpus
from allyouneed.evaluate.memory import peak_allocated
from allyouneed.evaluate.statistics import median
from allyouneed.models.checkpoints.adapters import save_adapter
from allyouneed.models.checkpoints.loading import load_module, load_tokenizer
from allyouneed.objectives.next_token import IGNORED, next_token
from allyouneed.train.gradients import differentiate
from allyouneed.train.ranks import join

NAME, ROWS, LENGTH, TOLERANCE = "smollm2-135m-instruct", 4, 256, 1e-4


def their_base() -> nn.Module:
    path = materials.path(NAME)
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def pair(rank: int, targets: tuple[str, ...]) -> tuple[nn.Module, nn.Module]:
    """Theirs and ours, with the same adapters, whose B are no longer zero."""
    ours = load_module(NAME)
    lora.adapt(ours, Lora.Config(rank=rank, targets=targets))
    with torch.no_grad():
        for name, p in lora.parameters(ours).items():
            if name.endswith("B"):
                p.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(ours, folder, base=NAME)
        theirs = peft.PeftModel.from_pretrained(their_base(), folder, is_trainable=True)
    theirs.config.use_cache = False
    return theirs.train(), ours.train()


def text() -> dict[str, Tensor]:
    """The first tokens of a book, every one predicted but the first of each row."""
    ids = load_tokenizer(NAME).encode(corpus("shakespeare").train[0].text[: 16 * ROWS * LENGTH])
    rows = torch.tensor(ids[: ROWS * LENGTH]).view(ROWS, LENGTH)
    targets = torch.cat((rows[:, 1:], torch.full((ROWS, 1), IGNORED)), 1)
    return {"ids": rows, "targets": targets}


def steps(theirs: nn.Module, ours: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Case, Case]:
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (theirs, ours)]
    optimizers = [torch.optim.AdamW(some, lr=1e-4, fused=True) for some in trained]
    ranks = join()

    def take_theirs() -> None:
        theirs(input_ids=batch["ids"], labels=batch["ids"]).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained[0], 1.0)
        optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=True)

    def take_ours() -> None:
        differentiate(ours, next_token, batch, ranks, clip=1.0)
        optimizers[1].step()
        optimizers[1].zero_grad(set_to_none=True)

    return take_theirs, take_ours


def check(theirs: nn.Module, ours: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """The same loss, and gradients of the same norm."""
    found = []
    for model, loss in (
        (theirs, lambda: theirs(input_ids=batch["ids"], labels=batch["ids"]).loss),
        (ours, lambda: next_token(ours, batch).mean),
    ):
        value = loss()
        value.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        found.append((value.item(), norm.item()))
        model.zero_grad(set_to_none=True)
    (loss, norm), (other, another) = found
    assert abs(loss - other) <= TOLERANCE and abs(norm / another - 1) <= 1e-3, f"losses and norms are {found}"


def measure(rounds: int, rank: int, targets: tuple[str, ...]) -> dict[str, Any]:
    theirs, ours = pair(rank, targets)
    batch = text()
    check(theirs, ours, batch)
    sides = steps(theirs, ours, batch)
    found = turns(*sides, rounds=rounds, warmup=1)
    peaks = [peak_allocated(side) for side in sides]
    weights = [sum(p.nbytes * (3 if p.requires_grad else 1) for p in model.parameters()) for model in (theirs, ours)]
    ratios = median([peer.clock / own.clock for peer, own in found])
    return {
        "case": f"LoRA step, r = {rank} on {','.join(targets)}, {ROWS} x {LENGTH}",
        "trained": sum(p.numel() for p in ours.parameters() if p.requires_grad),
        "peer_ms": 1e3 * statistics.median(peer.clock for peer, _ in found),
        "allyouneed_ms": 1e3 * statistics.median(own.clock for _, own in found),
        "ratio": ratios.estimate,
        "ratio_interval": [ratios.low, ratios.high],
        "ratio_of_processor_time": median([peer.processor / own.processor for peer, own in found]).estimate,
        "peer_step_mb": peaks[0] / 1e6,
        "allyouneed_step_mb": peaks[1] / 1e6,
        "peer_mb": (weights[0] + peaks[0]) / 1e6,
        "allyouneed_mb": (weights[1] + peaks[1]) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="q,v", help="ends of our names of layers")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds < 6:
        parser.error("--rounds: 6 at least")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    row = measure(arguments.rounds, arguments.rank, tuple(arguments.targets.split(",")))
    for name, value in row.items():
        print(f"{name:24} {value if not isinstance(value, float) else f'{value:.3f}'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "cases": [row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
