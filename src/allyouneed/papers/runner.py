"""Runs a paper's experiment in a folder of its own, goes on where a stopped run was, and writes the report.

`runs/<slug>/<time>/` holds config.json (what was started), jobs/ (finished work and checkpoints), the figures,
report.json and report.md. A run is unfinished while it has no report.json. Under `torchrun` all ranks run it in the
folder of the first, which alone writes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from allyouneed.core import devices
from allyouneed.core.config import Config
from allyouneed.core.errors import InputError, unknown
from allyouneed.core.files import read_json, write_json, write_text
from allyouneed.core.workers import Workers, in_turn
from allyouneed.papers import catalogue, pages, provenance
from allyouneed.papers.base import SIZES, Paper, Report
from allyouneed.papers.schema import validate
from allyouneed.train.ranks import Ranks, join

RUNS = Path("runs")


def run(
    slug: str,
    size: str = "laptop",
    *,
    seeds: int | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    fresh: bool = False,
    quiet: bool = False,
    workers: Workers = in_turn,
) -> dict[str, Any]:
    """Test a paper's claim and return the report, which is also written under `out` (default: `runs`).

    A run of the same paper, size, configuration, seeds and code that was stopped is taken up again, unless `fresh`.
    `workers` do the jobs: one after another in this process, or many at once (`core.workers.over_ray`).

    Raises:
        InputError: unknown slug, size or override, or a paper that is not built.
    """
    paper = catalogue.load(slug)
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    if seeds is not None and seeds < 1:
        raise InputError(f"seeds: {seeds}, but a run needs at least 1")
    config = paper.sizes[size].override(*overrides)
    count = seeds or paper.seeds[size]
    identity = _identity(slug, size, config, count)
    ranks = join()
    if ranks.world > 1 and workers is not in_turn:
        raise InputError("jobs go over Ray or this run is one of torchrun's ranks, not both; leave one of them out")
    quiet = quiet or ranks.rank > 0
    with _open_together((out or RUNS) / slug, identity, fresh, ranks) as (folder, sittings):
        evidence = "paper scale" if size == "paper" else paper.evidence
        report = Report(
            slug=slug,
            seeds=range(count),
            folder=folder.resolve(),
            evidence=evidence,
            quiet=quiet,
            ranks=ranks,
            workers=workers,
        )
        if not quiet:
            print(_opening(paper, slug, size, folder, sittings), file=sys.stderr, flush=True)
        stated, started = _stated(slug, size, config, sittings), time.monotonic()
        paper.run(config, report)
        finished = _complete(stated, report, time.monotonic() - started)
        if ranks.rank == 0:
            _write(folder, finished)
    if not quiet:
        _show(finished, folder)
    return finished


def config_json(config: Config) -> dict[str, Any]:
    """A configuration as a report holds it."""
    return cast("dict[str, Any]", json.loads(json.dumps(config.to_json())))


def finished_runs(folder: Path) -> list[Path]:
    """The folders of finished runs in `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob("*/report.json"))


def _identity(slug: str, size: str, config: Config, seeds: int) -> dict[str, Any]:
    """What two runs must share for one to be the continuation of the other."""
    return {
        "slug": slug,
        "size": size,
        "seeds": seeds,
        "code": provenance.digest(),
        "config": config_json(config),
    }


@contextmanager
def _open_together(root: Path, identity: dict[str, Any], fresh: bool, ranks: Ranks) -> Iterator[tuple[Path, int]]:
    """The folder that the first rank opens, and which sitting this is, on all ranks."""
    if ranks.rank == 0:
        with _open_folder(root, identity, fresh) as opened:
            yield ranks.told(opened)
    else:
        yield ranks.told((root, 0))


@contextmanager
def _open_folder(root: Path, identity: dict[str, Any], fresh: bool) -> Iterator[tuple[Path, int]]:
    """The folder to work in and which sitting this is: of the newest unfinished run that is the same and that nobody
    is working on, or a new one.
    """
    for path in sorted(root.glob("*/config.json"), reverse=True):
        begun = read_json(path)
        sittings = begun.pop("sittings")
        if fresh or begun != identity or (path.parent / "report.json").exists():
            continue
        with _claimed(path.parent) as free:
            if free:
                write_json(path, identity | {"sittings": sittings + 1})
                yield path.parent, sittings + 1
                return
    folder = _new_folder(root)
    with _claimed(folder):
        write_json(folder / "config.json", identity | {"sittings": 1})
        yield folder, 1


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether the folder is ours until the end; the system lets go of it when the process dies."""
    from filelock import FileLock, Timeout

    (folder / "jobs").mkdir(exist_ok=True)
    lock = FileLock(folder / "jobs" / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _new_folder(root: Path) -> Path:
    stem = datetime.now().strftime("%Y%m%d-%H%M%S")
    for name in (stem, *(f"{stem}-{i}" for i in range(2, 100))):
        try:
            (root / name).mkdir(parents=True)
        except FileExistsError:
            continue
        return root / name
    raise AssertionError(f"a hundred runs of {root} in one second")


def _opening(paper: Paper, slug: str, size: str, folder: Path, sittings: int) -> str:
    minutes = paper.minutes.get(size)
    estimate = (
        f"about {minutes:g} min on two cores"
        if minutes
        else "the published architecture and optimiser, which want GPUs"
    )
    again = "; taking up the run that was stopped" if sittings > 1 else ""
    return f"{catalogue.find(slug).title}\n{slug}, size {size}: {estimate}; in {folder}{again}"


def _stated(slug: str, size: str, config: Config, sittings: int) -> dict[str, Any]:
    """What a report says that is known before the run: afterwards somebody may have changed the code."""
    return {
        "slug": slug,
        "size": size,
        "claim": catalogue.docstring(slug).sections["Claim"],
        "config": config_json(config),
        "commit": provenance.commit(),
        "versions": devices.versions(),
        "machine": devices.machine(),
        "sittings": sittings,
    }


def _complete(stated: dict[str, Any], report: Report, elapsed: float) -> dict[str, Any]:
    """The whole report, its fields in the order people read them."""
    whole = stated | report.to_json() | {"seconds": round(elapsed + report.seconds_before, 1)}
    validate(whole)
    return {name: whole[name] for name in pages.ORDER}


def _write(folder: Path, report: dict[str, Any]) -> None:
    write_text(folder / "report.md", pages.report_text(report))
    write_json(folder / "report.json", report)  # last: from here on the run counts as finished


def _show(report: dict[str, Any], folder: Path) -> None:
    """The verdict as a table, and where to look further."""
    from rich.console import Console
    from rich.table import Table

    colours = {"holds": "green", "fails": "red", "inconclusive": "yellow"}
    shown = Table("check", "measured", "95 % interval", "bound", "outcome", title=pages.sentence(report))
    shown.title_style = f"bold {colours[report['verdict']]}"
    for row in pages.check_rows(report):
        shown.add_row(*row)
    console = Console(highlight=False)
    console.print(shown)
    for path in [folder / figure["png"] for figure in report["figures"]] + [folder / "report.md"]:
        console.print(str(path), soft_wrap=True, markup=False)
