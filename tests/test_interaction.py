"""Acting in environments and learning from it: against torch's distributions, stable-baselines3, and slow twins."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from allyouneed.align.actions import Categorical, Choice, Gaussian, Push
from allyouneed.align.actor_critic import ActorCritic, Scale
from allyouneed.align.environments import Environments
from allyouneed.align.interaction import Interaction
from allyouneed.align.returns import RewardScale, play
from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator, seed_everything
from allyouneed.objectives.policy import AdaptiveKl, FixedKl
from allyouneed.objectives.ppo import Clipped, Ppo, Unclipped
from allyouneed.train.gradients import differentiate
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.ranks import Ranks
from allyouneed.train.schedules import Constant

SMALL = Interaction.Config(steps=32, epochs=2, minibatch=16)


def drawn(*shape: int, name: str = "x", scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=generator(0, "interaction", name))


def begun(
    name: str = "CartPole-v1", config: Interaction.Config = SMALL, count: int = 2, seed: int = 0, **model: Any
) -> Interaction:
    """A module that acts in environments, everything seeded."""
    seed_everything(seed)
    environments = Environments.Config(name=name, count=count).build(seed=seed)
    module = ActorCritic.Config(hidden=(16, 16), **model).build(environments.width, environments.actions)
    return config.build(module, environments, seed=seed)


def training(steps: int, lr: float = 3e-4, **how: Any) -> Training:
    """As `stable-baselines3` has it."""
    optimizer = AdamW.Config(lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0)
    return Training(steps=steps, optimizer=optimizer, schedule=Constant(), clip=0.5, **how)


# distributions and acting


def test_distributions_are_those_of_torch():
    logits, old, chosen = drawn(6, 3), drawn(6, 3, name="old").log_softmax(-1), torch.tensor([0, 1, 2, 0, 1, 2])
    mine, theirs = Choice(3)(logits), torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(mine.logprobs(chosen), theirs.log_prob(chosen))
    torch.testing.assert_close(mine.entropy(), theirs.entropy())
    older = torch.distributions.Categorical(logits=old)
    torch.testing.assert_close(mine.kl_from(old), torch.distributions.kl_divergence(older, theirs))


def test_pushes_are_independent_normals():
    means, log_std, pushed = drawn(6, 2), torch.tensor([0.3, -0.7]), drawn(6, 2, name="pushed")
    mine = Gaussian(means, log_std)
    theirs = torch.distributions.Independent(torch.distributions.Normal(means, log_std.exp()), 1)
    torch.testing.assert_close(mine.logprobs(pushed), theirs.log_prob(pushed))
    torch.testing.assert_close(mine.entropy(), theirs.entropy())
    old = Gaussian(drawn(6, 2, name="old"), torch.tensor([-0.2, 0.1]))
    older = torch.distributions.Independent(torch.distributions.Normal(old.means, old.log_std.exp()), 1)
    torch.testing.assert_close(mine.kl_from(old.parameters), torch.distributions.kl_divergence(older, theirs))


def test_choices_are_drawn_as_often_as_they_are_likely():
    kind, source = Choice(3, start=5), np.random.default_rng(0)
    told = np.log(np.array([[0.2, 0.5, 0.3]], np.float32)).repeat(40_000, 0)
    found = kind.draw(told, kind.noise(source, 40_000))
    shares = np.bincount(found, minlength=3) / 40_000
    np.testing.assert_allclose(shares, [0.2, 0.5, 0.3], atol=4 * np.sqrt(0.25 / 40_000))
    assert kind.draw(told[:1], 0.0) == [1] and kind.executed(np.array([1])) == [6]


def test_pushes_are_drawn_with_their_deviation_and_held_within_the_box():
    kind, source = Push(np.array([-2.0]), np.array([2.0])), np.random.default_rng(0)
    kind.log_std.data.fill_(0.5)
    found = kind.draw(np.zeros((40_000, 1), np.float32), kind.noise(source, 40_000))
    assert found.std() == pytest.approx(np.exp(0.5), rel=0.02) and abs(found).max() > 2
    assert abs(kind.executed(found)).max() == 2


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", [Choice(3), Push(-np.ones(3), np.ones(3))], ids=["choice", "push"])
def test_acting_computes_what_the_policy_tells(kind, scaled):
    module = ActorCritic.Config(scaled=scaled).build(5, copy.deepcopy(kind))
    states = 3 * drawn(64, 5) + 1
    if scaled:
        module.scale.see(states)
    act = module.acting()
    with torch.no_grad():
        for p in module.parameters():  # it sees weights change
            p.add_(0.1 * torch.randn_like(p))
        policy = module(states).policy
    if isinstance(kind, Choice):
        told = policy.all_logprobs.numpy()
        ordered = np.sort(told, -1)
        sure = ordered[:, -1] - ordered[:, -2] > 1e-4
        np.testing.assert_array_equal(act(states.numpy(), 0.0)[sure], told.argmax(-1)[sure])
        assert sure.sum() > 50
    else:
        noise = drawn(64, 3, name="noise").numpy()
        wanted = policy.means.numpy() + noise * policy.log_std.detach().exp().numpy()
        np.testing.assert_allclose(act(states.numpy(), noise), wanted, rtol=1e-5, atol=1e-5)


def test_weights_begin_orthogonal_and_actions_equally_likely():
    module = ActorCritic.Config().build(64, Choice(4))
    for network, last in ((module.actor, 0.01), (module.critic, 1.0)):
        for layer, gain in zip(network[::2], (2**0.5, 2**0.5, last), strict=True):
            product = layer.weight @ layer.weight.T
            torch.testing.assert_close(product, gain**2 * torch.eye(len(product)), rtol=1e-4, atol=1e-5)
            assert not layer.bias.any()
    assert module(drawn(9, 64)).policy.entropy().exp().min() > 3.99


def test_the_scale_is_that_of_all_observations_together():
    scale, states = Scale(3), 5 * drawn(60, 3) + torch.tensor([1.0, -20.0, 0.0])
    for piece in states.split([1, 9, 50]):
        scale.see(piece)
    wanted = (states - states.mean(0)) / states.std(0, correction=0)
    torch.testing.assert_close(scale(states), wanted, rtol=1e-4, atol=1e-4)
    assert scale(torch.full((1, 3), 1e9)).tolist() == [[10.0, 10.0, 10.0]]


def test_rewards_are_scaled_by_the_deviation_of_discounted_sums():
    source = np.random.default_rng(0)
    rewards, ended = source.normal(2.0, 3.0, size=(40, 2)), source.random((40, 2)) < 0.2
    scale, sums, running = RewardScale(0.9, 2), [], np.zeros(2)
    for t in range(40):
        running = running * 0.9 + rewards[t]
        sums.append(running.copy())
        running[ended[t]] = 0
    scale.scaled(rewards[:25], ended[:25])
    found = scale.scaled(rewards[25:], ended[25:])
    np.testing.assert_allclose(found, rewards[25:] / np.std(sums), rtol=1e-6)


# environments


NAMES = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0", "FrozenLake-v1", "Taxi-v4"]
NAMES += ["LunarLander-v3", "LunarLanderContinuous-v3"]


@pytest.mark.parametrize("name", NAMES)
def test_environments_are_made_again_where_they_were(name):
    kind = Environments.Config(name=name, count=3)
    one, other = kind.build(seed=4), kind.build(seed=4)
    source = np.random.default_rng(0)
    noise = one.actions.noise(source, 260, 3)
    acted = [one.actions.draw(np.zeros_like(x), x) for x in noise]
    for actions in acted[:230]:
        one.step(actions)
    state = copy.deepcopy(one.state_dict())
    other.load_state_dict(state)
    np.testing.assert_array_equal(one.observations, other.observations)
    for actions in acted[230:]:
        a, b = one.step(actions), other.step(actions)
        for found, wanted in zip(vars(a).values(), vars(b).values(), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert one.state_dict()["episodes"] == other.state_dict()["episodes"]


class Lottery(gymnasium.Env):
    """Keeps no rule: draws from NumPy's global generator, how far it goes and, where it `ends`, when it is over."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, ends: bool) -> None:
        self.ends = ends

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        drawn = np.random.random()
        if self.ends:
            return np.zeros(1, np.float32), 0.0, drawn < 0.5, False, {}
        return np.array([drawn], np.float32), 0.0, False, False, {}


