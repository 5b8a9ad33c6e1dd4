"""A batch job: every row of one JSONL file answered in another, in order, whatever happens in between.

Answers gather in a folder beside the target, `out.jsonl.partial`; the target appears when all are there, whole. A job
that was killed goes on after the last whole line. What rows may say is `rows`' business.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allyouneed.core.errors import InputError
from allyouneed.core.files import read_json, replacing, sync, write_json
from allyouneed.core.progress import Progress
from allyouneed.data import jsonl
from allyouneed.generate.in_order import InOrder, Place
from allyouneed.generate.language_model import Completion, LanguageModel, Queue, Sampling, spread
from allyouneed.generate.rows import read

SYNCED = 1.0  # seconds: what a power cut loses at most of what was written


@dataclass
class Summary:
    """What a job did. Rows of earlier runs count as `resumed`; `errors` are all there are in the target."""

    rows: int
    resumed: int
    errors: int
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


def run(
    lm: LanguageModel,
    source: Path,
    target: Path,
    sampling: Sampling,
    *,
    ahead: int | None = None,
    quiet: bool = False,
) -> Summary:
    """Answer the rows of `source` in `target`. With a seed, row i (blank lines apart) draws from `seed + i`.

    A row that is wrong gets a line that says so. What is not a row's fault ends the job, which may be run again.

    Args:
        ahead: how many rows are in memory at once (`InOrder`); those behind an unfinished one are lost by a kill.

    Raises:
        InputError: no such source, the target is there, or half-done by another job; a key or a model is refused.
        RemoteError: an endpoint failed for good.
    """
    started, rows = time.monotonic(), sum(1 for _ in jsonl.lines(source))
    if target.exists():
        raise InputError(f"{target} is there already; remove it, or name another file")
    with _answers(target, _told(lm, source, sampling)) as answers:
        resumed, errors = _kept(answers)
        summary = Summary(rows, resumed, errors)
        numbered = itertools.islice(enumerate(jsonl.lines(source)), resumed, None)
        asked = (read(number, line, spread(sampling, i)) for i, (number, _, line) in numbered)
        with (
            _stopping(lm.queue()) as queue,
            _adding(answers) as add,
            Progress("generate", rows, unit="row", done=resumed, quiet=quiet) as progress,
        ):
            for places in InOrder(queue, asked, ahead).finished():
                add([_line(place, summary) for place in places])
                progress.update(len(places), errors=summary.errors)
        _finish(answers, target)
    summary.seconds = time.monotonic() - started
    return summary


def _line(place: Place, summary: Summary) -> dict[str, Any]:
    """The line that answers a row, or refuses it."""
    if isinstance(place.outcome, Completion):
        assert not isinstance(place.row, dict)
        summary.prompt_tokens += place.outcome.prompt_tokens
        summary.completion_tokens += place.outcome.completion_tokens
        return place.row.answered(place.outcome)
    summary.errors += 1
    return place.row if isinstance(place.row, dict) else place.row.refused(place.outcome or "")


@contextmanager
def _answers(target: Path, told: dict[str, Any]) -> Iterator[Path]:
    """Where answers gather, of this job and of one process alone."""
    from filelock import FileLock, Timeout

    folder = target.with_name(target.name + ".partial")
    try:
        if not folder.exists():
            with replacing(folder) as temporary:
                temporary.mkdir()
                write_json(temporary / "job.json", told)
        with FileLock(folder / "lock", timeout=0):
            before = read_json(folder / "job.json")
            differs = [name for name in told if not isinstance(before, dict) or before.get(name) != told[name]]
            if differs:
                raise InputError(
                    f"{folder} is of a job with another {' and '.join(differs)}; remove it, or go on as then"
                )
            yield folder / "answers.jsonl"
    except Timeout:
        raise InputError(f"{folder}: another process is at this job") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(folder)) from None


def _told(lm: LanguageModel, source: Path, sampling: Sampling) -> dict[str, Any]:
    """What makes a job the same one."""
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"model": lm.name, "input": digest, "sampling": json.loads(json.dumps(sampling.to_json()))}


def _kept(answers: Path) -> tuple[int, int]:
    """How many whole lines there are, and how many of them are errors; what a kill left behind them is cut off."""
    kept = errors = size = 0
    if answers.exists():
        with answers.open("r+b") as file:
            for line in file:
                if line.endswith(b"\n"):
                    kept, size, errors = kept + 1, size + len(line), errors + bool(json.loads(line).get("error"))
            file.truncate(size)
    return kept, errors


@contextmanager
def _adding(answers: Path) -> Iterator[Callable[[Sequence[dict[str, Any]]], None]]:
    """Adds lines: they outlive this process at once, and the power `SYNCED` seconds later, or when this ends."""
    synced = time.monotonic()

    def add(lines: Sequence[dict[str, Any]]) -> None:
        nonlocal synced
        file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
        file.flush()
        if time.monotonic() - synced > SYNCED:
            os.fsync(file.fileno())
            synced = time.monotonic()

    with answers.open("ab") as file:
        try:
            yield add
        finally:
            os.fsync(file.fileno())


@contextmanager
def _stopping(queue: Queue) -> Iterator[Queue]:
    try:
        yield queue
    finally:  # also on Ctrl-C
        queue.stop()


def _finish(answers: Path, target: Path) -> None:
    answers.replace(target)
    sync(target.parent)
    shutil.rmtree(answers.parent)
