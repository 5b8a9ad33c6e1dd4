"""A language model as a policy, and beside it the critic that says what is still to be won.

Holds modules only. The policy stays the plain decoder it was, adapted or not, and is saved as such; what the critic
knows is of use for training alone. Shapes: B rows, T tokens, V vocabulary; a place is where a target follows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from allyouneed.models.decoder import Decoder
from allyouneed.objectives.likelihood import at_targets
from allyouneed.objectives.next_token import IGNORED


@dataclass(frozen=True)
class Read:
    """What policy and critic say of a batch, 0 where no target follows."""

    logprobs: Tensor  # (B, T), of the targets under the policy
    values: Tensor  # (B, T), of having come so far


class ValueHead(nn.Module):
    """A critic that looks at what the policy made of each token: one linear layer, which begins at 0 (Ziegler et al.
    2019, sec. 2.1; their code).

    >>> import torch
    >>> ValueHead(4)(torch.ones(1, 2, 4), torch.ones(1, 2).long(), None).tolist()
    [[0.0, 0.0]]
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, hidden: Tensor, ids: Tensor, segments: Tensor | None) -> Tensor:
        """(B, T, dim) of the policy's last layer -> (B, T)."""
        values: Tensor = self.layer(hidden)[..., 0]
        return values


class ValueModel(nn.Module):
    """A critic with a stack of its own, which begins as a reward model (Ouyang et al. 2022, app. C.4).

    Args:
        model: a decoder, not the policy's.
        layer: dim -> 1, the reward model's.
    """

    def __init__(self, model: Decoder, layer: nn.Linear) -> None:
        super().__init__()
        self.model, self.layer = copy.deepcopy(model), copy.deepcopy(layer)

    def forward(self, hidden: Tensor, ids: Tensor, segments: Tensor | None) -> Tensor:
        """(B, T) ids -> (B, T)."""
        values: Tensor = self.layer(self.model.hidden(ids, segments))[..., 0]
        return values


class LanguagePolicy(nn.Module):
    """A decoder that acts by writing, and its critic, trained as one module.

    >>> import torch
    >>> from allyouneed.models import llama
    >>> policy = LanguagePolicy(llama.EXAMPLE.build())
    >>> read = policy({"ids": torch.tensor([[1, 2]]), "targets": torch.tensor([[2, IGNORED]])})
    >>> read.logprobs.shape, read.values[0, 1].item()
    (torch.Size([1, 2]), 0.0)
    """

    def __init__(self, model: Decoder, critic: nn.Module | None = None) -> None:
        """`critic` maps (hidden (B, T, dim), ids, segments) to values (B, T); None: a new `ValueHead`."""
        super().__init__()
        self.model = model
        self.critic = ValueHead(model.config.dim).to(model.device) if critic is None else critic

    def forward(self, batch: Mapping[str, Tensor]) -> Read:
        """A batch of `ids`, `targets` and perhaps `segments`, all (B, T), as `objectives.next_token` takes it."""
        ids, targets, segments = batch["ids"], batch["targets"], batch.get("segments")
        hidden = self.model.hidden(ids, segments)
        values = self.critic(hidden, ids, segments)
        return Read(at_targets(self.model.head, hidden, targets), values.where(targets != IGNORED, 0.0))

    def retie(self) -> None:
        """Make shared tensors one again."""
        for part in (self.model, getattr(self.critic, "model", None)):
            if part is not None:
                part.retie()
