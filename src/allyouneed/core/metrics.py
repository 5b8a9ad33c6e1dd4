"""Metrics as JSON lines: one object a line, appended and flushed, readable while the run goes on and after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from allyouneed.core.files import write_text


class MetricsLog:
    """Appends metrics to a `.jsonl` file.

    Resuming at step `n` drops the lines written after it, so that a run that was killed and went on
    leaves the same file as one that never stopped.
    """

    def __init__(self, path: Path, *, resume_at: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read(self.path) if resume_at is not None and r.get("step", 0) <= resume_at]
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self.file = self.path.open("a")

    def write(self, **values: Any) -> None:
        """Append one line."""
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a kill is passed over."""
    if not Path(path).exists():
        return
    for line in Path(path).read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
