"""What every objective hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """A loss as a sum and what it sums over, so that the parts of a batch, computed one after the other or on many
    machines, add up to exactly the mean over the whole.

    >>> import torch
    >>> Loss(total=torch.tensor(6.0), weight=torch.tensor(4)).mean.item()
    1.5
    """

    total: Tensor  # (), the loss summed over targets, to be differentiated
    weight: Tensor  # (), the number of targets
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # (), further sums over the same targets
    unit: str = "tokens"  # what a target is

    @property
    def mean(self) -> Tensor:
        """The loss per target, ()."""
        return self.total / self.weight
