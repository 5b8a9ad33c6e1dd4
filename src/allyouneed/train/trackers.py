"""Callbacks that show a run's curves in the trackers people use. Both packages come with `allyouneed[track]`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allyouneed.core.errors import InputError


class TensorBoard:
    """Writes event files into `folder`; a run taken up again hides what was logged past its checkpoint."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = str(folder)
        self.writer: Any = None
        self.package = _package("torch.utils.tensorboard", "tensorboard")

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        if self.writer is None:
            self.writer = self.package.SummaryWriter(self.folder, purge_step=step)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def on_end(self) -> None:
        """Write out what is still in memory."""
        if self.writer is not None:
            self.writer.close()


class Trackio:
    """Logs to run `name` of trackio's `project`, on this machine unless trackio is told otherwise."""

    def __init__(self, project: str, name: str | None = None) -> None:
        self.project, self.name = project, name
        self.package = _package("trackio", "trackio")
        self.run: Any = None

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        if self.run is None:
            self.run = self.package.init(project=self.project, name=self.name, resume="allow")
        self.run.log(dict(metrics), step=step)

    def on_end(self) -> None:
        """Send what is still to be sent."""
        if self.run is not None:
            self.run.finish()


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{package} is not installed; pip install 'allyouneed[track]' brings it") from None
