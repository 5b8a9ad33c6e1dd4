"""What a chat model scores on instructions that can be checked (`data.checkable`), by kind, greedily answered.

    python benchmarks/checkable.py [MODEL] [--tasks N] [--trained] [--samples FILE]

One row a kind and one for all, the mean score of held-out tasks with its 95 % bootstrap interval over tasks, and the
share that meets every requirement. `--trained` asks the tasks that may be trained on. `--samples` writes prompts,
answers and scores as JSON lines.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import allyouneed as ayn
from allyouneed.data.checkable import TEMPLATES, Task, tasks
from allyouneed.evaluate.statistics import bootstrap
from allyouneed.generate.language_model import Sampling

TOKENS = 64


def row(name: str, asked: list[tuple[Task, str]]) -> str:
    scores = [task.score(answer) for task, answer in asked]
    found, whole = bootstrap(scores), sum(score == 1 for score in scores) / len(scores)
    return f"{name:8}  {len(scores):5}  {found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]  {whole:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--samples", type=Path)
    options = parser.parse_args()
    asked = tasks(options.tasks, seed=0, held_out=not options.trained)
    prompts = [[{"role": "user", "content": task.prompt}] for task in asked]
    answers = ayn.load(options.model).complete(prompts, Sampling(max_new_tokens=TOKENS, temperature=0.0))
    pairs = [(task, one.text) for task, one in zip(asked, answers, strict=True)]
    print("kind      tasks  mean score            all met")
    for kind in TEMPLATES:
        print(row(kind, [pair for pair in pairs if pair[0].kind == kind]))
    print(row("all", pairs))
    if options.samples:
        lines = [
            json.dumps({"prompt": t.prompt, "answer": a, "parts": t.each(a), "score": t.score(a)}) for t, a in pairs
        ]
        options.samples.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
