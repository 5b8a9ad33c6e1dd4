"""How likely a model holds the tokens of a batch: what preferences, policies and references are compared by.

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed.core.errors import InputError
from allyouneed.objectives.next_token import IGNORED


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target), natural, computed in float32 at least: (B, T, V), (B, T) -> (B, T), 0 where it is `IGNORED`.

    >>> token_logprobs(torch.zeros(1, 2, 4), torch.tensor([[3, IGNORED]])).exp()
    tensor([[0.2500, 1.0000]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return -nll.view_as(targets)


def likelihood(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """log p(target | the tokens up to here) of a batch as `next_token` takes it: (B, T), 0 where it is `IGNORED`.

    `module` is asked for `hidden(ids, segments)`, and its `head` only where a target follows: prompts are half of what
    a policy reads, and a head of 49 k tokens is a fifth of a small model.
    """
    return at_targets(module.head, module.hidden(batch["ids"], batch.get("segments")), batch["targets"])


def check_exact(read: Tensor) -> None:
    """Refuse to compare what is computed now with numbers such as `read`, which were read in float32, if it is not.

    Raises:
        InputError: products of matrices are computed in another type here.
    """
    if torch.is_autocast_enabled(read.device.type):
        raise InputError("precision=bf16: log-probabilities are compared with others that were read in fp32; train so")


def at_targets(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The same from the vectors that the head is to see: (B, T, dim), (B, T) -> (B, T)."""
    learned = targets != IGNORED
    found = token_logprobs(head(hidden[learned])[None], targets[learned][None])[0]
    return found.new_zeros(targets.shape).masked_scatter(learned, found)
