"""`list`, `show`, `run`, `publish`: the papers on the command line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from allyouneed.core.errors import InputError
from allyouneed.papers import catalogue
from allyouneed.papers.table import GROUPS

_COLOURS = {"holds": "32", "fails": "31", "inconclusive": "33", "no result yet": "36", "not built": "2"}


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("list")(list_papers)
    app.command("show")(show)
    app.command("run")(run)
    app.command("publish")(publish)


def list_papers(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, for programs.")] = False,
) -> None:
    """The fifty-one papers and their state."""
    entries = catalogue.papers()
    if as_json:
        print(json.dumps([asdict(entry) | {"url": entry.url} for entry in entries], indent=1, ensure_ascii=False))
        return
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 80), 120)
    for letter, title in GROUPS.items():
        print(f"{_painted(f'{letter}. {title}', '1')}")
        print("\n".join(_line(entry, width) for entry in entries if entry.group == letter) + "\n")
    print(_count(entries))


def show(slug: Annotated[str, typer.Argument(help="A name from `allyouneed list`.")]) -> None:
    """What a paper claims, how it is tested here, what was found."""
    entry = catalogue.find(slug)
    print(f"{_painted(f'{entry.number}. {entry.title}', '1')}")
    print(f"{entry.authors}, {entry.year}  {entry.url}\n{entry.gist}.\n")
    if entry.state == "not built":
        print("not built")
        return
    for name, text in catalogue.docstring(slug).sections.items():
        print(f"{_painted(name, '1')}\n{_indented(text)}\n")
    _show_result(slug)


def run(
    slug: Annotated[str, typer.Argument(help="A name from `allyouneed list`.")],
    size: Annotated[str, typer.Option(help="smoke (seconds), laptop (minutes) or paper (as published).")] = "laptop",
    seeds: Annotated[int | None, typer.Option(help="How many seeds, instead of the size's own number.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a setting; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where run folders go, instead of runs/.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Do the jobs at once on a Ray cluster: its address, or local for this machine.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew even if a stopped run could go on.")] = False,
) -> None:
    """Test a paper's claim on this machine. Ctrl-C stops; the same command goes on from there."""
    from allyouneed.core.workers import in_turn, over_ray
    from allyouneed.papers import runner

    workers = over_ray(ray) if ray else in_turn
    runner.run(slug, size, seeds=seeds, overrides=overrides or (), out=out, fresh=fresh, workers=workers)


def publish(
    slug: Annotated[str | None, typer.Argument(help="The paper whose result to publish.")] = None,
    run_dir: Annotated[Path | None, typer.Argument(help="Its run folder; else the newest laptop run.")] = None,
    pages: Annotated[bool, typer.Option("--pages", help="Only rewrite docs/papers/ and docs/architecture.md.")] = False,
) -> None:
    """Copy a laptop run to results/ and rewrite the papers' pages."""
    from allyouneed.papers import architecture_page
    from allyouneed.papers import publish as publishing

    if pages == (slug is not None):
        raise InputError("publish: give either a paper's name or --pages")
    written = publishing.publish(slug, run_dir) if slug else [*publishing.write_pages(), *architecture_page.write()]
    for path in written:
        print(path)


def _line(entry: catalogue.Entry, width: int) -> str:
    room = width - 46
    title = entry.title if len(entry.title) <= room else entry.title[: room - 1].rstrip() + "…"
    state = entry.result or ("no result yet" if entry.state == "built" else "not built")
    return f"{entry.number:>3}  {entry.slug:<18}  {entry.year}  {title:<{room}}  {_painted(state, _COLOURS[state])}"


def _count(entries: Iterable[catalogue.Entry]) -> str:
    states = [entry.result or entry.state for entry in entries]
    parts = [f"{states.count(state)} {state}" for state in ("holds", "fails", "inconclusive") if state in states]
    built = sum(state != "not built" for state in states)
    return f"{len(states)} papers, {built} built" + "".join(f", {part}" for part in parts)


def _show_result(slug: str) -> None:
    from allyouneed.papers import pages

    report = catalogue.result(slug)
    if report is None:
        print(f"No result published yet; allyouneed run {slug}")
        return
    print(_painted(pages.sentence(report), _COLOURS[report["verdict"]]))
    for name, value, interval, bound, outcome in pages.check_rows(report):
        print(f"  {outcome:<9}  {name}: {value} (95 %: {interval}; bound {bound})")
    print(f"  {report['evidence']}, {len(report['seeds'])} seeds, {catalogue.HOME / 'results' / slug}.svg")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _painted(text: str, code: str) -> str:
    """`text` in a colour (an SGR code), where a person looks and has not refused colours."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"