@pytest.mark.parametrize("ends", [False, True])
def test_an_environment_that_does_not_follow_from_its_seed_is_not_resumed(ends):
    gymnasium.register("Lottery-v0", Lottery, kwargs={"ends": ends})
    try:
        one, other = (Environments.Config(name="Lottery-v0", count=4).build(seed=0) for _ in range(2))
    finally:
        del gymnasium.registry["Lottery-v0"]
    np.random.seed(0)
    for _ in range(3):
        one.step(np.zeros(4, dtype=np.int64))
    np.random.seed(1)
    with pytest.raises(InputError, match="'Lottery-v0': the same seed and actions led elsewhere; it cannot be resumed"):
        other.load_state_dict(one.state_dict())


def test_where_an_episode_ended_another_begins_and_both_observations_are_told():
    envs = Environments.Config(name="CartPole-v1", count=2, options={"max_episode_steps": 5}).build(seed=0)
    for _ in range(4):
        step = envs.step(np.array([0, 1]))
        np.testing.assert_array_equal(step.reached, step.observations)
    step = envs.step(np.array([0, 1]))
    assert step.truncated.all() and not step.terminated.any()
    assert (abs(step.observations) <= 0.05).all() and (abs(step.reached[:, 1]) > 0.5).all()  # CartPole begins near 0
    assert envs.episodes.tolist() == [1, 1] and envs.taken == [[], []]


