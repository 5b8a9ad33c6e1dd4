"""The setting of theorem 1 of the pre-LN paper, against its equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from allyouneed.nn.norms import LayerNorm, NoNorm
from allyouneed.nn.sight import whole_rows
from allyouneed.papers.pre_ln import PAPER, placed, theorem_setting


def normalised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("name", ["pre-LN", "post-LN"])
def test_the_setting_is_that_of_the_theorem(name: str) -> None:
    torch.manual_seed(0)
    module = theorem_setting(name, 16, 3).double()
    x = torch.randn(2, 5, 16).double()
    found = module.follow(x, whole_rows(module.positions, x, causal=False))
    for block in module.blocks:
        v, up, out = block.mixer.v.weight, block.channel.up.weight, block.channel.out.weight
        for branch in (
            lambda h, v=v: (h @ v.T).mean(1, keepdim=True).expand_as(h),
            lambda h, up=up, out=out: F.relu(h @ up.T) @ out.T,
        ):
            x = x + branch(normalised(x)) if name == "pre-LN" else normalised(x + branch(x))
    assert (found - (normalised(x) if name == "pre-LN" else x)).abs().max() <= 1e-6


@torch.no_grad()
def test_matrices_are_square_and_of_variance_one_over_d() -> None:
    torch.manual_seed(0)
    (block,) = theorem_setting("pre-LN", 256, 1).blocks
    for part in (block.mixer.v, block.channel.up, block.channel.out):
        assert part.weight.shape == (256, 256) and abs(256 * part.weight.var().item() - 1) <= 0.05
    assert block.channel.up.bias.abs().max() == block.channel.out.bias.abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize(("name", "low", "high"), [("post-LN", 1.5, 1.5), ("pre-LN", 1 + 6 / 2, 1 + 3 * 6 / 2)])
def test_streams_are_as_large_as_lemma_2_says(name: str, low: float, high: float) -> None:
    """E‖x‖²/d before the last norm: 3/2 after it stands between, 1 + L/2 to 1 + 3L/2 where it stands inside."""
    torch.manual_seed(0)
    found: list[float] = []
    for _ in range(40):
        module = theorem_setting(name, 128, 6)
        last = module.norm if name == "pre-LN" else module.blocks[-1].channel_norm
        last.register_forward_pre_hook(lambda _, args: found.append(args[0].pow(2).mean().item()))
        x = torch.randn(1, 16, 128)
        module.follow(x, whole_rows(module.positions, x, causal=False))
    assert 0.95 * low <= sum(found) / len(found) <= 1.05 * high


def test_only_the_placement_and_its_last_norm_move() -> None:
    model = PAPER.sizes["laptop"].model
    pre, post = placed(model, "pre-LN"), placed(model, "post-LN")
    assert isinstance(pre.norm, LayerNorm.Config) and isinstance(post.norm, NoNorm.Config)
    assert pre.blocks[0].replace(placement=post.blocks[0].placement) == post.blocks[0] != pre.blocks[0]
    assert pre.replace(blocks=post.blocks, norm=post.norm) == post
    names = [{name for name, _ in config.build().named_parameters()} for config in (pre, post)]
    assert names[0] - names[1] == {"norm.weight", "norm.bias"} and not names[1] - names[0]
