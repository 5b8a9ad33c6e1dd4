"""Losses against the same equations in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from allyouneed.core.seeds import generator
from allyouneed.objectives.cross_entropy import cross_entropy

CASES = {"usual": 1.0, "one class certain": 40.0, "far beyond what exp can hold": 1e4}


@pytest.mark.parametrize("scale", CASES.values(), ids=CASES)
@pytest.mark.parametrize("ignored", [(), (0, 3), range(12)], ids=["none ignored", "two ignored", "all ignored"])
def test_cross_entropy(scale, ignored):
    source = generator(0, "cross entropy")
    logits = (scale * torch.randn(12, 50, generator=source)).requires_grad_()
    targets = torch.randint(50, (12,), generator=source)
    targets[list(ignored)] = -100
    exact = logits.detach().double().requires_grad_()
    wanted = F.cross_entropy(exact, targets, ignore_index=-100, reduction="sum")
    found = cross_entropy(logits, targets, ignored=-100)
    (wanted * 0.7).backward()
    (found * 0.7).backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_cross_entropy_is_differentiable_once():
    logits = torch.randn(3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        cross_entropy(logits, torch.tensor([0, 1, 2]), ignored=-100), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()
