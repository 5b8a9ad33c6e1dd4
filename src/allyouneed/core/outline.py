"""Modules without their weights: shapes on PyTorch's meta device, where nothing is allocated, and nothing drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DRAWN = ("normal_", "uniform_")  # what all random initialisation comes down to


@contextmanager
def outlined() -> Iterator[None]:
    """Modules built within are outlines.

    >>> with outlined():
    ...     layer = torch.nn.Linear(2, 3)
    >>> layer.weight.device
    device(type='meta')
    """
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Leaves out the drawing of numbers that no meta tensor keeps: for that alone PyTorch loads its compiler, which
    takes a second.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        tensor = args[0] if args else (kwargs or {}).get("tensor")
        if getattr(function, "__name__", "") in DRAWN and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return function(*args, **(kwargs or {}))