def test_numbered_observations_are_told_one_by_one():
    envs = Environments.Config(name="FrozenLake-v1", count=2).build(seed=0)
    assert envs.width == 16 and envs.observations.tolist() == np.eye(16)[[0, 0]].tolist()


def test_observations_of_several_parts_are_flattened():
    envs = Environments.Config(name="Blackjack-v1", count=2).build(seed=0)
    assert envs.observations.shape == (2, envs.width) and envs.width == 32 + 11 + 2
    assert (envs.observations.sum(1) == 3).all()  # one of each part


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("CartPole-v11", {}, "environment 'CartPole-v11': Environment version `v11` .* doesn't exist"),
        ("CartPol-v1", {}, "unknown environment 'CartPol-v1'; did you mean 'CartPole-v1'"),
        ("CartPole-v1", {"gravity_of": 3}, "environment 'CartPole-v1': .*gravity_of"),
    ],
)
def test_wrong_environments_are_named(name, options, message):
    with pytest.raises(InputError, match=message):
        Environments.Config(name=name, options=options).build(seed=0)


def test_what_is_not_finite_is_named_with_its_place():
    envs = Environments.Config(name="Pendulum-v1", count=2).build(seed=0)
    with pytest.raises(InputError, match="environment 'Pendulum-v1', number 1, step 1 of episode 0: reward nan"):
        envs.step(np.array([[0.0], [np.nan]]))


def test_a_state_of_other_environments_is_refused():
    one = Environments.Config(name="CartPole-v1", count=2).build(seed=0)
    for name, count, seed, message in (
        ("Acrobot-v1", 2, 0, "name=CartPole-v1"),
        ("CartPole-v1", 3, 0, "episodes=2"),
        ("CartPole-v1", 2, 1, "seed=0"),
    ):
        with pytest.raises(InputError, match=message):
            Environments.Config(name=name, count=count).build(seed=seed).load_state_dict(one.state_dict())
    with pytest.raises(InputError, match="these batches are no rollouts"):
        begun().load_state_dict({"generator": 1})


@pytest.mark.parametrize("changes", [{"epochs": 1}, {"gamma": 0.9}, {"minibatch": 8}, {"kl": FixedKl(beta=1.0)}])
def test_a_state_taken_under_other_settings_is_refused(changes):
    one = begun()
    next(one)
    (name,) = changes
    with pytest.raises(InputError, match=f"it was taken with {name}="):
        begun(config=SMALL.replace(**changes)).load_state_dict(one.state_dict())
    limited = Environments.Config(name="CartPole-v1", count=2, options={"max_episode_steps": 5}).build(seed=0)
    with pytest.raises(InputError, match="their state has options="):
        limited.load_state_dict(one.environments.state_dict())


