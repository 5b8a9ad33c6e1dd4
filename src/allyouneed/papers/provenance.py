"""Which code made a number: the commit for readers, a digest of the sources for resuming."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
DIRTY = "+dirty"


def commit() -> str:
    """The commit of the code, with `+dirty` where the sources differ from it; "unknown" outside a repository."""
    root = PACKAGE.parents[1]
    if not (root / ".git").exists():
        return "unknown"
    head = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", "src", "pyproject.toml")
    return (head or "unknown") + (DIRTY if changed else "")


def digest() -> str:
    """A digest of the package's sources. Runs resume only under the very code they were started with."""
    total = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in {".py", ".cpp"}):
        total.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        return ""
