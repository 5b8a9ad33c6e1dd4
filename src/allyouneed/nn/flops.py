"""What is read, as far as its cost depends on it: each part says for itself how many FLOPs its matrix products take.

A product of (m, k) and (k, n) takes 2·m·k·n. Norms, activations, softmax and what is added up take no part in the
count, as in Kaplan et al. 2020, table 1. Attention computes the scores that a mask then hides, and so they are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

TRAINING = 3  # times the forward pass: the backward pass makes two products of each, one for either factor's gradient


@dataclass(frozen=True)
class Reading:
    """`tokens` of all `rows` together, each of which looks at `keys` tokens of its row, and at a `memory` if there is
    one. With `keys=0` only the products with weights are counted, and padding need not be.

    >>> Reading.of(rows=2, length=8)
    Reading(tokens=16, keys=8, rows=2, memory=None)
    """

    tokens: int
    keys: int = 0
    rows: int = 1
    memory: Reading | None = None

    @classmethod
    def of(cls, *, rows: int, length: int, memory: Reading | None = None) -> Reading:
        """Whole rows of one length."""
        return cls(rows * length, length, rows, memory)


def product(layer: nn.Linear, tokens: int) -> int:
    """FLOPs of a linear layer.

    >>> product(nn.Linear(3, 5), tokens=10)
    300
    """
    return 2 * layer.in_features * layer.out_features * tokens


def width_for(cost: Callable[[int], int], flops: int) -> int:
    """The width at which `cost`, which grows by as much with each unit of it, is nearest to so many FLOPs; at least 1.

    >>> width_for(lambda width: 10 + 4 * width, 51)
    10
    """
    least = cost(1)
    return max(1, 1 + round((flops - least) / (cost(2) - least)))
