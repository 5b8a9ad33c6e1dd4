"""The docstring of a paper's module, which is also its page: a heading, then sections `Claim`, `Here`, `Apart`, ...

A section opens with its name in the first column, followed by two or more spaces and text; lines that belong to it
are indented:

    Claim   what must be true if the paper is right,
            in words that an experiment can contradict.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

SECTIONS = ("Claim", "Here", "Apart")  # every paper has these; more are welcome

_OPENING = re.compile(r"([A-Z][a-z]+)(?:\s{2,}(\S.*))?")


@dataclass(frozen=True)
class Docstring:
    """A paper module's own words: `heading` (title, source and whatever precedes the sections) and `sections`."""

    heading: str
    sections: dict[str, str]


def read(path: Path) -> Docstring:
    """The docstring of a source file, which is parsed and not run."""
    return parse(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def parse(text: str) -> Docstring:
    """Split a docstring into heading and sections.

    >>> parse("Title (2020).\\n\\nClaim   longer\\n        is better.\\nHere    small").sections
    {'Claim': 'longer\\nis better.', 'Here': 'small'}
    """
    heading: list[str] = []
    sections: dict[str, list[str]] = {}
    lines = heading
    for line in text.splitlines():
        opening = _OPENING.fullmatch(line.rstrip())
        if opening:
            lines = sections.setdefault(opening[1], [])
            lines.append(opening[2] or "")
        else:
            lines.append(line)
    return Docstring("\n".join(heading).strip(), {name: _body(found) for name, found in sections.items()})


def _body(lines: list[str]) -> str:
    """A section's text with the indentation of its continuation lines taken off; deeper lines keep their depth."""
    return f"{lines[0]}\n{dedent(chr(10).join(lines[1:]))}".strip()
