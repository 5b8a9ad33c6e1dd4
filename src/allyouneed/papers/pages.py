"""The words around a result: report.md of a run, the page of a paper, the index of all. Text in, text out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from allyouneed.core.progress import clock
from allyouneed.papers import table
from allyouneed.papers.catalogue import Entry
from allyouneed.papers.docstrings import Docstring

ORDER = (  # of the fields of a report
    *("slug", "size", "claim", "verdict", "evidence", "checks", "arms", "tables", "notes", "figures", "curves"),
    *("seeds", "config", "commit", "versions", "machine", "seconds", "sittings"),
)
_EVIDENCE = {
    "closed form": "The numbers are computed, not sampled: nothing is left to chance.",
    "small world": "The models and the data are miniatures, trained here from nothing; "
    "what holds among them need not hold at the paper's size.",
    "real weights": "The model is a real pretrained one, small beside the paper's.",
    "paper scale": "The published architecture and optimiser were run.",
}
_OUTCOME = {True: "passed", False: "failed", None: "undecided"}


def sentence(report: Mapping[str, Any]) -> str:
    """The verdict in one sentence."""
    found = {"holds": "the claim holds", "fails": "the claim fails", "inconclusive": "the runs do not decide"}
    return f"{report['slug']}, size {report['size']}: {found[report['verdict']]}"


def check_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Per check: name, value, interval, bound, outcome."""
    return [
        (c["name"], number(c["value"]), _interval(c), _bound(c["bound"]), _OUTCOME[c["passed"]])
        for c in report["checks"]
    ]


def report_text(report: Mapping[str, Any]) -> str:
    """`report.md` of a run."""
    parts = [
        f"# {sentence(report)}",
        report["claim"],
        *_measured(report, [(figure["svg"], figure["caption"]) for figure in report["figures"]]),
        "## How sure",
        _sureness(report),
        _origin(report),
    ]
    return "\n\n".join(parts) + "\n"


def page(entry: Entry, words: Docstring, report: Mapping[str, Any] | None) -> str:
    """The page of a built paper, `docs/papers/<slug>.md`, with its published result where there is one."""
    parts = [
        f"# {entry.number}. {entry.title}",
        f"{entry.authors}, {entry.year} · <{entry.url}>",
        f"*{entry.gist}.*",
        f"**{_standing(report)}**",
        "## What was claimed",
        words.sections["Claim"],
        "## How it was tested",
        words.sections["Here"],
        *(_published(report) if report else []),
        "## What stays unshown",
        words.sections["Apart"],
        *(f"## {name}\n\n{text}" for name, text in words.sections.items() if name not in ("Claim", "Here", "Apart")),
        "## Run it again",
        f"```\nallyouneed run {entry.slug}\n```",
        *([_origin(report)] if report else []),
        "## Citation",
        entry.citation,
    ]
    return "\n\n".join(parts) + "\n"


def index(entries: Sequence[Entry]) -> str:
    """The table of all papers, `docs/papers/README.md`."""
    count = sum(entry.state == "built" for entry in entries)
    parts = ["# The fifty-one papers", f"{count} of {len(entries)} are built. Numbers are those of the reading list."]
    for letter, title in table.GROUPS.items():
        rows = [_index_row(entry) for entry in entries if entry.group == letter]
        parts += [f"## {letter}. {title}", markdown_table(("#", "paper", "year", "in a sentence", "state"), rows)]
    return "\n\n".join(parts) + "\n"


def published_figure(slug: str, name: str, position: int) -> str:
    """File name in `results/` of a report's figure: the first bears the paper's name alone."""
    return f"{slug}.svg" if position == 0 else f"{slug}-{name}.svg"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what looks like a tag of HTML is shown as it is written.

    >>> print(markdown_table(("a", "b"), [("< 1", "<b>x|y</b>")]))
    | a | b |
    | --- | --- |
    | < 1 | &lt;b>x\\|y&lt;/b> |
    """
    escaped = [[re.sub(r"<(?=[A-Za-z/!])", "&lt;", cell).replace("|", "\\|") for cell in row] for row in rows]
    cells = [head, ["---"] * len(head), *escaped]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def number(value: Any) -> str:
    """A cell's text; numbers with four digits that count.

    >>> number(0.123456), number(1234567), number(12345.678), number("x"), number(None), number(True)
    ('0.1235', '1 234 567', '12 346', 'x', '–', 'yes')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or 1e4 <= abs(value) < 1e15:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.4g}"


