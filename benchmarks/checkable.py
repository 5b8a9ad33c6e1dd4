"""What a chat model scores on instructions that can be checked (`data.checkable`), by kind, greedily answered.

    python benchmarks/checkable.py [MODEL ...] [--beside MODEL] [--tasks N] [--trained] [--samples FILE]

One row a kind and one for all, the mean score of held-out tasks with its 95 % bootstrap interval over tasks, and the
share that meets every requirement; with `--beside`, by how much the score is above another model's at the same tasks.
Of several models, trained with several seeds, a task has the mean of its scores; what each of them gains is told with
the 95 % interval of Student's t. `--trained` asks the tasks that may be trained on. `--samples` writes prompts, answers
and scores as JSON lines.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import allyouneed as ayn
from allyouneed.data.checkable import TEMPLATES, Task, tasks
from allyouneed.evaluate.statistics import bootstrap, student_t
from allyouneed.generate.language_model import Sampling

TOKENS = 64


@dataclass(frozen=True)
class Answered:
    """A task, what each model answered, and the score of another model's answer."""

    task: Task
    answers: tuple[str, ...]
    other: float | None

    @property
    def scores(self) -> list[float]:
        return [self.task.score(answer) for answer in self.answers]

    @property
    def score(self) -> float:
        return fmean(self.scores)


def row(name: str, some: list[Answered]) -> str:
    whole = fmean(score == 1 for one in some for score in one.scores)
    line = f"{name:8}  {len(some):5}  {told([one.score for one in some])}  {whole:7.3f}"
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
    parser.add_argument("models", nargs="*", default=["smollm2-135m-instruct"])
    parser.add_argument("--beside")
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--samples", type=Path)
    options = parser.parse_args()
    asked = tasks(options.tasks, seed=0, held_out=not options.trained)
    others: list[float | None] = [None] * len(asked)
    if options.beside:
        others = [task.score(one) for task, one in zip(asked, answers(options.beside, asked), strict=True)]
    each = zip(*(answers(model, asked) for model in options.models), strict=True)
    found = [Answered(*one) for one in zip(asked, each, others, strict=True)]
    above = f"  above {options.beside}" if options.beside else ""
    print(f"kind      tasks  mean score            all met{above}")
    for kind in TEMPLATES:
        print(row(kind, [one for one in found if one.task.kind == kind]))
    print(row("all", found))
    if options.beside and len(options.models) > 1:
        gains = [fmean(one.scores[i] - one.other for one in found) for i in range(len(options.models))]
        of_all = student_t(gains)
        print(f"\ngain of each: {', '.join(f'{gain:.3f}' for gain in gains)}")
        print(f"of all, over models: {of_all.estimate:.3f} [{of_all.low:.3f}, {of_all.high:.3f}]")
    if options.samples:
        lines = [
            {"prompt": x.task.prompt, "answer": one, "parts": x.task.each(one), "score": x.task.score(one)}
            for x in found
            for one in x.answers
        ]
        options.samples.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
