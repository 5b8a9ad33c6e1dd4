"""Prompt lookup, early exit and a draft model beside plain decoding: one run, in turns, greedy, one request at a time.

    python benchmarks/speculation.py [--json FILE] [--rounds N]

Tasks that copy (code edits, corrections, summaries by quotation) and tasks that cannot. Tokens must be the same.
Prompts are read once, before the turns that count: what is compared is writing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from turns import turns

import allyouneed as ayn
from allyouneed.generate.drafting import Draft, EarlyExit
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.local import LocalModel
from allyouneed.generate.speculation import PromptLookup, Speculator

NAME, NEW = "smollm2-135m-instruct", 160
CODE = """def read_config(path):
    with open(path) as handle:
        lines = handle.readlines()
    values = {}
    for line in lines:
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, value = line.split("=", 1)
        values[key.strip()] = value.strip()
    return values


def write_config(path, values):
    with open(path, "w") as handle:
        for key, value in values.items():
            handle.write(key + " = " + value)
"""
TEXT = (
    "The lighthouse at Cape Morrow was built in 1862 by the enginer Thomas Hale after three ships were lost on the "
    "rocks in a single winter. It stands forty metres tall, is made of grey granit, and its lamp can be seen from "
    "thirty kilometres away. For ninety years a family of keepers, the Brennans, lived in the cottage beside the tower "
    "and lit the lamp every evning. In 1953 the lamp was made electric, and the last keeper moved to the village."
)
COPYING = {
    "code edit": f"Rename `values` to `settings` in this code and print it again:\n\n```python\n{CODE}```",
    "code, repeated": f"Repeat this code exactly:\n\n```python\n{CODE}```",
    "correction": f"Fix the spelling mistakes in this text and write the whole text again:\n\n{TEXT}",
    "summary": f"Summarize this text in three sentences:\n\n{TEXT}",
}
FREE = {
    "story": "Write a short story about a lighthouse keeper and a whale.",
    "history": "Tell me about the history of bread.",
    "explanation": "Explain how a bicycle stays upright.",
    "plan": "Plan a three day trip to Rome.",
}


def tokens_of(engine: Engine, ids: Sequence[int], into: list[int]) -> None:
    into[:] = [step.token for step in engine.steps([ids], [Sampling(max_new_tokens=NEW, temperature=0)])]


def speculators(lm: LocalModel) -> dict[str, Callable[[], Speculator]]:
    layers = lm.module.config.num_layers
    return {
        "prompt lookup": PromptLookup,
        f"early exit, {layers // 3} of {layers} layers": lambda: EarlyExit(layers // 3),
        f"early exit, {4 * layers // 5} of {layers} layers": lambda: EarlyExit(4 * layers // 5),
        "draft, the model itself": lambda: Draft(lm.module),
    }


def compared(lm: LocalModel, make: Callable[[], Speculator], prompt: str, rounds: int) -> dict[str, float]:
    """Plain decoding and one way of guessing in turns: their ratio, and what became of the drafts."""
    ids = lm.tokenizer.encode(lm.chat_prompt([{"role": "user", "content": prompt}]))
    config = Engine.Config(max_batch=1)
    plain, guessing = (Engine(lm.module, lm.tokenizer.eos_ids, config, one) for one in (None, make()))
    found: list[list[int]] = [[], []]
    sides = [partial(tokens_of, engine, ids, into) for engine, into in zip((plain, guessing), found, strict=True)]
    timed = turns(*sides, rounds=rounds, warmup=1)
    if found[0] != found[1]:
        raise SystemExit(f"tokens differ: {prompt!r}")
    made = guessing.statistics()
    return {
        "tokens": len(found[0]),
        "plain_tok_s": len(found[0]) / statistics.median(one.clock for one, _ in timed),
        "ratio": statistics.median(one.clock / other.clock for one, other in timed),
        "ratio_of_processor_time": statistics.median(one.processor / other.processor for one, other in timed),
        "drafts_a_token": made.drafts / made.made,
        "kept": made.kept / max(1, made.drafts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="ways of guessing whose name begins so")
    arguments = parser.parse_args()
    lm, rows = ayn.load(NAME), []
    assert isinstance(lm, LocalModel)
    chosen = {name: make for name, make in speculators(lm).items() if name.startswith(arguments.only)}
    for name, make in chosen.items():
        for kind, tasks in (("copying", COPYING), ("free", FREE)):
            found = {task: compared(lm, make, prompt, arguments.rounds) for task, prompt in tasks.items()}
            rows += [{"how": name, "kind": kind, "task": task} | one for task, one in found.items()]
            for task, one in found.items():
                drafts = f"{one['drafts_a_token']:4.2f} drafts a token, {one['kept']:4.0%} kept"
                gain = f"x {one['ratio']:4.2f} (processor x {one['ratio_of_processor_time']:4.2f})"
                print(f"{name:32} {kind:8} {task:15} {one['plain_tok_s']:6.1f} tok/s {gain}   {drafts}")
            mean = statistics.geometric_mean(one["ratio"] for one in found.values())
            print(f"{name:32} {kind:8} {'mean':15} {'':12} x {mean:4.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
