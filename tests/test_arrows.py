"""Which room may import from which: the table of the design, held against every import statement of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import allyouneed

PACKAGE = Path(allyouneed.__file__).parent
SHARED = {
    "core": set(),
    "nn": {"core"},
    "data": {"core"},
    "models": {"adapt", "nn", "data", "core"},
    "adapt": {"nn", "core"},
    "objectives": {"nn", "core"},
    "train": {"core"},
    "generate": {"models", "adapt", "nn", "data", "core"},
    "align": {"generate", "objectives", "adapt", "models", "nn", "data", "core"},
    "execute": {"core"},
    "retrieve": {"generate", "models", "data", "core"},
    "synthesize": {"generate", "execute", "retrieve", "data", "core"},
    "agents": {"generate", "retrieve", "data", "core"},
    "evaluate": {"generate", "execute", "data", "core"},
    "serve": {"generate", "core"},
}
ROOMS = SHARED | {
    "papers": set(SHARED),
    "club": {*SHARED, "papers"},
    "commands": {*SHARED, "papers", "club"},
    "cli": {"core", "commands"},
    "__main__": {"cli"},
}
FRAME = {"base", "catalogue", "checks", "docstrings", "figures", "pages", "provenance", "publish", "runner", "schema"}
FRAME |= {"aligned", "frontiers", "standing", "architecture_page", "ladders", "table", "__init__"}

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules of this package that a file imports anywhere in it, as paths below `allyouneed`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (tuple(n.split(".")[1:]) for n in names if n.split(".")[0] == "allyouneed" and "." in n)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_looks_only_into_the_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS, f"{path}: the design has no room {room!r}"
    for target in imports(path):
        assert target[0] in ROOMS[room] | {room}, f"{path}: {room} must not import {'.'.join(target)}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "papers").glob("*.py")), ids=lambda path: path.stem)
def test_papers_stand_on_the_frame_and_never_on_each_other(path: Path) -> None:
    names = {target[1] for target in imports(path) if target[0] == "papers" and len(target) > 1}
    others = {name for name in names if (PACKAGE / "papers" / f"{name}.py").exists()} - FRAME
    assert not others, f"{path} imports the papers {sorted(others)}"


def test_the_public_face_imports_no_room_before_it_is_asked() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    eager = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert all("allyouneed" not in ast.unparse(node) for node in eager)


def test_the_table_itself_has_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(ROOMS):
        ready = [room for room in ROOMS if room not in order and ROOMS[room] <= set(order)]
        assert ready, f"a cycle among {set(ROOMS) - set(order)}"
        order += ready
