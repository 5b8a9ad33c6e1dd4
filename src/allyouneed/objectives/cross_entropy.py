"""Cross entropy whose gradient is ready when the loss is.

PyTorch saves log-probabilities, writes a dense gradient of zeros with one entry a row, and takes exp again to send it
through the softmax. Here p − onehot is made of the probabilities in place and kept: where the sum itself is what is
differentiated, as the training loop does, nothing more is computed and nothing as large allocated.

Shapes: N targets, V classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class CrossEntropy(torch.autograd.Function):
    """Σ −log softmax(logits)[target] over the targets that are not `ignored`: (N, V), (N) -> ()."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
        """The sum in nats, in the dtype of `logits`."""
        probabilities = logits.softmax(-1)
        # the greatest logit and its probability never underflow: log Σ exp x = max x − log max p
        normaliser = logits.amax(-1) - probabilities.amax(-1).log()
        counted = targets != ignored
        index = targets.where(counted, 0)[:, None]
        loss = (normaliser - logits.gather(-1, index)[:, 0]).where(counted, 0.0).sum()
        if ctx.needs_input_grad[0]:
            probabilities.scatter_add_(-1, index, -torch.ones_like(index, dtype=logits.dtype))
            probabilities[~counted] = 0.0
            ctx.save_for_backward(probabilities)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """gradient · (p − onehot) in the rows that count, 0 in the others."""
        (difference,) = ctx.saved_tensors
        # asked only where the answer is at hand: another device would have to be waited for
        plain = gradient.device.type == "cpu" and gradient.item() == 1.0
        return (difference if plain else difference * gradient), None, None


def cross_entropy(logits: Tensor, targets: Tensor, *, ignored: int) -> Tensor:
    """Σ −log softmax(logits)[target] in nats, (), over the targets that are not `ignored`.

    The same as `torch.nn.functional.cross_entropy(..., reduction="sum")`, differentiable once.

    Args:
        logits: (N, V), float32 or float64.
        targets: (N), ids below V, or `ignored`.

    >>> logits = torch.zeros(3, 8)
    >>> cross_entropy(logits, torch.tensor([1, 2, -100]), ignored=-100).div(2).exp().round().item()
    8.0
    """
    total: Tensor = CrossEntropy.apply(logits, targets, ignored)
    return total
