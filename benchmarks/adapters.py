"""Adapters by request with SmolLM2: 8 streams of the base beside 8 of the base and three adapters, interleaved.

    python benchmarks/adapters.py [--ranks 8 16 64] [--tokens N] [--rounds N] [--threads N] [--torch]
        [--json FILE]

One case after the other, forwards and backwards by turns: 8 streams that are continued, and a prompt of 256 tokens that
is read. With `--torch` also without the native program. Adapters are on all linear layers but the head; as many streams
have none as have each of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from turns import Seconds, seconds

import allyouneed as ayn
from allyouneed.adapt.layers import Lora
from allyouneed.adapt.lora import adapt, use
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.reading import TorchReader
from allyouneed.generate.requests import Request
from allyouneed.models.decoder import Decoder

NAME = "smollm2-135m-instruct"
STREAMS, PROMPT = 8, 16


def adapted(ranks: list[int]) -> Decoder:
    """SmolLM2 with an adapter of each rank, none in use."""
    module = ayn.load_module(NAME, packed=True)
    for i, rank in enumerate(ranks):
        adapt(module, Lora.Config(rank=rank, targets="all-linear"), f"a{i}")
    for part in module.modules():
        if isinstance(part, Lora):
            part.B.data.normal_(std=0.01)
    use(module, {})
    return module


def run(engine: Engine, adapters: list[str | None], tokens: int, prompt: int = PROMPT) -> None:
    """As many streams as adapters, each of so many tokens; a little further in the vocabulary each time."""
    for i, adapter in enumerate(adapters):
        sampling = Sampling(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
        ids = [1000 + 37 * i + k for k in range(prompt)]
        engine.add(Request(ids=ids, sampling=sampling, adapter=adapter))
    while not engine.idle:
        engine.step()


def cases(ranks: list[int], tokens: int) -> dict[str, Callable[[], None]]:
    config = Engine.Config(max_batch=STREAMS, blocks=256, share_prefixes=False)
    module = adapted(ranks)
    engine, slow = Engine(module, config=config), Engine(module, config=config)
    slow.reader = TorchReader(module, slow.tables.storage)  # type: ignore[assignment]
    plain = Engine(ayn.load_module(NAME, packed=True), config=config)
    base: list[str | None] = [None] * STREAMS
    mixed: list[str | None] = [
        [None, *(f"a{n}" for n in range(len(ranks)))][i % (1 + len(ranks))] for i in range(STREAMS)
    ]
    last: list[str | None] = [f"a{len(ranks) - 1}"]
    return {
        "decoding, a model without adapters": lambda: run(plain, base, tokens),
        "decoding, base only": lambda: run(engine, base, tokens),
        "decoding, base and adapters": lambda: run(engine, mixed, tokens),
        "decoding, base only, torch": lambda: run(slow, base, tokens),
        "decoding, base and adapters, torch": lambda: run(slow, mixed, tokens),
        "prompt, base": lambda: run(engine, [None], 1, 256),
        f"prompt, adapter of rank {ranks[-1]}": lambda: run(engine, last, 1, 256),
    }


def _kind(case: str) -> tuple[str, bool]:
    """What a case does, and whether PyTorch does it: these are compared."""
    return case.split(",")[0], "torch" in case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 8, 8])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sides = {
        name: case
        for name, case in cases(arguments.ranks, arguments.tokens).items()
        if arguments.torch or "torch" not in name
    }
    taken: dict[str, list[Seconds]] = {name: [] for name in sides}
    for number in range(1 + arguments.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            taken[name].append(seconds(sides[name]))
    rows = []
    for name, times in taken.items():
        beside = next(key for key in sides if _kind(key) == _kind(name))
        pairs = list(zip(times[1:], taken[beside][1:], strict=True))  # the first of each warms up
        clock, processor = (statistics.median(own[i] / other[i] for own, other in pairs) for i in range(2))
        took = statistics.median(time.clock for time in times[1:])
        rows.append({"case": name, "seconds": took, "ratio": clock, "processor_ratio": processor, "beside": beside})
        print(
            f"{name:36} {took:7.3f} s, x {clock:.3f} by the clock and x {processor:.3f} by processor time of {beside!r}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
