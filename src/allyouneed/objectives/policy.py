"""What policies are improved by: the terms of proximal policy optimisation and its advantages (Schulman et al. 2017).

Every term is a function of tensors and is left unsummed, one number for each action, so that who assembles a loss sums
over its own mask and micro-batches add up. What an action is does not matter here: a push of a cart, a token. How the
terms are weighed is in `ppo`, where actions come from in the room `align`.

Shapes: B rows (environments, answers), T steps, A actions to choose from; … is any shape, the same for all arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.objectives.loss import Loss


def surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """r·A, r = π(a)/π_old(a), to be made large (eq. 6, conservative policy iteration): (…) -> (…).

    >>> surrogate(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([3.0]))
    tensor([6.])
    """
    return (logprobs - old_logprobs).exp() * advantages


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """min(r·A, clip(r, 1 − ε, 1 + ε)·A), to be made large (eq. 7): (…) -> (…).

    It has no gradient where the policy has gone further than ε in the direction that pays.

    >>> clipped_surrogate(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([3.0]), epsilon=0.2)
    tensor([3.6000])
    """
    r = (logprobs - old_logprobs).exp()
    return torch.minimum(r * advantages, r.clamp(1.0 - epsilon, 1.0 + epsilon) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, epsilon: float | None = None) -> Tensor:
    """(V − R)² (eq. 9), and with `epsilon` the larger of that and (clip(V, V_old ± ε) − R)², as the authors' code has
    it (`baselines`, ppo2; the paper does not say): (…) -> (…). No half is taken of it.

    >>> value_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([3.0]), epsilon=0.5)
    tensor([6.2500])
    """
    plain = (values - returns).square()
    if epsilon is None:
        return plain
    kept = old_values + (values - old_values).clamp(-epsilon, epsilon)
    return torch.maximum(plain, (kept - returns).square())


def entropy(logits: Tensor) -> Tensor:
    """−Σ p log p of a choice, in nats: (…, A) -> (…).

    >>> entropy(torch.zeros(1, 8)).exp()
    tensor([8.0000])
    """
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL[p, q] = Σ p log(p/q) of two choices, p by the first logits, q by the second, in nats: (…, A) -> (…).

    >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[0.75, 0.25]]).log()).item() > 0
    True
    """
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def kl_k1(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """log p(a) − log q(a) of actions drawn from p: estimates KL[p, q] without bias, may be negative: (…) -> (…).

    Ziegler et al. (2019, sec. 2) and InstructGPT take it from the reward of each token, p the policy, q the reference.
    """
    return logprobs - other_logprobs


def kl_k2(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """½(log p(a) − log q(a))² of actions drawn from p: steady, somewhat biased (Schulman 2020): (…) -> (…)."""
    return 0.5 * (logprobs - other_logprobs).square()


def kl_k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """q(a)/p(a) − 1 − log(q(a)/p(a)) of actions drawn from p: unbiased and never negative (Schulman 2020,
    "Approximating KL divergence"): (…) -> (…).

    >>> kl_k3(torch.tensor([0.5]).log(), torch.tensor([0.5]).log())
    tensor([0.])
    """
    log_ratio = other_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


def kl_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: Tensor | float) -> Tensor:
    """−β log(π/π_ref) for each token, and an answer's score at its last (Ziegler et al. 2019, eq. 2; Ouyang et al.
    2022, eq. 2): (B), (B, T) -> (B, T), 0 where `mask` is False. An answer without tokens has nowhere to put its score.

    >>> mask = torch.tensor([[False, True, True, False]])
    >>> kl_rewards(torch.tensor([5.0]), torch.zeros(1, 4), torch.full((1, 4), -1.0), mask, beta=0.5)
    tensor([[ 0.0000, -0.5000,  4.5000,  0.0000]])
    """
    penalty = (-beta * kl_k1(logprobs, ref_logprobs)).where(mask, 0.0)
    places = torch.arange(mask.shape[-1], device=mask.device)
    last = places.where(mask, -1).amax(-1, keepdim=True)
    return penalty + scores[..., None].to(penalty.dtype) * (places == last)


def discounted_sums(x: Tensor, factors: Tensor) -> Tensor:
    """y_t = x_t + f_t·y_{t+1}, nothing coming after the last: (…, T) -> (…, T).

    By doubling: each of log₂ T passes over all steps looks twice as far ahead.

    >>> discounted_sums(torch.ones(4), torch.tensor([0.5, 0.5, 0.0, 0.5]))
    tensor([1.7500, 1.5000, 1.0000, 1.0000])
    """
    ahead = 1
    while ahead < x.shape[-1]:
        x = x + factors * F.pad(x[..., ahead:], (0, ahead))
        factors = factors * F.pad(factors[..., ahead:], (0, ahead))
        ahead *= 2
    return x


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, ends: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates Σ (γλ)^l δ_{t+l} with δ_t = r_t + γV(s_{t+1}) − V(s_t), and with them the returns
    A + V that values are trained towards (Schulman et al. 2016, eq. 16; 2017, eq. 11 and 12): two of (…, T).

    Args:
        rewards: (…, T).
        values: (…, T), V(s_t).
        next_values: (…, T), V(s_{t+1}): 0 where the episode was over by its own rules, the value of the state that was
            reached where it was only cut off or the rollout stopped, since more rewards would have come.
        ends: (…, T), bool: the next step is of another episode, for either reason. The last step needs no mark.
        gamma: γ, what a reward is worth one step later.
        lam: λ, how far returns are trusted over values: 0 one step, 1 to the end.

    >>> zeros = torch.zeros(3)
    >>> gae(torch.ones(3), zeros, zeros, zeros.bool(), gamma=0.5, lam=1.0)[1]
    tensor([1.7500, 1.5000, 1.0000])
    """
    deltas = rewards + gamma * next_values - values
    advantages = discounted_sums(deltas, gamma * lam * (~ends).to(deltas.dtype))
    return advantages, advantages + values


def check_discounts(name: str, gamma: float, lam: float) -> None:
    """Refuse what no reward can be discounted by.

    Raises:
        InputError: γ or λ outside of 0 to 1.
    """
    for symbol, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise InputError(f"{name}.{symbol}={x}; from 0 to 1 is needed")


def masked_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """`gae` of answers: each run of steps where `mask` is True is an episode that ends with it: two of (B, T), 0 where
    it is False.

    >>> mask = torch.tensor([[False, True, True, False]])
    >>> masked_gae(torch.ones(1, 4), torch.full((1, 4), 9.0), mask, gamma=1.0, lam=1.0)[1]
    tensor([[0., 2., 1., 0.]])
    """
    goes_on = F.pad(mask[..., 1:], (0, 1), value=False)
    next_values = F.pad(values[..., 1:], (0, 1)).where(goes_on, 0.0)
    found = gae(rewards, values, next_values, ~goes_on, gamma, lam)
    advantages, returns = (x.where(mask, 0.0) for x in found)
    return advantages, returns


def whiten(x: Tensor, mask: Tensor | None = None, dim: int | None = None) -> Tensor:
    """(x − mean)/(standard deviation + 1e-8) over all that `mask` lets count, or along `dim` alone; 0 elsewhere:
    (…) -> (…). A single number has no spread and becomes 0.

    >>> whiten(torch.tensor([1.0, 3.0]))
    tensor([-0.7071,  0.7071])
    """
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    along = tuple(range(x.dim())) if dim is None else (dim,)
    count = mask.sum(along, keepdim=True)
    centred = (x - x.where(mask, 0.0).sum(along, keepdim=True) / count.clamp(min=1)).where(mask, 0.0)
    variance = centred.square().sum(along, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-8)


@dataclass(frozen=True, kw_only=True)
class FixedKl(core.Config):
    """A weight of the KL penalty that stays: β (sec. 4). Called with the weight and the KL that was measured with it,
    each of these kinds gives the next weight.

    >>> FixedKl(beta=0.3)(0.3, kl=1.0)
    0.3
    """

    beta: float = 1.0  # at first

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise InputError(f"kl.beta={self.beta}; a weight of the KL penalty is 0 or more")

    def __call__(self, beta: float, kl: float) -> float:
        """β."""
        return beta


@dataclass(frozen=True, kw_only=True)
class AdaptiveKl(FixedKl):
    """β is halved where the KL came out below d_targ/1.5, and doubled above d_targ·1.5 (Schulman et al. 2017, sec. 4).

    >>> [AdaptiveKl(target=0.01)(1.0, kl) for kl in (0.005, 0.01, 0.02)]
    [0.5, 1.0, 2.0]
    """

    target: float = 0.01  # d_targ, nats

    def __post_init__(self) -> None:
        FixedKl.__post_init__(self)
        if not 0 < self.target < math.inf:
            raise InputError(f"kl.target={self.target}; nats above 0 are needed")

    def __call__(self, beta: float, kl: float) -> float:
        """The next β."""
        if kl < self.target / 1.5:
            return beta / 2
        return beta * 2 if kl > self.target * 1.5 else beta


@dataclass(frozen=True, kw_only=True)
class ProportionalKl(FixedKl):
    """β ← β·(1 + K·e), e = (KL − target)/target within ±`limit` (Ziegler et al. 2019, sec. 2.2).

    >>> [round(ProportionalKl(target=6.0)(1.0, kl), 3) for kl in (0.0, 6.0, 6.6, 60.0)]
    [0.98, 1.0, 1.01, 1.02]
    """

    target: float = 6.0  # nats an answer
    gain: float = 0.1  # K_β
    limit: float = 0.2

    def __post_init__(self) -> None:
        FixedKl.__post_init__(self)
        if not 0 < self.target < math.inf:
            raise InputError(f"kl.target={self.target}; nats above 0 are needed")

    def __call__(self, beta: float, kl: float) -> float:
        """The next β."""
        error = min(max((kl - self.target) / self.target, -self.limit), self.limit)
        return beta * (1.0 + self.gain * error)


def mix(policy: Loss, pretraining: Loss, weight: Tensor | float) -> Loss:
    """PPO-ptx: the policy's loss and beside it that of pretraining text (Ouyang et al. 2022, eq. 2).

    Both are sums over targets of their own. For policy mean + γ · pretraining mean, `weight` is γ · (targets of the
    policy) / (targets of the pretraining), counted over the whole batch: so micro-batches add up to it.

    >>> one, two = (Loss(torch.tensor(x), torch.tensor(n)) for x, n in ((6.0, 3), (8.0, 2)))
    >>> mix(one, two, weight=0.5 * 3 / 2).mean  # 2 + 0.5 * 4
    tensor(4.)
    """
    metrics = {**policy.metrics, "pretraining": (weight * pretraining.total).detach()}
    return replace(policy, total=policy.total + weight * pretraining.total, metrics=metrics)
