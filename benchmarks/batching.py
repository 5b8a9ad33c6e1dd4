"""Continuous beside static batching with SmolLM2 on one mixed load: interleaved, tokens asked for per second.

    python benchmarks/batching.py [--requests N] [--batch N] [--rounds N] [--json FILE]

Prompts and answers have lengths of a long tail, drawn with a seed: most are short, few are long. All requests are there
from the beginning. Static batching takes them in batches as they come: a batch is read together and runs until its
longest answer is done, and the rest of its rows with it (Yu et al. 2022, sec. 2), as `transformers.generate` does. In
the third row, finished ones leave a static batch, but none joins it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

from turns import Seconds, seconds

import allyouneed as ayn
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling

NAME = "smollm2-135m-instruct"
Load = list[tuple[list[int], int]]  # a prompt, and how many tokens are asked for


def load(requests: int, seed: int = 0) -> Load:
    """Lognormal lengths: prompts of median 17 and answers of median 12 tokens, at most 96 each."""
    source = random.Random(seed)
    found = []
    for _ in range(requests):
        prompt, answer = (min(96, 1 + int(source.lognormvariate(mean, 1.0))) for mean in (2.8, 2.4))
        found.append(([source.randrange(10, 40000) for _ in range(prompt)], answer))
    return found


def run(engine: Engine, part: Load, *, until: int | None = None) -> int:
    """Generate for some requests, for each `until` tokens or as many as it asks for; how many came."""
    samplings = [Sampling(max_new_tokens=until or answer, temperature=0, ignore_eos=True) for _, answer in part]
    return sum(1 for _ in engine.steps([prompt for prompt, _ in part], samplings))


def sides(mixed: Load, batch: int) -> dict[str, Callable[[], object]]:
    module = ayn.load_module(NAME, packed=True)
    engine = Engine(module, config=Engine.Config(max_batch=batch, share_prefixes=False))
    whole = Engine(module, config=Engine.Config(max_batch=batch, share_prefixes=False, chunk=1 << 20))
    parts = [mixed[start : start + batch] for start in range(0, len(mixed), batch)]
    return {
        "continuous": lambda: run(engine, mixed),
        "static": lambda: [run(whole, part, until=max(answer for _, answer in part)) for part in parts],
        "static, finished rows leave": lambda: [run(whole, part) for part in parts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    mixed = load(arguments.requests)
    asked = sum(answer for _, answer in mixed)
    print(f"{len(mixed)} requests, {sum(len(prompt) for prompt, _ in mixed)} tokens of prompts, {asked} of answers")
    cases = sides(mixed, arguments.batch)
    run(Engine(ayn.load_module(NAME, packed=True)), mixed[:2])  # warm up
    taken: dict[str, list[Seconds]] = {name: [] for name in cases}
    for number in range(arguments.rounds):
        for name in list(cases)[:: 1 if number % 2 else -1]:
            taken[name].append(seconds(cases[name]))
    rows = []
    for name, times in taken.items():
        pairs = list(zip(times, taken["continuous"], strict=True))
        clock, processor = (statistics.median(other[i] / own[i] for other, own in pairs) for i in range(2))
        rate = asked / statistics.median(time.clock for time in times)
        rows.append({"case": name, "tok_s": rate, "ratio": clock, "processor_ratio": processor})
        ratios = f"continuous is x {clock:.2f} by the clock, x {processor:.2f} by processor time"
        print(f"{name:30} {rate:8.1f} tok/s   {ratios}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
