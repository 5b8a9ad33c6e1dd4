"""What is learned from answers: tokens with their rewards, advantages and returns. Pure functions of batches.

Shapes: B rows (answers), T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from allyouneed.data.packing import IGNORED, Batch
from allyouneed.objectives.policy import kl_k1, kl_rewards, masked_gae, whiten

LEARNED = ("ids", "targets", "segments", "old_logprobs", "old_values", "advantages", "returns")


def made(batch: Batch, scores: Tensor, ended: Tensor, beta: float, config: Any) -> tuple[Batch, dict[str, float]]:
    """A rollout as it is learned from, and what is told of it.

    Args:
        batch: `ids`, `targets`, `segments`, and of the targets `old_logprobs`, `old_values` and `reference`, (B, T).
        scores: (B), what the reward says of each answer.
        ended: (B), whether it came to an end.
        beta: β, the weight of the KL penalty.
        config: a `Rollouts.Config`.
    """
    acted = batch["targets"] != IGNORED
    kl = kl_k1(batch["old_logprobs"], batch["reference"]).sum(1).mean().item()
    facts = {"reward": scores.mean().item(), "reward_deviation": scores.std(correction=0).item(), "kl": kl}
    facts |= {"length": acted.sum(1).float().mean().item(), "ended": ended.float().mean().item()}
    facts["entropy"] = -batch["old_logprobs"].sum().item() / int(acted.sum())  # the mean of −log p, drawn from p
    counted = scores if config.unended is None else scores.where(ended, config.unended)
    counted = whiten(counted) if config.whiten_scores else counted
    rewards = kl_rewards(counted, batch["old_logprobs"], batch["reference"], acted, beta)
    advantages, returns = masked_gae(rewards, batch["old_values"], acted, config.gamma, config.lam)
    found = batch | {"advantages": whiten(advantages, acted), "returns": returns}
    return {name: found[name] for name in LEARNED}, facts


def narrowed(batch: Batch) -> Batch:
    """Without the columns that are padding in all rows.

    >>> narrowed({"segments": torch.tensor([[1, 1, 0]]), "ids": torch.tensor([[5, 6, 0]])})["ids"].tolist()
    [[5, 6]]
    """
    width = int((batch["segments"] != 0).sum(1).max())
    return {name: x[:, :width] for name, x in batch.items()}


def widened(x: Tensor, width: int, value: float = 0) -> Tensor:
    """(B, T) padded on the right to so many columns."""
    return F.pad(x, (0, width - x.shape[1]), value=value)


def joined(batch: Batch, text: Batch) -> Batch:
    """Rows of answers and, below them, rows of text, which have no advantages. `pretraining` (B) is 0 for the former;
    for the latter what one target of theirs counts, if the means over both kinds of targets are to be added up while
    the loss is divided by the number of the answers' targets.
    """
    width = max(batch["ids"].shape[1], text["ids"].shape[1])
    text = {"segments": torch.ones_like(text["ids"]), **text}
    acted, told = ((x["targets"] != IGNORED).sum() for x in (batch, text))
    found = {}
    for name, x in batch.items():
        fill = IGNORED if name == "targets" else 0
        below = text[name] if name in text else torch.zeros(len(text["ids"]), width, dtype=x.dtype)
        found[name] = torch.cat([widened(x, width, fill), widened(below, width, fill)])
    share = torch.cat([torch.zeros(len(batch["ids"])), (acted / told).expand(len(text["ids"]))])
    return found | {"pretraining": share}


def places(chosen: Sequence[int]) -> Batch:
    """Numbers of examples as a batch, for who has them by number."""
    return {"places": torch.tensor(list(chosen))}
