"""Modes of modules: to have nothing dropped for a while, each part being as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Within, `module` drops nothing and draws nothing; gradients are as they were. Two readings of a text can be
    compared only so.

    >>> layers = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5).eval())
    >>> with evaluating(layers):
    ...     [part.training for part in layers]
    [False, False]
    >>> [part.training for part in layers]
    [True, False]
    """
    training = [part for part in module.modules() if part.training]
    try:
        yield module.eval()
    finally:
        for part in training:
            part.training = True
