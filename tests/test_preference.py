"""Losses of preferences and rewards: the papers' equations in float64, gradients by differences, parts that add up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator
from allyouneed.data.packing import IGNORED, answer
from allyouneed.data.preferences import Ranked, collate
from allyouneed.models import llama
from allyouneed.models.heads import Classifier
from allyouneed.objectives import preference, reward
from allyouneed.objectives.likelihood import likelihood

BETA, EPSILON = 0.3, 0.2
LOSSES = {
    "dpo": preference.dpo(BETA),
    "conservative dpo": preference.dpo(BETA, EPSILON),
    "robust dpo": preference.robust_dpo(BETA, EPSILON),
    "ipo": preference.ipo(BETA),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def equation(name: str, h: float) -> float:
    """The papers' own words, in Python's numbers."""
    right, wrong = -math.log(sigmoid(BETA * h)), -math.log(sigmoid(-BETA * h))
    return {
        "dpo": right,
        "conservative dpo": (1 - EPSILON) * right + EPSILON * wrong,
        "robust dpo": ((1 - EPSILON) * right - EPSILON * wrong) / (1 - 2 * EPSILON),
        "ipo": (h - 1 / (2 * BETA)) ** 2,
    }[name]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_pairs_are_their_equations(name):
    h = torch.tensor([-40.0, -3.0, -0.1, 0.0, 0.1, 3.0, 40.0], dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([equation(name, x) for x in h.tolist()], dtype=torch.float64)
    torch.testing.assert_close(LOSSES[name](h).detach(), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(LOSSES[name](h.detach().float()).double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(LOSSES[name], (h,))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_stay_finite_far_out(name):
    h = torch.tensor([-1e4, 1e4], requires_grad=True)
    LOSSES[name](h).sum().backward()
    assert h.grad.isfinite().all() and LOSSES[name](h).isfinite().all()


def test_the_robust_loss_of_flipped_labels_is_on_average_the_plain_one():
    h = torch.linspace(-3, 3, 13, dtype=torch.float64)
    robust, plain = LOSSES["robust dpo"], LOSSES["dpo"]
    torch.testing.assert_close((1 - EPSILON) * robust(h) + EPSILON * robust(-h), plain(h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preference.dpo(0.0), "beta=0.0"),
        (lambda: preference.ipo(math.nan), "beta=nan"),
        (lambda: preference.dpo(0.1, 0.5), "label_smoothing=0.5"),
        (lambda: preference.robust_dpo(0.1, -0.1), "label_smoothing=-0.1"),
    ],
)
def test_numbers_without_a_meaning(make, message):
    with pytest.raises(InputError, match=message):
        make()


def pairs(count: int = 3) -> list[Ranked]:
    """Prompts and answers of different lengths."""
    draw = generator(0, "pairs")

    def some(length: int) -> list[int]:
        return torch.randint(3, 20, (length,), generator=draw).tolist()

    made = []
    for i in range(count):
        prompt = some(2 + i)
        made.append(Ranked((answer(prompt, some(1 + i)), answer(prompt, some(4))), (0, 1), margin=0.5 * i))
    return made


def policy() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 16}
    return llama.architecture(vocab_size=20, context=16, **sizes).build().double()


def test_the_objective_is_the_loss_of_each_pair_alone():
    module, made = policy(), pairs()
    reference = torch.tensor([[-3.0, -9.0], [-5.0, -5.0], [-12.0, -8.0]], dtype=torch.float64)
    loss = preference.preference(LOSSES["dpo"], BETA)(module, collate(made) | {"reference": reference})
    ratios = torch.zeros(3, 2, dtype=torch.float64)
    for i, example in enumerate(made):
        for side, piece in enumerate(example.pieces):
            logits = module(torch.tensor([piece.ids])).logits[0].log_softmax(-1)
            told = [(place, target) for place, target in enumerate(piece.targets) if target != IGNORED]
            ratios[i, side] = sum(logits[place, target] for place, target in told) - reference[i, side]
    h = ratios[:, 0] - ratios[:, 1]
    wanted = torch.tensor([equation("dpo", x) for x in h.tolist()], dtype=torch.float64)
    torch.testing.assert_close(loss.total, wanted.sum(), rtol=1e-10, atol=1e-10)
    assert loss.weight == 3 and loss.unit == "pairs"
    assert loss.metrics["accuracy"] == (h > 0).sum()
    for name, value in (("chosen_reward", ratios[:, 0]), ("rejected_reward", ratios[:, 1]), ("margin", h)):
        torch.testing.assert_close(loss.metrics[name], BETA * value.sum(), rtol=1e-10, atol=1e-10)


def test_per_token_every_answer_counts_by_its_mean():
    module, batch = policy(), collate(pairs()) | {"reference": torch.zeros(3, 2, dtype=torch.float64)}
    counts = torch.tensor([[1, 4], [2, 4], [3, 4]])  # tokens of the answers
    scores = preference.answer_logprobs(module, batch) / counts
    loss = preference.preference(LOSSES["ipo"], BETA, per_token=True)(module, batch)
    torch.testing.assert_close(loss.total, LOSSES["ipo"](scores[:, 0] - scores[:, 1]).sum())


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_the_policy_as_differences_say(name):
    module, batch = policy(), collate(pairs()) | {"reference": torch.zeros(3, 2, dtype=torch.float64)}
    objective, weight = preference.preference(LOSSES[name], BETA), module.head.weight
    objective(module, batch).total.backward()
    for place in ((3, 0), (7, 5), (19, 15)):
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] += step
                sides.append(objective(module, batch).total.item())
                weight[place] -= step
        assert weight.grad[place].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", ["preference", "reward"])
def test_micro_batches_add_up(kind):
    made = pairs(4)
    batch = collate(made) | {"reference": torch.zeros(4, 2, dtype=torch.float64)}
    objective = preference.preference(LOSSES["dpo"], BETA) if kind == "preference" else reward.reward()
    module = policy() if kind == "preference" else rewarding()
    whole = objective(module, batch)
    parts = [objective(module, {name: x[i::2] for name, x in batch.items()}) for i in range(2)]
    for name in ("total", "weight"):
        torch.testing.assert_close(getattr(whole, name), sum(getattr(part, name) for part in parts))
    for name, x in whole.metrics.items():
        torch.testing.assert_close(x, sum(part.metrics[name] for part in parts))


def test_without_a_reference_zeros_stand_for_it():
    module, batch = policy(), collate(pairs())
    flat = {name: batch[name].flatten(0, 1) for name in ("ids", "targets", "segments")}
    logprobs = likelihood(module, flat).sum(-1).view(3, 2)
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    loss = preference.preference(LOSSES["ipo"], BETA)(module, batch | {"reference": zeros})
    torch.testing.assert_close(loss.total, LOSSES["ipo"](logprobs[:, 0] - logprobs[:, 1]).sum())


def rewarding() -> Classifier:
    torch.manual_seed(0)
    model = policy().config
    config = Classifier.Config(model=model, labels=("reward",), bias=False, dropout=0.0)
    head = config.build().double()
    nn.init.normal_(head.layer.weight)
    return head


def test_ranking_is_the_sum_over_pairs():
    """InstructGPT, eq. 1, and Llama 2, eq. 2, in Python's numbers; ties and what is not there count for nothing."""
    rewards = torch.randn(4, 5, generator=generator(0, "rewards"), dtype=torch.float64).requires_grad_()
    ranks = torch.tensor([[0, 1, 2, 3, 4], [2, 0, 1, 1, IGNORED], [0, 0, 0, 0, 0], [1, 0, IGNORED, IGNORED, IGNORED]])
    margins = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    wanted = []
    for row, order, margin in zip(rewards.tolist(), ranks.tolist(), margins.tolist(), strict=True):
        places = [i for i, rank in enumerate(order) if rank != IGNORED]
        better = [(i, j) for i in places for j in places if order[i] < order[j]]
        losses = [-math.log(sigmoid(row[i] - row[j] - margin)) for i, j in better]
        wanted.append(sum(losses) / len(losses) if losses else 0.0)
    found = reward.ranking(rewards, ranks, margins)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda r: reward.ranking(r, ranks, margins), (rewards,))
    two = reward.ranking(rewards[:, :2], torch.tensor([[0, 1]] * 4), margins)
    torch.testing.assert_close(two, reward.pairwise(rewards[:, 0], rewards[:, 1], margins))


