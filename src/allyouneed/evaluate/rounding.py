"""What rounding to a few values costs, in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FAR = 8.0  # standard deviations beyond which no largest number of a block is looked for
STEPS = 4000


def gaussian_error(values: Tensor, block: int) -> float:
    """The mean squared error of numbers of N(0, 1) in blocks of `block`, each divided by m, the largest absolute value
    of its block, rounded to the nearest of `values` (C,), which lie in [−1, 1], and multiplied by m again.

    The largest number itself becomes m times the values nearest to ±1. The others are normal between −m and m: the
    square (x − mv)² is integrated over the cell of each value v, which has a closed form, and the result over the
    density of m, 2Bφ(m)(2Φ(m) − 1)^(B−1), by the trapezoidal rule.

    >>> round(gaussian_error(torch.tensor([-1.0, 0.0, 1.0]), 1), 6)  # each number is its own largest
    0.0
    """
    v = values.double().unique()
    m = torch.linspace(1e-6, FAR, STEPS, dtype=torch.float64)[:, None]
    edges = torch.cat((torch.full((1,), -1.0), (v[:-1] + v[1:]) / 2, torch.ones(1)))
    low, high, at = m * edges[:-1].clamp(-1, 1), m * edges[1:].clamp(-1, 1), m * v
    squares = (1 + at**2) * (_below(high) - _below(low)) - (high * _density(high) - low * _density(low))
    others = (squares - 2 * at * (_density(low) - _density(high))).sum(1, keepdim=True)
    inside = 2 * _below(m) - 1
    largest = m**2 * ((1 - v.max()) ** 2 + (1 + v.min()) ** 2) / 2
    mean = ((block - 1) * others / inside + largest) / block
    density = 2 * block * _density(m) * inside ** (block - 1)
    return torch.trapezoid((mean * density)[:, 0], m[:, 0]).item()


def _density(x: Tensor) -> Tensor:
    return (-(x**2) / 2).exp() / math.sqrt(2 * math.pi)


def _below(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)
