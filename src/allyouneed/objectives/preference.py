"""Learning from pairs of answers without a reward model: DPO and what followed it.

Holds losses of log-ratios, and the objective that computes these for a batch of pairs. Where the reference's numbers
come from, `align.references` knows. Shapes: B pairs, T tokens; of two answers the first is the preferred one.

π is the policy, π_ref the reference, w the preferred answer and l the other; a log-ratio is log π(y)/π_ref(y), and
h = log π(w)/π_ref(w) − log π(l)/π_ref(l).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed.core.errors import InputError
from allyouneed.core.modes import evaluating
from allyouneed.objectives.likelihood import check_exact, likelihood
from allyouneed.objectives.loss import Loss
from allyouneed.objectives.next_token import IGNORED

PairLoss = Callable[[Tensor], Tensor]


def dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> PairLoss:
    """−log σ(β·h): direct preference optimisation (Rafailov et al. 2023, eq. 7).

    With `label_smoothing` ε, the chance that a label is wrong, −(1 − ε)·log σ(β·h) − ε·log σ(−β·h): conservative DPO
    (Mitchell 2023, "A note on DPO with noisy preferences").

    Args:
        beta: β > 0, what a nat of divergence from the reference costs.
        label_smoothing: ε, from 0 to below 1/2.

    Returns:
        From h (B,) the losses (B,).

    >>> dpo(beta=0.5)(torch.tensor([0.0, 4.0])).exp()
    tensor([2.0000, 1.1353])
    """
    _check(beta, label_smoothing)

    def loss(h: Tensor) -> Tensor:
        return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)

    return loss


def robust_dpo(beta: float = 0.1, label_smoothing: float = 0.1) -> PairLoss:
    """(−(1 − ε)·log σ(β·h) + ε·log σ(−β·h)) / (1 − 2ε): over labels of which a share ε is flipped, its mean is DPO's
    loss on the true ones (Chowdhury et al. 2024, sec. 3). Arguments and result as of `dpo`.

    >>> robust_dpo(beta=0.5, label_smoothing=0.25)(torch.tensor([0.0])).exp()
    tensor([2.])
    """
    _check(beta, label_smoothing)

    def loss(h: Tensor) -> Tensor:
        kept, flipped = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
        return (label_smoothing * flipped - (1 - label_smoothing) * kept) / (1 - 2 * label_smoothing)

    return loss


def ipo(beta: float = 0.1) -> PairLoss:
    """(h − 1/(2β))²: identity preference optimisation (Azar et al. 2023, eq. 17, where β is called τ). Preferences that
    are certain do not drive h to infinity. Argument and result as of `dpo`. Where answers differ in length, h should be
    of mean log-ratios a token: see `preference`.

    >>> ipo(beta=0.5)(torch.tensor([0.0, 1.0]))
    tensor([1., 0.])
    """
    _check(beta, 0.0)
    return lambda h: (h - 1 / (2 * beta)).square()


def preference(
    loss: PairLoss, beta: float, *, per_token: bool = False
) -> Callable[[nn.Module, Mapping[str, Tensor]], Loss]:
    """The objective of pairs.

    Its batches have `ids`, `targets` and `segments` (B, 2, T), the preferred answer first, and `reference` (B, 2): the
    reference's log-probability of each answer's targets, read without dropout as the policy is here; zeros there are
    the form without a reference. Metrics: `accuracy`, the share of pairs with h > 0, a half where it is 0; the implicit
    rewards β·log π/π_ref of both answers, `chosen_reward` and `rejected_reward` (Rafailov et al. 2023, sec. 4), and
    their difference, the `margin`.

    Args:
        loss: of h.
        beta: β of the implicit rewards.
        per_token: h is of each answer's mean log-ratio a token instead of their sum, as IPO's authors advise (so the
            documentation of trl): a margin of 1/(2β) is else as far for a long answer as for a short one.
    """

    def objective(module: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        check_exact(batch["reference"])
        with evaluating(module):
            ratios = answer_logprobs(module, batch) - batch["reference"]
        scores = ratios / (batch["targets"] != IGNORED).sum(-1) if per_token else ratios
        h = scores[:, 0] - scores[:, 1]
        chosen, rejected = beta * ratios.detach().T
        metrics = {
            "accuracy": ((h.detach().sign() + 1) / 2).sum(),
            "chosen_reward": chosen.sum(),
            "rejected_reward": rejected.sum(),
            "margin": (chosen - rejected).sum(),
        }
        return Loss(loss(h).sum(), torch.tensor(len(h), device=h.device), metrics, "pairs")

    return objective


def answer_logprobs(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """log π(answer | prompt), natural, of answers that are told apart in the second dimension.

    Args:
        module: as `next_token` calls it.
        batch: `ids`, `targets`, `segments` (B, N, T).

    Returns:
        (B, N), the sum over targets.
    """
    rows = {name: batch[name].flatten(0, 1) for name in ("ids", "targets", "segments")}
    return likelihood(module, rows).sum(-1).unflatten(0, batch["ids"].shape[:2])


def _check(beta: float, label_smoothing: float) -> None:
    if not 0 < beta < float("inf"):
        raise InputError(f"beta={beta}; it must be a number above 0")
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing={label_smoothing}; the share of wrong labels is from 0 to below 0.5")
