"""Code books: the numbers from −1 to 1 that codes of 4 or 8 bits stand for. Which blocks a tensor is cut into and what
they are scaled by is `nn.blockwise`'s.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Book:
    """`values` (2^bits,) fp32: what each code stands for, in the order of the codes."""

    bits: int
    values: Tensor

    @functools.cached_property
    def order(self) -> Tensor:
        """(2^bits,) the codes by rising value, the lower code first of two that mean the same."""
        return self.values.argsort(stable=True)

    @functools.cached_property
    def edges(self) -> Tensor:
        """(2^bits − 1,) half-way between neighbouring values, where the nearest one changes."""
        rising = self.values[self.order]
        return (rising[:-1] + rising[1:]) / 2

    def nearest(self, x: Tensor) -> Tensor:
        """The code whose value is nearest, the smaller value of two: (…) -> (…) uint8.

        >>> BOOKS["int4"].nearest(torch.tensor([-1.0, 0.0, 0.07, 0.08, 1.0])).tolist()
        [0, 7, 7, 8, 14]
        """
        return self.order.to(x.device, torch.uint8)[torch.bucketize(x, self.edges.to(x.device))]


def integers(bits: int) -> Tensor:
    """Symmetric integers over their largest, k/(2^(bits−1) − 1), and the largest once more for the code left over.

    The paper's Int4 (Dettmers et al. 2023, table 2) is one of absolute maxima, of which zero is a value.
    """
    most = 2 ** (bits - 1) - 1
    steps = torch.arange(-most, most + 1, dtype=torch.float64) / most
    return torch.cat((steps, steps[-1:])).float()


def dynamic() -> Tensor:
    """(256,) the 8-bit floats that scales are kept in: a sign, an exponent of ten written in unary, and a fraction in
    what bits are left (Dettmers 2016, sec. 2.2.1; 2^e parts of [0.1, 1]·10^(e−6), by their middles), 0 and 1.
    """
    found = []
    for e in range(7):
        edges = torch.linspace(0.1, 1.0, 2**e + 1)
        found.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (e - 6))
    positive = torch.cat(found)
    return torch.cat((-positive, torch.tensor([0.0, 1.0]), positive)).sort().values


# Quantiles of N(0, 1) at equal steps of probability from one half to 0.9677083, the middle of 1 − 1/32 and 1 − 1/30:
# eight above zero, seven below it and zero itself, over the largest (Dettmers et al. 2023, sec. 3; digits of app. E).
_NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
# A sign, two bits of exponent and one of mantissa as bitsandbytes lays them out, over their largest.
_FP4 = [sign * x / 12 for sign in (1, -1) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]

DYNAMIC = Book(8, dynamic())
BOOKS = {
    "nf4": Book(4, torch.tensor(_NF4)),
    "fp4": Book(4, torch.tensor(_FP4)),
    "int4": Book(4, integers(4)),
    "int8": Book(8, integers(8)),
}
