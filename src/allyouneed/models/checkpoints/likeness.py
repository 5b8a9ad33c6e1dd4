"""Whether two bases of one adapter are the same model: a few numbers in which all adapted layers have a part.

No hash, since the same model may be stored in 16 bits or in 4, and merging rounds otherwise on another machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from allyouneed.adapt.layers import Adapted
from allyouneed.core import files
from allyouneed.core.errors import InputError

NUMBERS = 16
SAMPLE = 4096  # about so many of a layer's weights are looked at, an odd number apart, so that all columns are
FILE = "base.json"  # beside PEFT's own two, which know nothing of it
PLAIN, FEW_BITS = 5e-3, 0.3  # how far apart one model's may be: stored in 16 bits (0.001), in 4 (0.1); another's: 1


def write(folder: Path, layers: Sequence[nn.Module]) -> None:
    """Say beside an adapter which numbers it was trained over."""
    files.write_json(folder / FILE, {"sketch": sketch(layers), "plain": plain(layers)})


def alike(folder: Path, layers: Sequence[nn.Module]) -> bool:
    """Whether these may be the layers that the adapter in `folder` was trained over; True where nothing is said.

    Raises:
        InputError: what is said cannot be read.
    """
    if not (folder / FILE).is_file():
        return True
    said = files.read_json(folder / FILE)
    numbers = said.get("sketch") if isinstance(said, dict) else None
    if not isinstance(numbers, list) or len(numbers) != NUMBERS or not all(isinstance(x, float) for x in numbers):
        raise InputError(f"{folder / FILE}: field 'sketch': a list of {NUMBERS} numbers is needed; or remove the file")
    most = PLAIN if said.get("plain") is True and plain(layers) else FEW_BITS
    return apart(numbers, sketch(layers)) <= most


def sketch(layers: Sequence[nn.Module]) -> list[float]:
    """The same for the same weights, in the same order; about as far apart as 1 for other ones.

    Each layer's weights, a sample of them over its length, are projected on waves of 16 lengths.

    >>> sketch([nn.Linear(2, 2)]) == sketch([nn.Linear(2, 2)])
    False
    """
    total = torch.zeros(NUMBERS, dtype=torch.float64)
    for i, layer in enumerate(layers):
        weight = _weight(layer).detach().flatten()
        sample = weight[:: (len(weight) // SAMPLE) | 1].double().cpu()
        places = torch.arange(len(sample), dtype=torch.float64) + i
        waves = torch.arange(1, NUMBERS + 1, dtype=torch.float64).sqrt()[:, None] * places
        total += (waves.cos() @ sample) / sample.norm().clamp_min(1e-30)
    return [round(x, 6) for x in (total / math.sqrt(max(len(layers), 1))).tolist()]


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The root mean square of the differences of two sketches."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / NUMBERS)


def plain(layers: Sequence[nn.Module]) -> bool:
    """Whether all of them have their weights as numbers of 16 bits or more."""
    return not any(hasattr(_base(layer), "dequantised") for layer in layers)


def _weight(layer: nn.Module) -> Tensor:
    base = _base(layer)
    found: Tensor = base.dequantised() if hasattr(base, "dequantised") else base.weight  # type: ignore[operator,assignment]
    return found


def _base(layer: nn.Module) -> nn.Module:
    return layer.base if isinstance(layer, Adapted) else layer
