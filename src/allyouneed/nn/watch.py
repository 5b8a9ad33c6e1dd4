"""Whether a module is still made of what it was made of, for whoever keeps what follows from that.

Sees parts and weights that were replaced, weights whose memory was, hooks, and training mode. What is written into a
weight's memory is not looked at, nor are numbers that parts keep as attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn


class Watch:
    """Looks at a module and all its parts: some tens of microseconds for hundreds of them.

    >>> layer = nn.Linear(2, 3)
    >>> watch = Watch(layer)
    >>> before = watch.changed()
    >>> layer.weight.data = layer.weight.data.clone()
    >>> before, watch.changed()
    (False, True)
    """

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self._module, self._training = module, module.training
        self._hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        tables: Iterator[dict[str, Any]] = chain.from_iterable(map(_tables, parts))
        self._tables = [table for table in tables if table]
        self._values = self._found()
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._places, self._heard = self._data(), any(self._hooks)

    def changed(self) -> bool:
        """Whether it is another one than when the watch began."""
        module, values = self._module, self._found()
        if module.training != self._training or any(self._hooks) != self._heard or len(values) != len(self._values):
            return True
        return not all(map(is_, values, self._values)) or self._data() != self._places

    def _found(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._tables)))

    def _data(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))


def _tables(part: nn.Module) -> tuple[dict[str, Any], ...]:
    """What a module consists of, by name."""
    return part._modules, part._parameters, part._buffers
