"""The list of papers as it stands: what each claims, whether it is built here, and what its experiment found.

Importing this imports no paper: claims are read from the source files, verdicts from `results/` of the repository.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from allyouneed.core.errors import InputError, unknown
from allyouneed.core.files import read_json
from allyouneed.papers import docstrings, table

if TYPE_CHECKING:
    from allyouneed.papers.base import Paper

FOLDER = Path(__file__).resolve().parent
HOME = FOLDER.parents[2]  # the repository; an installed package has no results and no pages


@dataclass(frozen=True)
class Entry(table.Row):
    """A row of the list with what is known here: the claim under test, the state and the published verdict."""

    claim: str | None
    state: str  # "built" or "not built"
    result: str | None  # "holds", "fails", "inconclusive"; None before anything is published


def papers() -> list[Entry]:
    """The fifty-one, in list order.

    >>> entries = papers()
    >>> len(entries), entries[18].slug, entries[18].year
    (51, 'alibi', 2021)
    """
    return [_entry(row) for row in table.PAPERS]


def find(slug: str) -> Entry:
    """The entry called `slug`.

    Raises:
        InputError: no such paper; the nearest names are given.
    """
    for row in table.PAPERS:
        if row.slug == slug:
            return _entry(row)
    raise unknown("paper", slug, [row.slug for row in table.PAPERS])


def built() -> list[str]:
    """The slugs whose system stands, in list order."""
    return [row.slug for row in table.PAPERS if source_file(row.slug)]


def load(slug: str) -> Paper:
    """Import the experiment of a paper.

    Raises:
        InputError: no such paper, or one that is not built.
    """
    if find(slug).state != "built":
        raise InputError(f"paper {slug!r} is not built yet; built: {', '.join(built()) or 'none'}")
    return cast("Paper", importlib.import_module(f"allyouneed.papers.{slug}").PAPER)


def source_file(slug: str) -> Path | None:
    """The module that builds a paper, `papers/<slug>.py`, or None."""
    path = FOLDER / f"{slug}.py"
    return path if path.exists() else None


def docstring(slug: str) -> docstrings.Docstring:
    """What the module of a built paper says about itself; nothing is imported."""
    path = source_file(slug)
    assert path is not None, f"{slug} is not built"
    return docstrings.read(path)


def result(slug: str) -> dict[str, Any] | None:
    """The published report of a paper, or None."""
    path = HOME / "results" / f"{slug}.json"
    return cast("dict[str, Any]", read_json(path)) if path.exists() else None


def _entry(row: table.Row) -> Entry:
    if not source_file(row.slug):
        return Entry(**vars(row), claim=None, state="not built", result=None)
    report = result(row.slug)
    claim = docstring(row.slug).sections.get("Claim")
    return Entry(**vars(row), claim=claim, state="built", result=report["verdict"] if report else None)
