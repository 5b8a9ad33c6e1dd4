"""Learning a reward from answers that people put in order: of two or of K to one prompt, with or without a margin.

Holds the losses and the objective of a reward model, a `Classifier` with one output (`models.heads`). Shapes: B
prompts, N answers to each, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed.objectives.loss import Loss
from allyouneed.objectives.next_token import IGNORED


def pairwise(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """−log σ(r_w − r_l − m), Bradley and Terry's likelihood (Llama 2, eq. 1; with a margin m, eq. 2).

    Args:
        chosen: r_w, the rewards of the preferred answers.
        rejected: r_l, of the others, of the same shape.
        margin: m, larger where the preference is clearer.

    Returns:
        The losses, of the same shape.

    >>> pairwise(torch.tensor([2.0]), torch.tensor([1.0]), margin=1.0).exp()
    tensor([2.])
    """
    return -F.logsigmoid(chosen - rejected - margin)


def ranking(rewards: Tensor, ranks: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """−1/C(K,2)·Σ log σ(r_w − r_l) over all pairs of a prompt's K answers, which count as one (InstructGPT, eq. 1).

    Args:
        rewards: (B, N).
        ranks: (B, N), 0 for the best; pairs of the same rank and answers that are `IGNORED` count for nothing.
        margin: m of every pair of a prompt, (B,) or a number.

    Returns:
        (B,); 0 for a prompt without a pair.

    >>> ranking(torch.zeros(1, 4), torch.tensor([[0, 1, 2, IGNORED]])).exp()
    tensor([2.])
    """
    margin = torch.as_tensor(margin, device=rewards.device, dtype=rewards.dtype)
    better = _better(ranks)
    losses = pairwise(rewards[:, :, None], rewards[:, None, :], margin[..., None, None])
    return losses.where(better, 0.0).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)


def pair_accuracy(rewards: Tensor, ranks: Tensor) -> Tensor:
    """The share of a prompt's pairs whose better answer has the higher reward, a half where both are equal: (B, N),
    (B, N) -> (B,). Arguments as of `ranking`.

    >>> pair_accuracy(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0, 1, 2]]))
    tensor([0.6667])
    """
    better = _better(ranks)
    right = ((rewards[:, :, None] - rewards[:, None, :]).sign() + 1) / 2
    return right.where(better, 0.0).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)


def rewards(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a reward model gives for each answer: a batch of `ids` and `segments` (B, N, T) -> (B, N), in float32 at
    least.
    """
    rows = {name: batch[name].flatten(0, 1)[:, None] for name in ("ids", "segments", "types") if name in batch}
    found: Tensor = module(rows)[:, 0, 0].unflatten(0, batch["ids"].shape[:2])
    return found.to(torch.promote_types(found.dtype, torch.float32))


def reward() -> Callable[[nn.Module, Mapping[str, Tensor]], Loss]:
    """The objective of a reward model: `ranking`, one target a prompt.

    Its batches have `ids` and `segments` (B, N, T), `ranks` (B, N) and, where there is one, `margin` (B,). Metrics:
    `accuracy` of pairs, and the mean `reward` of a prompt's answers.
    """

    def objective(module: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        found, ranks = rewards(module, batch), batch["ranks"]
        total = ranking(found, ranks, batch.get("margin", 0.0)).sum()
        there = ranks != IGNORED
        mean = found.detach().where(there, 0.0).sum(1) / there.sum(1).clamp(min=1)
        metrics = {"accuracy": pair_accuracy(found.detach(), ranks).sum(), "reward": mean.sum()}
        return Loss(total, torch.tensor(len(found), device=found.device), metrics, "prompts")

    return objective


def _better(ranks: Tensor) -> Tensor:
    """Whether answer i is ranked before answer j: (B, N) -> (B, N, N)."""
    there = ranks != IGNORED
    return (ranks[:, :, None] < ranks[:, None, :]) & there[:, :, None] & there[:, None, :]
