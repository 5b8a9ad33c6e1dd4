"""The terms of policy optimisation against their equations, written out in float64, and against others' code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator
from allyouneed.objectives import policy
from allyouneed.objectives.loss import Loss

B, T, A = 5, 13, 4


def drawn(*shape: int, name: str = "x", scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=generator(0, "policy", name), dtype=torch.float64)


@pytest.fixture
def logprobs() -> tuple[Tensor, Tensor]:
    """New and old, far enough apart that clipping acts in both directions."""
    new, old = (drawn(B, T, name=name, scale=0.4) - 1.0 for name in ("new", "old"))
    return new.requires_grad_(), old


# surrogates, values, entropy


def clipped_by_hand(new: float, old: float, advantage: float, epsilon: float) -> float:
    r = math.exp(new) / math.exp(old)
    if advantage >= 0:
        return min(r, 1 + epsilon) * advantage
    return max(r, 1 - epsilon) * advantage


def test_the_clipped_surrogate_is_its_equation(logprobs):
    new, old = logprobs
    advantages = drawn(B, T, name="advantages")
    found = policy.clipped_surrogate(new, old, advantages, 0.2)
    rows = zip(new.flatten().tolist(), old.flatten().tolist(), advantages.flatten().tolist(), strict=True)
    wanted = torch.tensor([clipped_by_hand(*row, 0.2) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found.flatten().detach(), wanted, rtol=1e-12, atol=1e-12)
    r = (new - old).exp()
    assert ((r > 1.2) & (advantages > 0)).any() and ((r < 0.8) & (advantages < 0)).any()  # both clips were at work


def test_nothing_pulls_further_where_it_is_clipped(logprobs):
    new, old = logprobs
    advantages = drawn(B, T, name="advantages")
    policy.clipped_surrogate(new, old, advantages, 0.2).sum().backward()
    r = (new - old).exp().detach()
    beyond = ((r > 1.2) & (advantages > 0)) | ((r < 0.8) & (advantages < 0))
    torch.testing.assert_close(new.grad, (r * advantages).where(~beyond, torch.zeros((), dtype=torch.float64)))


def test_the_plain_surrogate_has_the_policy_gradient_at_the_old_policy():
    old = drawn(B, T, name="old")
    new, advantages = old.clone().requires_grad_(), drawn(B, T, name="advantages")
    policy.surrogate(new, old, advantages).sum().backward()
    torch.testing.assert_close(new.grad, advantages)


@pytest.mark.parametrize("epsilon", [None, 0.3])
def test_the_value_loss_is_its_equation(epsilon):
    values, old, returns = (drawn(B, T, name=name) for name in ("values", "old values", "returns"))
    found = policy.value_loss(values, old, returns, epsilon)
    for i in range(B):
        for t in range(T):
            v, o, r = (x[i, t].item() for x in (values, old, returns))
            kept = v if epsilon is None else min(max(v, o - epsilon), o + epsilon)
            assert found[i, t].item() == pytest.approx(max((v - r) ** 2, (kept - r) ** 2), rel=1e-12)


def test_entropy_and_divergence_are_those_of_torch():
    p, q = drawn(B, A, name="p"), drawn(B, A, name="q")
    one, other = (torch.distributions.Categorical(logits=x) for x in (p, q))
    torch.testing.assert_close(policy.entropy(p), one.entropy())
    torch.testing.assert_close(policy.kl_divergence(p, q), torch.distributions.kl_divergence(one, other))


@pytest.mark.parametrize("estimate", [policy.kl_k1, policy.kl_k3], ids=["k1", "k3"])
def test_unbiased_estimates_have_the_divergence_as_their_mean(estimate):
    p, q = (drawn(A, name=name).log_softmax(-1) for name in ("p", "q"))
    mean = (p.exp() * estimate(p, q)).sum()  # over all actions, each as often as p draws it
    torch.testing.assert_close(mean, policy.kl_divergence(p, q))


def test_estimates_agree_near_to_equality():
    p, change = drawn(64, name="p"), 1e-4 * drawn(64, name="q")
    half_square = 0.5 * change.square()
    torch.testing.assert_close(policy.kl_k2(p, p + change), half_square, rtol=1e-9, atol=1e-18)
    torch.testing.assert_close(policy.kl_k3(p, p + change), half_square, rtol=2e-3, atol=1e-12)
    assert (policy.kl_k3(p, drawn(64, name="far")) >= 0).all()


TERMS = {
    "surrogate": lambda x: policy.surrogate(x, drawn(B, T, name="b"), drawn(B, T, name="c")),
    "clipped surrogate": lambda x: policy.clipped_surrogate(x, drawn(B, T, name="b"), drawn(B, T, name="c"), 0.2),
    "value": lambda x: policy.value_loss(x, drawn(B, T, name="b"), drawn(B, T, name="c")),
    "clipped value": lambda x: policy.value_loss(x, drawn(B, T, name="b"), drawn(B, T, name="c"), 0.2),
    "entropy": policy.entropy,
    "divergence": lambda x: policy.kl_divergence(x, drawn(B, T, name="b")),
    "divergence the other way": lambda x: policy.kl_divergence(drawn(B, T, name="b"), x),
    "k1": lambda x: policy.kl_k1(x, drawn(B, T, name="b")),
    "k2": lambda x: policy.kl_k2(x, drawn(B, T, name="b")),
    "k3": lambda x: policy.kl_k3(x, drawn(B, T, name="b")),
    "gae": lambda x: policy.gae(x, *(drawn(B, T, name=n) for n in "bc"), drawn(B, T, name="d") > 1, 0.9, 0.8)[0],
    "whitened": policy.whiten,
}


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_gradients(term):
    assert torch.autograd.gradcheck(term, drawn(B, T, name="a").requires_grad_())


# advantages


def gae_by_hand(rewards, values, next_values, ends, gamma, lam):
    """Backwards, one step after the other."""
    advantages = np.zeros_like(rewards)
    for row in range(len(rewards)):
        following = 0.0
        for t in reversed(range(rewards.shape[1])):
            delta = rewards[row, t] + gamma * next_values[row, t] - values[row, t]
            following = delta + gamma * lam * (0.0 if ends[row, t] else following)
            advantages[row, t] = following
    return advantages


@pytest.mark.parametrize("steps", [1, 2, 13, 64, 100])
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_gae_is_its_recurrence(steps, gamma, lam):
    rewards, values, next_values = (drawn(B, steps, name=name) for name in "abc")
    ends = drawn(B, steps, name="d") > 1.0
    advantages, returns = policy.gae(rewards, values, next_values, ends, gamma, lam)
    wanted = gae_by_hand(rewards.numpy(), values.numpy(), next_values.numpy(), ends.numpy(), gamma, lam)
    np.testing.assert_allclose(advantages.numpy(), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, advantages + values)


def test_gae_in_float32_loses_nothing_over_long_rollouts():
    arguments = [drawn(2, 4096, name=name) for name in "abc"]
    ends = drawn(2, 4096, name="d") > 3.0
    exact, _ = policy.gae(*arguments, ends, 0.999, 0.99)
    found, _ = policy.gae(*(x.float() for x in arguments), ends, 0.999, 0.99)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


def test_answers_are_episodes_of_their_own():
    rewards, values = drawn(3, T, name="a"), drawn(3, T, name="b")
    mask = torch.zeros(3, T, dtype=torch.bool)
    mask[0, 2:7], mask[1, :] = True, True  # one within padding, one whole row, one without tokens
    advantages, returns = policy.masked_gae(rewards, values, mask, 1.0, 0.95)
    for row, where in ((0, slice(2, 7)), (1, slice(None))):
        r, v = rewards[row, where][None].numpy(), values[row, where][None].numpy()
        following = np.concatenate((v[:, 1:], np.zeros((1, 1))), 1)
        wanted = gae_by_hand(r, v, following, np.zeros_like(r), 1.0, 0.95)
        np.testing.assert_allclose(advantages[row, where].numpy(), wanted[0], rtol=1e-12, atol=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_whitening_counts_what_is_masked_in_only():
    x, mask = drawn(B, T, name="a"), drawn(B, T, name="b") > 0
    found = policy.whiten(x, mask)
    torch.testing.assert_close(found[mask], (x[mask] - x[mask].mean()) / (x[mask].std() + 1e-8))
    assert not found[~mask].any()
    rows = torch.stack([policy.whiten(*row) for row in zip(x, mask, strict=True)])
    torch.testing.assert_close(policy.whiten(x, mask, dim=1), rows)
    assert policy.whiten(torch.tensor([3.0])).item() == 0.0


def test_a_token_is_rewarded_with_its_divergence_and_the_last_with_the_score():
    logprobs, reference = drawn(3, T, name="a"), drawn(3, T, name="b")
    mask = torch.zeros(3, T, dtype=torch.bool)
    mask[0, 2:7], mask[1, :] = True, True
    scores = torch.tensor([2.0, -3.0, 7.0], dtype=torch.float64)
    rewards = policy.kl_rewards(scores, logprobs, reference, mask, 0.1)
    wanted = -0.1 * (logprobs - reference) * mask
    wanted[0, 6] += 2.0
    wanted[1, -1] -= 3.0
    torch.testing.assert_close(rewards, wanted)


# weights of the penalty


def test_the_adaptive_weight_follows_section_4():
    rule = policy.AdaptiveKl(target=0.03)
    assert rule(1.0, 0.03 / 1.5 - 1e-9) == 0.5 and rule(1.0, 0.03 * 1.5 + 1e-9) == 2.0
    assert rule(1.0, 0.03 / 1.5 + 1e-9) == rule(1.0, 0.03 * 1.5 - 1e-9) == 1.0
    assert policy.FixedKl(beta=3.0)(3.0, 100.0) == 3.0


def test_the_proportional_weight_follows_ziegler_et_al():
    rule = policy.ProportionalKl(target=6.0)
    for kl in (0.0, 5.0, 5.5, 6.0, 6.3, 7.0, 60.0):
        assert rule(0.2, kl) == pytest.approx(0.2 * (1 + 0.1 * np.clip(kl / 6 - 1, -0.2, 0.2)), rel=1e-12)
    with pytest.raises(InputError, match=r"kl\.beta=-1"):
        policy.FixedKl(beta=-1)


def test_controllers_bring_a_simulated_divergence_to_their_target():
    for rule, kl_of, within in (
        (policy.AdaptiveKl(target=0.01, beta=100.0), lambda beta: 0.05 / (1 + beta), 1.5),
        (policy.ProportionalKl(target=6.0, beta=0.001), lambda beta: 12 / (1 + beta), 1.03),
    ):
        beta = rule.beta
        for _ in range(1000):
            beta = rule(beta, kl_of(beta))
        assert 1 / within <= kl_of(beta) / rule.target <= within


def test_pretraining_text_is_mixed_in_the_same_however_the_batch_is_split():
    losses, texts = drawn(8, name="a"), drawn(6, name="b")
    wanted = losses.mean() + 0.5 * texts.mean()

    def loss(x: Tensor) -> Loss:
        return Loss(x.sum(), torch.tensor(len(x)))

    pieces = [
        policy.mix(loss(losses[some]), loss(texts[others]), weight=0.5 * 8 / 6)
        for some, others in ((slice(0, 3), slice(0, 1)), (slice(3, 8), slice(1, 6)))
    ]
    torch.testing.assert_close(sum(p.total for p in pieces) / sum(p.weight for p in pieces), wanted)


# against others' code


def test_advantages_are_those_of_stable_baselines3():
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    from gymnasium.spaces import Box, Discrete

    steps, n = 50, 3
    buffer = buffers.RolloutBuffer(steps, Box(-1, 1, (2,)), Discrete(2), gae_lambda=0.9, gamma=0.98, n_envs=n)
    source = np.random.default_rng(0)
    starts = source.random((steps + 1, n)) < 0.1
    values = source.normal(size=(steps + 1, n)).astype(np.float32)
    buffer.rewards[:], buffer.values[:] = source.normal(size=(steps, n)), values[:-1]
    buffer.episode_starts[:] = starts[:-1]
    buffer.compute_returns_and_advantage(torch.from_numpy(values[-1]), starts[-1])
    ends = torch.from_numpy(starts[1:].T.copy())
    found = policy.gae(
        torch.from_numpy(buffer.rewards.T.copy()),
        torch.from_numpy(values[:-1].T.copy()),
        torch.from_numpy(values[1:].T.copy()).where(~ends, 0.0),
        ends,
        0.98,
        0.9,
    )
    for ours, theirs in zip(found, (buffer.advantages, buffer.returns), strict=True):
        np.testing.assert_allclose(ours.numpy().T, theirs, rtol=1e-5, atol=1e-6)
