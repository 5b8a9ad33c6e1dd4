"""Next-token prediction: the objective of language models from GPT on.

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from allyouneed.objectives.cross_entropy import cross_entropy
from allyouneed.objectives.loss import Loss

IGNORED = -100  # a target that counts for nothing: padding, a prompt


def next_token(module: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """−Σ log p(target | the tokens up to here) in nats (Radford et al. 2018, eq. 1).

    Args:
        module: called as `module(ids, segments=segments)`, gives `.logits` (B, T, V).
        batch: `ids` (B, T); `targets` (B, T), the id that follows each of them, or `IGNORED`; and where rows are packed
            or padded `segments` (B, T), the number of each token's document within its row, 0 for padding.

    >>> import torch
    >>> class Uniform(nn.Module):
    ...     def forward(self, ids, segments=None):
    ...         self.logits = torch.zeros(*ids.shape, 8)
    ...         return self
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> loss = next_token(Uniform(), {"ids": ids, "targets": torch.tensor([[2, 3, IGNORED]])})
    >>> loss.mean.exp().round().item(), loss.weight.item()
    (8.0, 2)
    """
    logits, targets = module(batch["ids"], segments=batch.get("segments")).logits, batch["targets"]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a sum over thousands drowns in bf16
    total = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignored=IGNORED)
    return Loss(total, (targets != IGNORED).sum())
