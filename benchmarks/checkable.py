"""What a chat model scores on instructions that can be checked (`data.checkable`), by kind, greedily answered.

    python benchmarks/checkable.py [MODEL] [--beside MODEL] [--tasks N] [--trained] [--samples FILE]

One row a kind and one for all, the mean score of held-out tasks with its 95 % bootstrap interval over tasks, and the
share that meets every requirement; with `--beside`, by how much the score is above another model's at the same tasks.
`--trained` asks the tasks that may be trained on. `--samples` writes prompts, answers and scores as JSON lines.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import allyouneed as ayn
from allyouneed.data.checkable import TEMPLATES, Task, tasks
from allyouneed.evaluate.statistics import bootstrap
from allyouneed.generate.language_model import Sampling

TOKENS = 64


@dataclass(frozen=True)
class Answered:
    """A task, what a model answered, and the score of another model's answer."""

    task: Task
    answer: str
    other: float | None

    @property
    def score(self) -> float:
        return self.task.score(self.answer)


def row(name: str, some: list[Answered]) -> str:
    scores = [one.score for one in some]
    whole = sum(score == 1 for score in scores) / len(scores)
    line = f"{name:8}  {len(scores):5}  {told(scores)}  {whole:7.3f}"
    gains = [one.score - one.other for one in some if one.other is not None]
    return f"{line}  {told(gains)}" if gains else line


def told(values: list[float]) -> str:
    found = bootstrap(values)
    return f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"


def answers(model: str, asked: list[Task]) -> list[str]:
    prompts = [[{"role": "user", "content": task.prompt}] for task in asked]
    found = ayn.load(model).complete(prompts, Sampling(max_new_tokens=TOKENS, temperature=0.0))
    return [one.text for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--beside")
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--samples", type=Path)
    options = parser.parse_args()
    asked = tasks(options.tasks, seed=0, held_out=not options.trained)
    others: list[float | None] = [None] * len(asked)
    if options.beside:
        others = [task.score(one) for task, one in zip(asked, answers(options.beside, asked), strict=True)]
    found = [Answered(*one) for one in zip(asked, answers(options.model, asked), others, strict=True)]
    above = f"  above {options.beside}" if options.beside else ""
    print(f"kind      tasks  mean score            all met{above}")
    for kind in TEMPLATES:
        print(row(kind, [one for one in found if one.task.kind == kind]))
    print(row("all", found))
    if options.samples:
        lines = [
            {"prompt": x.task.prompt, "answer": x.answer, "parts": x.task.each(x.answer), "score": x.score}
            for x in found
        ]
        options.samples.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