# rollouts


def test_advantages_are_those_of_one_step_after_the_other():
    """As stable-baselines3 does it: what would have followed is added to the reward at which an episode was cut off."""
    config = Interaction.Config(steps=64, epochs=1, minibatch=64, gamma=0.9, lam=0.8)
    rollouts = begun("CartPole-v1", config)
    rollouts.environments.vector.close()
    rollouts.environments = Environments.Config(name="CartPole-v1", count=2, options={"max_episode_steps": 12}).build(
        seed=0
    )
    trails: list[Any] = []
    acted = rollouts._acted
    rollouts._acted = lambda: trails.append(acted()) or trails[-1]  # type: ignore[method-assign]
    next(rollouts)
    trail = trails[0]
    assert trail.terminated.any() and trail.truncated.any()
    with torch.no_grad():
        values = rollouts.module(torch.from_numpy(trail.observations).flatten(0, 1)).values.view(65, 2).numpy()
        for i in range(2):
            rewards, following, wanted = trail.rewards[:, i].copy(), 0.0, np.zeros(64)
            for t, reached in trail.cut:
                if trail.truncated[t, i] and not trail.terminated[t, i]:
                    rewards[t] += 0.9 * rollouts.module(torch.from_numpy(reached)).values[i].item()
            for t in reversed(range(64)):
                goes_on = 1.0 - trail.ended[t, i]
                delta = rewards[t] + 0.9 * values[t + 1, i] * goes_on - values[t, i]
                following = delta + 0.9 * 0.8 * goes_on * following
                wanted[t] = following
            found = rollouts.rollout["advantages"].view(64, 2)[:, i].numpy()
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        rollouts.rollout["returns"], rollouts.rollout["advantages"] + rollouts.rollout["old_values"]
    )


def test_each_action_is_learned_from_once_an_epoch():
    rollouts = begun(config=SMALL.replace(kl=FixedKl(beta=0.5)))
    batches = [next(rollouts) for _ in range(rollouts.updates)]
    assert rollouts.updates == 8 and rollouts.number == 1
    for epoch in (batches[:4], batches[4:]):
        logprobs = torch.cat([batch["old_logprobs"] for batch in epoch])
        torch.testing.assert_close(logprobs.sort().values, rollouts.rollout["old_logprobs"].sort().values)
        for batch in epoch:
            assert abs(batch["advantages"].mean()) < 1e-5 and abs(batch["advantages"].std() - 1) < 1e-4
            assert (batch["beta"] == 0.5).all()
    next(rollouts)
    assert rollouts.number == 2


def test_nothing_has_diverged_before_the_first_update():
    rollouts = begun("Pendulum-v1", SMALL.replace(kl=FixedKl()))
    loss = Ppo()(rollouts.module, next(rollouts))
    assert loss.metrics["kl"].item() < 1e-6 and loss.metrics["far"].item() == 0
    batch = rollouts.rollout
    assert rollouts.module(batch["observations"]).policy.kl_from(batch["old_parameters"]).abs().max() < 1e-6


def test_the_weight_of_the_penalty_follows_what_was_measured():
    rollouts = begun(config=SMALL.replace(kl=AdaptiveKl(beta=1.0, target=1e9)))
    for _ in range(rollouts.updates + 1):
        batch = next(rollouts)
    assert rollouts.beta == 0.5 and (batch["beta"] == 0.5).all()  # it hardly moved, so it may move more


