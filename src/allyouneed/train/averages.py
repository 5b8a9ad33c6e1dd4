"""The exponential moving average of a module's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
        for name, parameter in self.watched.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data
