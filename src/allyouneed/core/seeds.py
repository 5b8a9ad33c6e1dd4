"""Seeds. Everything random draws from a generator that somebody owns; the global one is touched only by name."""

from __future__ import annotations

import hashlib
import random
from typing import Any


def derive(seed: int, *names: object) -> int:
    """A seed for one purpose, independent of the seeds of other purposes (63 bits).

    >>> derive(0, "data") != derive(0, "model")
    True
    """
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object, device: str = "cpu") -> Any:
    """A `torch.Generator` seeded by `derive(seed, *names)`."""
    import torch

    return torch.Generator(device).manual_seed(derive(seed, *names))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (weights initialisation and dropout draw from torch's global generator)."""
    import numpy as np
    import torch

    random.seed(derive(seed, "python"))
    np.random.seed(derive(seed, "numpy") % 2**32)
    torch.manual_seed(derive(seed, "torch"))