def test_a_reward_model_reads_each_answer_alone():
    head, made = rewarding(), pairs()
    with torch.no_grad():
        told = reward.rewards(head, collate(made))
        for i, example in enumerate(made):
            for side, piece in enumerate(example.pieces):
                last = head.model.hidden(torch.tensor([piece.ids]))[0, -1]
                torch.testing.assert_close(told[i, side], (head.layer.weight @ last)[0], rtol=1e-9, atol=1e-9)


def test_answers_that_are_not_there_have_no_gradient_and_no_say():
    head, made = rewarding(), pairs(2)
    three = Ranked((*made[0].pieces, answer([4], [5])), (0, 1, 2), 0.0)
    lacking = collate([three, made[1]])
    assert lacking["ranks"].tolist() == [[0, 1, 2], [0, 1, IGNORED]]
    loss = reward.reward()(head, lacking)
    loss.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    alone = [reward.reward()(head, collate([one])).total for one in (three, made[1])]
    torch.testing.assert_close(loss.total, alone[0] + alone[1])


def test_half_right_where_both_are_equal():
    ranks = torch.tensor([[0, 1]])
    assert reward.pair_accuracy(torch.tensor([[1.0, 1.0]]), ranks).item() == 0.5
    assert reward.pair_accuracy(torch.tensor([[1.0, 2.0]]), ranks).item() == 0.0
