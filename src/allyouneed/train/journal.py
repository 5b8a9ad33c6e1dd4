"""What a run has measured: kept in memory, written to `metrics.jsonl`, shown to callbacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from allyouneed.core.metrics import MetricsLog, read
from allyouneed.train.checkpoints import writing

Row = dict[str, Any]  # "step" and numbers by name


class Callback(Protocol):
    """Looks on at a run."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called for every row that is logged."""

    def on_end(self) -> None:
        """Called once when the run is over, however it ended."""


class Journal:
    """The rows of a run that has come to `step`; later ones, of a run that went on and was killed, are dropped.

    Without a folder nothing is written. A context manager.
    """

    def __init__(self, folder: Path | None, step: int, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks, self.rows, self.log = tuple(callbacks), list[Row](), None
        if folder is not None:
            self.path = folder / "metrics.jsonl"
            with writing(self.path):
                self.log = MetricsLog(self.path, keep=lambda row: row["step"] <= step)
            self.rows = list(read(self.path))

    def record(self, row: Row) -> None:
        """Add a row.

        Raises:
            InputError: the disk is full.
        """
        self.rows.append(row)
        if self.log is not None:
            with writing(self.path):
                self.log.write(**row)
        for callback in self.callbacks:
            callback.on_step(row["step"], {name: x for name, x in row.items() if name != "step"})

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        for callback in self.callbacks:
            callback.on_end()
        if self.log is not None:
            with writing(self.path):
                self.log.close()
