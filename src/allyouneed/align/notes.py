"""What is measured of rollouts: kept in memory, and in a file that a run which was killed goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from allyouneed.core.metrics import MetricsLog


class Notes:
    """Rows with a `step`, the number of the rollout. Of rollouts that are made again after a kill the old lines go.

    >>> notes = Notes()
    >>> notes.add({"step": 1, "reward": 0.5})
    >>> notes.rows
    [{'step': 1, 'reward': 0.5}]
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()
        self._log: MetricsLog | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)
        if self.path is not None:
            self._log = self._log or MetricsLog(self.path, keep=lambda old: old["step"] < row["step"])
            self._log.write(**row)
