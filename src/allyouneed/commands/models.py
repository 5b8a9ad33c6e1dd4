"""`generate`, `score`, `eval`: asking a language model, local or remote."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from allyouneed.core.errors import InputError, unknown

if TYPE_CHECKING:
    from allyouneed.generate.language_model import LanguageModel, Sampling

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A material, a folder, a hub id, a .gguf file or an endpoint's URL.")
]
Tokens = Annotated[int, typer.Option("--max-new-tokens", help="The most to generate.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that together reach this probability.")]
TopK = Annotated[int, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less than this times as likely as the likeliest.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1 makes repetition less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")]
Quantize = Annotated[
    str | None, typer.Option(metavar="KIND", help="Weights in few bits: int8 or int4, or nf4 or fp4, which is slower.")
]
Timeout = Annotated[float | None, typer.Option(help="Seconds to wait for the next byte of an endpoint; without, 120.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for programs.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("generate")(generate)
    app.command("score")(score)
    app.command("eval")(evaluate)


def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts, or IN.jsonl OUT.jsonl; without any, standard input is one.")
    ] = None,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    schema: Annotated[Path | None, typer.Option(help="A JSON schema that the text satisfies.")] = None,
    regex: Annotated[str, typer.Option(help="What the text matches as a whole.")] = "",
    quantize: Quantize = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts: one is written as it comes, several one after the other.

    IN.jsonl OUT.jsonl answers each row of a file, {"prompt": "…"} or {"messages": […]} with sampling fields of its own,
    in another; a row that is wrong gets a line that says so. Run again, it goes on where it was.
    """
    from dataclasses import asdict

    from allyouneed.core.files import read_json
    from allyouneed.generate.language_model import Sampling
    from allyouneed.generate.load import load

    prompts = prompts or [sys.stdin.read()]
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        json_schema="" if schema is None else json.dumps(read_json(schema)),
        regex=regex,
    )
    files = _files(prompts)
    lm = load(model, quantize=quantize, timeout=timeout)
    if files:
        _answer_rows(lm, *files, sampling, as_json)
    elif as_json:
        for prompt, completion in zip(prompts, lm.complete(prompts, sampling), strict=True):
            print(json.dumps({"prompt": prompt} | asdict(completion), ensure_ascii=False))
    elif len(prompts) == 1:
        write(lm.stream(prompts[0], sampling))
    else:
        for completion in lm.complete(prompts, sampling):
            print(completion.text)


def score(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What comes before.")],
    continuations: Annotated[list[str], typer.Argument(help="What may follow; spaces count.")],
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """The log-probability of each continuation of a prompt, in nats, the likeliest first."""
    from allyouneed.generate.load import load

    scores = load(model, timeout=timeout).score([prompt] * len(continuations), continuations)
    ranked = sorted(zip(continuations, scores, strict=True), key=lambda pair: -pair[1])
    for continuation, value in ranked:
        if as_json:
            print(json.dumps({"continuation": continuation, "logprob": value}, ensure_ascii=False))
        else:
            print(f"{value:10.4f}  {continuation!r}")


def evaluate(
    model: Model,
    tasks: Annotated[str | None, typer.Option(help="Names with commas between; without, all of them.")] = None,
    shots: Annotated[int, typer.Option(help="Solved examples before each question.")] = 4,
    questions: Annotated[int, typer.Option(help="How many questions of each task.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy on short tasks with options, with 95 % intervals, under each way to weigh an option's likelihood."""
    from allyouneed.evaluate.options import accuracy, fewshot, score_options
    from allyouneed.evaluate.tasks import tasks as all_tasks
    from allyouneed.generate.load import load

    known = {task.name: task for task in all_tasks()}
    chosen = tasks.split(",") if tasks else list(known)
    for name in chosen:
        if name not in known:
            raise unknown("task", name, known)
    lm = load(model, timeout=timeout)
    for name in chosen:
        task = known[name]
        asked = [
            fewshot(task.questions, question, shots, seed, description=f"{task.description}\n\n")
            for question in task.questions[:questions]
        ]
        found = accuracy(asked, score_options(lm, asked))
        if as_json:
            values = {way: [i.estimate, i.low, i.high] for way, i in found.items()}
            print(json.dumps({"task": name, "shots": shots, "chance": task.chance} | values))
        else:
            shown = "   ".join(f"{way} {interval}" for way, interval in found.items())
            print(f"{name:<12} chance {task.chance:.2f}   {shown}")


def _files(prompts: list[str]) -> tuple[Path, Path] | None:
    """The two files of a batch job, told by their names from prompts."""
    named = [prompt for prompt in prompts if prompt.endswith(".jsonl")]
    if len(named) == len(prompts) == 2:
        return Path(named[0]), Path(named[1])
    if any(Path(name).is_file() for name in named):
        raise InputError(f"{named[0]} is a file: write IN.jsonl OUT.jsonl, the rows and where their answers go")
    return None


def _answer_rows(lm: LanguageModel, source: Path, target: Path, sampling: Sampling, as_json: bool) -> None:
    from dataclasses import asdict

    from allyouneed.core.progress import clock
    from allyouneed.generate.job import run

    done = run(lm, source, target, sampling)
    if as_json:
        print(json.dumps({"out": str(target)} | asdict(done)))
    else:
        before = f", {done.resumed} of them before" if done.resumed else ""
        print(
            f"{target}: {done.rows} rows{before}, {done.errors} with an error; "
            f"{done.completion_tokens} tokens in {clock(done.seconds)}"
        )


def write(pieces: Iterator[str]) -> None:
    """Write a text as it comes."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
