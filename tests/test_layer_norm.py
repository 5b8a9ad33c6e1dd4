"""Table 1 of the layer norm paper, cell by cell: what leaves the output as it was, and what does not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from allyouneed.nn.norms import NoNorm
from allyouneed.papers.layer_norm import CHANGES, METHODS, PAPER, Arm, difference, held_out_losses, steps_ratio

# Ba et al. 2016, table 1
PRINTED = {
    #               matrix: scaled, shifted | vector scaled | data: scaled, shifted | one case scaled
    "batch norm": (True, False, True, True, True, False),
    "weight norm": (True, False, True, False, False, False),
    "layer norm": (True, True, False, True, False, True),
}
ORDER = ("weight matrix scaled", "weight matrix shifted", "weight vector scaled", "data scaled", "data shifted",
         "one case scaled")  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_invariances_are_those_of_table_1(method: str, change: str) -> None:
    moved = [difference(method, change, seed) for seed in range(20)]
    if PRINTED[method][ORDER.index(change)]:
        assert max(moved) <= 1e-6
    else:
        assert min(moved) >= 0.01


def test_steps_are_compared_at_the_lowest_loss_that_both_reach() -> None:
    fast, slow = {"steps": [5, 10, 20], "loss": [4.0, 2.0, 2.5]}, {"steps": [5, 10, 20], "loss": [4.0, 3.5, 3.0]}
    assert steps_ratio(fast, slow) == pytest.approx(7.5 / 20)
    assert steps_ratio(slow, fast) == pytest.approx(20 / 7.5)
    assert steps_ratio(fast, fast) == 1.0
    never = {"steps": [5, 10, 20], "loss": [9.0, 9.0, 9.0]}
    assert steps_ratio(fast, never) == 1.0  # at their first measurement both are there


def test_a_training_that_diverges_counts_as_the_uniform_guess(tmp_path: Path) -> None:
    config = PAPER.sizes["smoke"]
    arm = Arm(config.transformer.replace(norm=NoNorm.Config()), rows=4, steps=7)
    bytes_ = torch.arange(400) % 256
    found = held_out_losses(config, arm, 1e30, (bytes_, bytes_), seed=0, folder=tmp_path / "diverged")
    assert found == {"steps": [2, 4, 6, 7], "loss": [math.log(256)] * 4}
    sound = held_out_losses(config, arm, 1e-3, (bytes_, bytes_), seed=0, folder=tmp_path / "sound")
    assert sound["steps"] == found["steps"] and max(sound["loss"]) < 6.0
