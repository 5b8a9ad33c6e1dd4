"""Metrics as JSON lines: one object a line, appended and flushed, readable while the run goes on and after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from allyouneed.core.files import write_text


class MetricsLog:
    """Appends metrics to a `.jsonl` file.

    Args:
        path: the file.
        keep: of the lines that are there already; the others are dropped. A run that was killed and goes on keeps those
            up to where it does, and leaves the same file as one that never stopped.
    """

    def __init__(self, path: Path, *, keep: Callable[[dict[str, Any]], bool] = lambda row: False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in read(self.path) if keep(row)))
        self.file = self.path.open("a")

    def write(self, **values: Any) -> None:
        """Append one line.

        Raises:
            OSError: the disk is full; names the file.
        """
        with self._named():
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Close the file. What could not be written before is tried once more, with the same error."""
        with self._named():
            self.file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a kill is passed over."""
    if not Path(path).exists():
        return
    for line in Path(path).read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