def _standing(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "No result published yet."
    return {
        "holds": "The claim holds here.",
        "fails": "The claim fails here.",
        "inconclusive": "Inconclusive: the runs do not decide.",
    }[report["verdict"]]


def _published(report: Mapping[str, Any]) -> list[str]:
    figures = [
        (f"../../results/{published_figure(report['slug'], figure['name'], i)}", figure["caption"])
        for i, figure in enumerate(report["figures"])
    ]
    return [*_measured(report, figures), "## How sure one may be", _sureness(report)]


def _measured(report: Mapping[str, Any], figures: Sequence[tuple[str, str]]) -> list[str]:
    """Figures, checks, arms, tables and notes, under their heading."""
    parts = ["## What was measured", *(f"![{caption}]({path})\n\n{caption}" for path, caption in figures)]
    parts.append(markdown_table(("check", "measured", "95 % interval", "bound", "outcome"), check_rows(report)))
    if report["arms"]:
        parts.append(_records([{"arm": name} | facts for name, facts in report["arms"].items()]))
    for shown in report["tables"]:
        parts += [f"**{shown['name']}**", _records(shown["rows"])]
    return [*parts, *report["notes"]]


def _records(rows: Sequence[Mapping[str, Any]]) -> str:
    head = list(dict.fromkeys(key for row in rows for key in row))
    return markdown_table(head, [[number(row.get(key)) for key in head] for row in rows])


def _sureness(report: Mapping[str, Any]) -> str:
    """Seeds, where the intervals come from, what kind of evidence it is, what is undecided."""
    seeds = len(report["seeds"])
    methods = sorted({check["method"] for check in report["checks"]})
    undecided = [check["name"] for check in report["checks"] if check["passed"] is None]
    lines = [
        f"- Evidence: {report['evidence']}. {_EVIDENCE[report['evidence']]}",
        f"- {seeds} {'seed' if seeds == 1 else 'seeds'}; spread of the checks: {'; '.join(methods)}.",
        "- A check passes when its whole interval keeps the bound, fails when its whole interval breaks it, "
        "and is undecided otherwise; one failed check fails the claim.",
    ]
    if undecided:
        lines.append(f"- Undecided: {', '.join(undecided)}.")
    return "\n".join(lines)


def _origin(report: Mapping[str, Any]) -> str:
    """Where and with what the numbers were made."""
    machine, versions = report["machine"], report["versions"]
    sittings = "" if report["sittings"] == 1 else f" in {report['sittings']} sittings"
    return (
        f"Took {clock(report['seconds'])}{sittings} on {machine['cores']} cores of {machine['processor']} "
        f"({machine['memory_gib']} GiB, {machine['device']}), "
        f"with {', '.join(f'{name} {version}' for name, version in versions.items())}, "
        f"commit {report['commit'][:12]}{'+dirty' if report['commit'].endswith('+dirty') else ''}."
    )


def _index_row(entry: Entry) -> tuple[str, ...]:
    title = f"[{entry.title}]({entry.slug}.md)" if entry.state == "built" else entry.title
    state = entry.result or ("no result yet" if entry.state == "built" else "not built")
    return str(entry.number), f"`{entry.slug}` {title}", str(entry.year), entry.gist, state


def _interval(check: Mapping[str, Any]) -> str:
    if check["interval"] is None:
        return "unknown"
    low, high = map(number, check["interval"])
    return "exact" if check["method"] == "exact" else f"{low} … {high}"


def _bound(bound: Mapping[str, float | None]) -> str:
    signs = {"above": ">", "below": "<"}
    return " and ".join(f"{signs[end]} {number(value)}" for end, value in bound.items() if value is not None)