@pytest.mark.parametrize("arm", ["clipped", "adaptive", "scaled"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, arm: str):
    config, model, objective = SMALL, {}, Ppo(entropy_weight=0.01)
    if arm == "adaptive":
        config, objective = SMALL.replace(kl=AdaptiveKl()), Ppo(surrogate=Unclipped())
    if arm == "scaled":
        config, model = SMALL.replace(scale_rewards=True), {"scaled": True}
    name = "Pendulum-v1" if arm == "scaled" else "CartPole-v1"
    whole = begun(name, config, **model)
    done = train(whole.module, objective, whole, training(21), evaluate=whole.measured, quiet=True)
    first = begun(name, config, **model)
    train(first.module, objective, first, training(11), folder=tmp_path, quiet=True)  # within an epoch
    second = begun(name, config, **model)
    again = train(second.module, objective, second, training(21), folder=tmp_path, evaluate=second.measured, quiet=True)
    for (key, wanted), found in zip(
        whole.module.state_dict().items(), second.module.state_dict().values(), strict=True
    ):
        assert torch.equal(wanted, found), key
    assert whole.measured() == second.measured() and whole.beta == second.beta
    assert again.history[-1]["loss"] == done.history[-1]["loss"]
    np.testing.assert_array_equal(whole.environments.observations, second.environments.observations)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minibatch": 24}, "make 64 actions, no multiple of minibatch=24"),
        ({"steps": 0}, r"interaction\.steps=0"),
        ({"epochs": 0}, r"interaction\.epochs=0"),
    ],
)
def test_wrong_sizes_are_named(change, message):
    with pytest.raises(InputError, match=message):
        begun(config=SMALL.replace(**change))


# the objective


