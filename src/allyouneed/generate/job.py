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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from allyouneed.core.errors import InputError, RemoteError
from allyouneed.core.files import read_json, replacing, sync, write_json
from allyouneed.core.progress import Progress
from allyouneed.data import jsonl
from allyouneed.generate.language_model import AccessError, Completion, LanguageModel, Sampling, spread
from allyouneed.generate.rows import Row, read

AT_ONCE = 64  # rows asked for together and then written: as many are lost at most, and asked for again
ROWS_FAULT = {400, 413, 422}  # statuses that speak of the request; after any other, the next row would fare no better


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
    at_once: int = AT_ONCE,
    quiet: bool = False,
) -> Summary:
    """Answer the rows of `source` in `target`. With a seed, row i (blank lines apart) draws from `seed + i`.

    A row that is wrong gets a line that says so. What is not a row's fault ends the job, which may be run again.

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
        with answers.open("ab") as file, Progress("generate", rows, unit="row", done=resumed, quiet=quiet) as progress:
            while part := list(itertools.islice(numbered, at_once)):
                asked = {i: read(number, line, spread(sampling, i)) for i, (number, _, line) in part}
                _append(file, _answered(lm, asked, summary))
                progress.update(len(part), errors=summary.errors)
        _finish(answers, target)
    summary.seconds = time.monotonic() - started
    return summary


def _answered(lm: LanguageModel, asked: Mapping[int, Any], summary: Summary) -> list[dict[str, Any]]:
    """The lines that answer rows and lines that refuse them, in order."""
    found = _ask(lm, {i: row for i, row in asked.items() if not isinstance(row, dict)})
    lines = []
    for i, row in asked.items():
        answer = found.get(i)
        if isinstance(answer, Completion):
            summary.prompt_tokens += answer.prompt_tokens
            summary.completion_tokens += answer.completion_tokens
            lines.append(row.answered(answer))
        else:
            summary.errors += 1
            lines.append(row if answer is None else row.refused(answer))
    return lines


def _ask(lm: LanguageModel, rows: Mapping[int, Row]) -> dict[int, Completion | str]:
    """A completion for each row, or what is wrong with it. One bad row refuses those asked for with it: what did not
    come back is asked for again, by halves.
    """
    if not rows:
        return {}
    try:
        found = lm.complete([row.prompt for row in rows.values()], [row.sampling for row in rows.values()])
        return dict(zip(rows, found, strict=True))
    except AccessError:
        raise
    except (InputError, RemoteError) as error:
        if isinstance(error, RemoteError) and error.status not in ROWS_FAULT:
            raise RemoteError(
                f"{error}; what was answered before is kept: run it again to go on", error.status
            ) from None
        if len(rows) == 1:
            return dict.fromkeys(rows, str(error).removeprefix("request 0: "))
        places, came = list(rows), error.done if isinstance(error, RemoteError) else {}
    done: dict[int, Completion | str] = {places[i]: completion for i, completion in came.items()}
    left = [i for i in places if i not in done]
    for half in (left[: len(left) // 2], left[len(left) // 2 :]):
        done |= _ask(lm, {i: rows[i] for i in half})
    return done


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


def _append(file: BinaryIO, lines: Sequence[dict[str, Any]]) -> None:
    file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())


def _finish(answers: Path, target: Path) -> None:
    answers.replace(target)
    sync(target.parent)
    shutil.rmtree(answers.parent)
