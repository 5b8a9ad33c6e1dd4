"""How far the directions in which two matrices act are the same.

Shapes: K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def directions(B: Tensor, A: Tensor, most: int) -> Tensor:
    """The first right singular vectors of BA, the largest first, without making the product.

    Args:
        B: (N, r).
        A: (r, K), r at most K.
        most: how many, if there are as many.

    Returns:
        (most or r, K), float64, orthonormal.

    >>> directions(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.eye(2, 3), 1).abs()
    tensor([[1., 0., 0.]], dtype=torch.float64)
    """
    Q, R = torch.linalg.qr(A.double().T)  # A = RᵀQᵀ
    return (torch.linalg.svd(B.double() @ R.T, full_matrices=False).Vh @ Q.T)[:most]


def overlaps(one: Tensor, other: Tensor) -> Tensor:
    """φ(i, j) = ‖UᵢᵀVⱼ‖² / min(i, j), from 0 to 1, of the first i rows of one and the first j of the other
    (Hu et al. 2021, eq. 4).

    Args:
        one, other: (n, K) and (m, K), orthonormal rows, as `directions` gives them.

    Returns:
        (n, m), φ(1, 1) first.

    >>> overlaps(torch.eye(2, 5), torch.eye(2, 5)[[1, 0]])
    tensor([[0., 1.],
            [1., 1.]])
    """
    i, j = torch.arange(1, len(one) + 1), torch.arange(1, len(other) + 1)
    return (one @ other.T).square().cumsum(0).cumsum(1) / torch.minimum(i[:, None], j)