@pytest.mark.parametrize("value_clip", [None, 0.1])
@pytest.mark.parametrize("surrogate", [Clipped(epsilon=0.1), Unclipped()])
def test_the_objective_is_its_equation_in_float64(surrogate, value_clip):
    """Written out with torch's distributions."""
    objective = Ppo(surrogate=surrogate, value_weight=0.7, value_clip=value_clip, entropy_weight=0.03)
    rollouts = begun("Pendulum-v1", SMALL.replace(kl=FixedKl(beta=0.5)))
    batch = {name: x.double() for name, x in next(rollouts).items()}
    module = rollouts.module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn_like(p)
    found = objective(module, batch)
    told = module(batch["observations"])
    policy = torch.distributions.Normal(told.policy.means, told.policy.log_std.exp())
    means, log_std = batch["old_parameters"].chunk(2, -1)
    r = (policy.log_prob(batch["actions"]).sum(-1) - batch["old_logprobs"]).exp()
    gain = r * batch["advantages"]
    if isinstance(surrogate, Clipped):
        gain = torch.min(gain, r.clip(0.9, 1.1) * batch["advantages"])
    error = (told.values - batch["returns"]) ** 2
    if value_clip is not None:
        low, high = batch["old_values"] - value_clip, batch["old_values"] + value_clip
        error = torch.max(error, (told.values.clip(low, high) - batch["returns"]) ** 2)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(means, log_std.exp()), policy).sum(-1)
    wanted = -gain + 0.7 * error - 0.03 * policy.entropy().sum(-1) + 0.5 * kl
    torch.testing.assert_close(found.mean, wanted.mean(), rtol=1e-10, atol=1e-12)
    assert (r - 1).abs().max() > 0.1
    parameters = list(module.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(found.mean, parameters), torch.autograd.grad(wanted.mean(), parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_micro_batches_add_up_to_the_batch():
    rollouts = begun()
    batch = next(rollouts)
    for pieces in (1, 4):
        rollouts.module.zero_grad()
        differentiate(rollouts.module, Ppo(entropy_weight=0.01), batch, Ranks(), accumulate=pieces)
        gradients = [p.grad.clone() for p in rollouts.module.parameters()]
        if pieces == 1:
            wanted = gradients
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


SB3 = {
    "actor.0": "mlp_extractor.policy_net.0",
    "actor.2": "mlp_extractor.policy_net.2",
    "actor.4": "action_net",
    "critic.0": "mlp_extractor.value_net.0",
    "critic.2": "mlp_extractor.value_net.2",
    "critic.4": "value_net",
}


def from_sb3(policy: Any) -> dict[str, Tensor]:
    there = policy.state_dict()
    named = {f"{a}.{kind}": there[f"{b}.{kind}"].clone() for a, b in SB3.items() for kind in ("weight", "bias")}
    return named | ({"actions.log_std": there["log_std"].clone()} if "log_std" in there else {})


@pytest.mark.parametrize(("name", "entropy_weight"), [("CartPole-v1", 0.01), ("Pendulum-v1", 0.0)])
def test_an_update_is_that_of_stable_baselines3(name, entropy_weight):
    """Its rollout, its advantages, one step of plain gradient descent by its own code and by ours."""
    from stable_baselines3 import PPO

    peer = PPO("MlpPolicy", name, n_steps=64, batch_size=64, n_epochs=3, ent_coef=entropy_weight, seed=0, device="cpu",
               learning_rate=0.5, policy_kwargs={"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}},
               )  # fmt: skip
    before = from_sb3(peer.policy)
    peer.learn(64)
    envs = Environments.Config(name=name).build(seed=0)
    module = ActorCritic.Config().build(envs.width, envs.actions)
    module.load_state_dict(before)
    buffer = peer.rollout_buffer
    batch = {
        "observations": torch.from_numpy(buffer.observations.reshape(64, -1)),
        "actions": torch.from_numpy(buffer.actions.reshape(64, -1)),
        "advantages": torch.from_numpy(buffer.advantages.flatten()),
        "old_logprobs": torch.from_numpy(buffer.log_probs.flatten()),
        "old_values": torch.from_numpy(buffer.values.flatten()),
        "returns": torch.from_numpy(buffer.returns.flatten()),
    }
    if name == "CartPole-v1":
        batch["actions"] = batch["actions"][:, 0].long()
    batch["advantages"] = (batch["advantages"] - batch["advantages"].mean()) / (batch["advantages"].std() + 1e-8)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        differentiate(module, Ppo(entropy_weight=entropy_weight), batch, Ranks(), clip=0.5)
        optimizer.step()
    after = from_sb3(peer.policy)
    for key, x in module.state_dict().items():
        torch.testing.assert_close(x, after[key], rtol=1e-4, atol=2e-6, msg=key)
    assert not torch.equal(before["actor.0.weight"], after["actor.0.weight"])


# learning


def test_a_pole_is_balanced():
    config = Interaction.Config(steps=128, epochs=8, minibatch=128, gamma=0.98, lam=0.8)
    rollouts = begun(config=config, count=8)
    act, source = rollouts.module.acting(), np.random.default_rng(0)
    fresh = Environments.Config(name="CartPole-v1", count=4)

    def drawing(states):
        return act(states, rollouts.environments.actions.noise(source, 4))

    before = np.mean(play(fresh.build(seed=1), drawing, episodes=12))
    steps = 24 * rollouts.updates
    done = train(rollouts.module, Ppo(), rollouts, training(steps, lr=2e-3), evaluate=rollouts.measured, quiet=True)
    after = np.mean(play(fresh.build(seed=1), drawing, episodes=12))
    assert before < 60 and after > 200, (before, after)
    last = done.history[-1]
    assert last["interactions"] == 24 * 1024 and last["episode_return"] > 80 and last["actions"] == 24 * 8 * 1024


def test_a_lake_is_crossed():
    """Observations that are numbers, a reward at the very end."""
    config = Interaction.Config(steps=64, epochs=4, minibatch=128)
    seed_everything(0)
    lake = Environments.Config(name="FrozenLake-v1", count=8, options={"is_slippery": False})
    envs = lake.build(seed=0)
    module = ActorCritic.Config().build(envs.width, envs.actions)
    rollouts = config.build(module, envs, seed=0)
    steps = 16 * rollouts.updates
    train(module, Ppo(entropy_weight=0.01), rollouts, training(steps, lr=1e-3), quiet=True)
    assert play(lake.build(seed=1), module.acting(), episodes=8) == [1.0] * 8


def test_playing_favours_no_short_episode():
    envs = Environments.Config(name="CartPole-v1", count=3).build(seed=0)
    source = np.random.default_rng(0)
    found = play(envs, lambda states: source.integers(2, size=3), episodes=8)
    assert len(found) == 8 and min(found) >= 8


def test_categories_keep_their_parameters():
    policy = Categorical(drawn(4, 3).log_softmax(-1))
    assert policy.kl_from(policy.parameters).abs().max() < 1e-6 and len(policy.first(2).parameters) == 2
