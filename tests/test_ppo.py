"""The paper on proximal policy optimisation: its arms, its score, its recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from allyouneed.align.interaction import Interaction
from allyouneed.core.errors import InputError
from allyouneed.objectives.ppo import Clipped, Unclipped
from allyouneed.papers import ppo


def test_the_arms_are_those_of_table_1() -> None:
    assert len(ppo.ARMS) == 11 and max(ppo.ARMS, key=lambda arm: ppo.ARMS[arm][2]) == ppo.CLIPPED
    for arm, (surrogate, penalty, _) in ppo.ARMS.items():
        assert isinstance(surrogate, Clipped) == arm.startswith("clipping") and (penalty is not None) == ("KL" in arm)
    assert all(ppo.ARMS[arm][1] is not None for arm in ppo.PENALISED)


def test_hyper_parameters_are_those_of_table_3() -> None:
    """Horizon, step size, epochs, minibatch, discount, λ."""
    for name, horizon in (("paper", 2048), ("laptop", 256 * 8)):
        for recipe in ppo.PAPER.sizes[name].recipes:  # type: ignore[attr-defined]
            how = recipe.interaction
            assert how.steps * recipe.environment.count == horizon
            assert (recipe.lr, how.epochs, how.minibatch, how.gamma, how.lam) == (3e-4, 10, 64, 0.99, 0.95)
            assert recipe.model.hidden == (64, 64) and recipe.objective.entropy_weight == 0
    assert len(ppo.PAPER.sizes["paper"].recipes) == 7  # type: ignore[attr-defined]


def test_scores_are_0_before_training_and_1_for_the_best_run() -> None:
    raw = {"a": {"x": [10.0, 20.0], "y": [-1.0, -1.0]}, "b": {"x": [30.0, 5.0], "y": [-2.0, -4.0]}}
    scores = ppo._normalised(raw, {"x": 10.0, "y": -3.0})
    assert scores == {"a": {"x": [0.0, 0.5], "y": [1.0, 1.0]}, "b": {"x": [1.0, -0.25], "y": [0.5, -0.5]}}


def test_a_recipe_learns_what_was_asked_in_whole_rollouts() -> None:
    recipe = ppo.Recipe(
        environment=ppo._environment("CartPole-v1", count=2),
        interactions=100,
        interaction=Interaction.Config(steps=32, epochs=2, minibatch=32),
    )
    rollouts, trained = recipe.learn(0, quiet=True)
    assert rollouts.measured()["interactions"] == 128 and trained.step == 8
    assert [row["interactions"] for row in trained.history] == [64, 128]
    again, _ = recipe.learn(0, quiet=True)
    assert again.measured() == rollouts.measured()


def test_environments_can_be_exchanged_from_the_command_line() -> None:
    config = ppo.PAPER.sizes["smoke"].override("recipes.0.environment.name=FrozenLake-v1", "recipes.0.lr=0.001")
    assert config.recipes[0].environment.name == "FrozenLake-v1" and config.recipes[0].lr == 0.001  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"surrogate\.epsilon=0"):
        config.override("recipes.0.objective.surrogate.epsilon=0")


def test_a_run_that_diverges_counts_with_what_it_had_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ppo.PAPER.sizes["smoke"].recipes[0]  # type: ignore[attr-defined]
    surrogate = Unclipped.__call__
    calls: list[int] = []

    def breaking(self: Unclipped, logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        calls.append(1)
        return surrogate(self, logprobs, old, advantages) / (0.0 if len(calls) > 6 else 1.0)

    monkeypatch.setattr(Unclipped, "__call__", breaking)
    found = ppo._learned((recipe, ppo.FREE), 0, tmp_path)
    assert found["diverged"].startswith("step 7: the loss is") and found["interactions"] == [256]
    assert found["score"] == found["returns"][-1] > 8
    with pytest.raises(InputError, match="unknown environment 'Cart'"):
        unknown = recipe.replace(environment=recipe.environment.replace(name="Cart"))
        ppo._learned((unknown, ppo.FREE), 0, tmp_path / "other")
