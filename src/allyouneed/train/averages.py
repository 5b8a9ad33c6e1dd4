"""Averages of a module's weights: a moving one along the training, and the mean of its last checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from allyouneed.core.errors import InputError
from allyouneed.train import checkpoints
from allyouneed.train.sharding import local


class Ema:
    """Keeps ē ← d·ē + (1 − d)·w for every trainable weight w, beginning with the first weights.

    >>> module = nn.Linear(1, 1, bias=False)
    >>> _ = module.weight.data.fill_(0.0)
    >>> ema = Ema(module, decay=0.9)
    >>> _ = module.weight.data.fill_(1.0)
    >>> ema.update()
    >>> round(ema.weights["weight"].item(), 6)
    0.1
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.watched = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.watched.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights of now."""
        for name, parameter in self.watched.items():
            self.weights[name].lerp_(parameter, 1.0 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the module computes with the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """Exchange contents, not tensors: a sharded parameter's storage is known to more than the parameter."""
        with torch.no_grad():
            for name, parameter in self.watched.items():
                weights, average = local(parameter), local(self.weights[name])
                before = weights.clone()
                weights.copy_(average)
                average.copy_(before)


def mean_of_last(folder: Path | str, count: int = 5) -> dict[str, Tensor]:
    """The mean of the weights in the last checkpoints of a run, by name (Vaswani et al. 2017, sec. 6.1: 5 of them).

    Args:
        folder: the run's, as `train` was given it.
        count: how many checkpoints; the run must have kept that many (`Training.keep`).

    Raises:
        InputError: there are fewer, or one cannot be read.
    """
    paths = checkpoints.Checkpoints(Path(folder) / "checkpoints").paths()[-count:]
    if len(paths) < count:
        raise InputError(f"{folder}: {len(paths)} checkpoints, {count} are to be averaged; keep more of them")
    total: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in checkpoints.read(path)["model"].items():
            total[name] = total[name] + tensor / count if name in total else tensor / count
    return total
