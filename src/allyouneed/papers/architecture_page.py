"""`docs/architecture.md`: every named architecture as its list of parts, read from the configurations. Text out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from allyouneed.core.config import Config
from allyouneed.core.files import write_text
from allyouneed.models.architectures import (
    Architecture,
    architectures,
    by_parts,
    outline,
    parts,
    sized_facts,
    sizes_in,
)
from allyouneed.papers import catalogue
from allyouneed.papers.pages import markdown_table, number

INTRODUCTION = """\
# Architectures, each as its list of parts

Written by `allyouneed publish --pages` from the configurations in `src/allyouneed/models`; a test holds it to them.
A new module there appears by itself. Each part is a class in `src/allyouneed/nn`, and any of them may be exchanged:
`config.replace(positions=Alibi.Config())` is the same architecture with ALiBi.
"""
# columns of the table: which parts they hold, by the name of a part's place and whether that is inside of a block
_COLUMNS: dict[str, Callable[[str, bool], bool]] = {
    "blocks": lambda place, inside: place in ("blocks", "layers"),
    "tokens are mixed by": lambda place, inside: place in ("mixer", "cross", "cell"),
    "each by itself by": lambda place, inside: place == "channel",
    "norms": lambda place, inside: place == "norm" and inside,
    "placed": lambda place, inside: place == "placement",
    "positions": lambda place, inside: place == "positions",
    "on the embeddings": lambda place, inside: place == "embedding_norm",
    "at the end": lambda place, inside: place == "norm" and not inside,
}


def page() -> str:
    """The whole page."""
    found = architectures()
    head = ("architecture", "model", *_COLUMNS)
    table = markdown_table(head, [_row(one, next(iter(group.values()))) for one in found for group in _groups(one)[:1]])
    return "\n\n".join((INTRODUCTION.rstrip(), table, _LEGEND, *map(_section, found))) + "\n"


def write() -> list[Path]:
    """Rewrite the page if it is out of date; return what was written."""
    path, text = target(), page()
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return []
    write_text(path, text)
    return [path]


def target() -> Path:
    """Where the page stands."""
    return catalogue.HOME / "docs" / "architecture.md"


_LEGEND = """\
Below, values that are defaults of a part are left out, and so is what makes no difference to a trained model; numbers
that differ from size to size stand in the tables. Parameters are those of the configuration, counted without allocating
them."""


def _groups(one: Architecture) -> list[dict[str, Config]]:
    return by_parts(one.sizes)


def _row(one: Architecture, config: Config) -> list[str]:
    (_, model), *found = parts(config)
    places = [([name for name in path if not name.isdigit()], part) for path, part in found]
    cells = [
        _cell([part for (*around, place), part in places if holds(place, bool({"blocks", "layers"} & set(around)))])
        for holds in _COLUMNS.values()
    ]
    return [f"[{one.title}](#{_anchor(one)})", _cell([model]), *cells]


def _cell(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names)) or "–"


def _section(one: Architecture) -> str:
    said = [f'<a id="{_anchor(one)}"></a>\n\n## {one.title}', one.words]
    for group in _groups(one):
        lines = outline(next(iter(group.values())), sized_facts(group))
        lines[-1] = lines[-1].rstrip(",")
        said += ["```\n" + "\n".join(lines) + "\n```", _sizes(group)]
    return "\n\n".join(said)


def _sizes(group: dict[str, Config]) -> str:
    if "" in group:
        return "No size of it is listed here."
    rows = sizes_in(group)
    columns = list(next(iter(rows.values())))
    named = [[name, *(number(row[column]) for column in columns)] for name, row in rows.items()]
    return markdown_table(("size", *columns), named)


def _anchor(one: Architecture) -> str:
    return one.module.replace("_", "-")
