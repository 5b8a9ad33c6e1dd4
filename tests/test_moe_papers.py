"""The arms that two papers on experts call equal in operations are so, as PyTorch counts what they compute."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from allyouneed.core.errors import InputError
from allyouneed.papers import moe, moe_explained

SIZES = ("smoke", "laptop", "paper")


def counted(layer: torch.nn.Module, dim: int) -> float:
    """FLOPs a token, forward and as trained; some hundred tokens, as an expert that nobody asks for is no product."""
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(8, 64, dim))
    return counter.get_total_flops() / 512


@pytest.mark.parametrize("size", SIZES)
def test_dense_network_few_and_many_experts_take_as_many_operations(size):
    config = moe.PAPER.sizes[size]
    costs = {name: moe.flops(config, arm) for name, arm in moe.arms_of(config).items()}
    assert max(costs.values()) <= 1.01 * min(costs.values())
    if size != "paper":
        for arm in moe.arms_of(config).values():
            model = moe.model_of(config, arm, vocab_size=7)[1]
            assert counted(model.layers.between, config.dim) == moe.flops(config, arm)


@pytest.mark.parametrize("size", SIZES)
def test_dense_network_switch_and_mixtral_take_as_many_operations(size):
    config = moe_explained.PAPER.sizes[size]
    arms = moe_explained.arms_of(config)
    wide = arms.pop("dense, equal memory")
    costs = {name: moe_explained.flops(config, arm.channel) for name, arm in arms.items()}
    assert max(costs.values()) <= 1.01 * min(costs.values())
    assert wide.channel.hidden_dim == config.num_experts * arms["switch"].channel.experts.hidden_dim
    if size != "paper":
        for name, arm in arms.items():
            layer = arm.channel.build(config.model.dim).eval()  # where nothing is dropped
            assert counted(layer, config.model.dim) == costs[name]


def test_widths_that_do_not_come_near_are_refused():
    config = moe.PAPER.sizes["laptop"]
    with pytest.raises(InputError, match="the arms are to have as many, within 1%"):
        moe.arms_of(config.replace(experts=(8, 31)))
    explained = moe_explained.PAPER.sizes["laptop"]
    with pytest.raises(InputError, match="the arms are to have as many, within 1%"):
        moe_explained.arms_of(explained.replace(num_experts=9))
