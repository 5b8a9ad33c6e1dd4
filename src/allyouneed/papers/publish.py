"""From a run to the repository: `results/<slug>.json` and `.svg`, then the pages made from docstrings and results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allyouneed.core.errors import InputError
from allyouneed.core.files import read_json, replacing, write_json, write_text
from allyouneed.papers import catalogue, pages
from allyouneed.papers.provenance import DIRTY
from allyouneed.papers.runner import RUNS, config_json, finished_runs
from allyouneed.papers.schema import validate


def publish(slug: str, run_folder: Path | None = None) -> list[Path]:
    """Copy a finished laptop run (default: the newest) to `results/`, rewrite the pages, return what was written.

    Raises:
        InputError: no such run, a malformed report, or one that does not show what the paper's module states:
            another size, other settings, fewer seeds, or code that was not committed.
    """
    catalogue.find(slug)
    folder = run_folder or _newest(slug)
    report = read_json(folder / "report.json")
    validate(report)
    _refuse_unfit(slug, report, folder)
    results = catalogue.HOME / "results"
    written = []
    for i, figure in enumerate(report["figures"]):
        target = results / pages.published_figure(slug, figure["name"], i)
        _copy(folder / figure["svg"], target)
        written.append(target)
    write_json(results / f"{slug}.json", report)
    return [results / f"{slug}.json", *written, *write_pages()]


def write_pages() -> list[Path]:
    """Rewrite the pages under `docs/papers/` that docstrings and results no longer agree with; return those."""
    stale = [path for path, text in rendered().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        write_text(path, rendered()[path])
    return stale


def rendered() -> dict[Path, str]:
    """Every page under `docs/papers/` as it should be."""
    folder, entries = catalogue.HOME / "docs" / "papers", catalogue.papers()
    texts = {folder / "README.md": pages.index(entries)}
    for entry in entries:
        if entry.state == "built":
            texts[folder / f"{entry.slug}.md"] = pages.page(
                entry, catalogue.docstring(entry.slug), catalogue.result(entry.slug)
            )
    return texts


def _newest(slug: str) -> Path:
    laptop = [f for f in finished_runs(RUNS / slug) if read_json(f / "report.json").get("size") == "laptop"]
    if not laptop:
        raise InputError(f"no finished laptop run in {RUNS / slug}; first: allyouneed run {slug}")
    return laptop[-1]


def _refuse_unfit(slug: str, report: dict[str, Any], folder: Path) -> None:
    paper = catalogue.load(slug)
    commit, seeds = report["commit"], len(report["seeds"])
    faults: Sequence[tuple[bool, str]] = (
        (report["slug"] != slug, f"it is a run of {report['slug']!r}"),
        (report["size"] != "laptop", f"its size is {report['size']!r}, and only laptop runs are published"),
        (report["config"] != config_json(paper.sizes["laptop"]), "its settings are not the laptop size of this code"),
        (seeds < paper.seeds["laptop"], f"it has {seeds} seeds, and {paper.seeds['laptop']} belong to the laptop size"),
        (commit.endswith(DIRTY), "its code was not committed; commit, then run again"),
        (commit == "unknown", "nobody knows its commit; run from a clone of the repository"),
    )
    for fault, words in faults:
        if fault:
            raise InputError(f"{folder}: cannot be published: {words}")


def _copy(source: Path, target: Path) -> None:
    try:
        data = source.read_bytes()
    except OSError as error:
        raise InputError(f"{source}: {os.strerror(error.errno or 0)}") from None
    with replacing(target) as temporary:
        temporary.write_bytes(data)
