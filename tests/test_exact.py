"""The enumerated world and what is exact about it, against sums written out one by one and draws counted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from allyouneed.align.exact import Point, Truth, reached, text_logprobs
from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator
from allyouneed.data.enumerated import PROMPT, Enumerated
from allyouneed.models import llama

WORLD = Enumerated.Config(vocab_size=4, length=3, seed=1).build()


def truth() -> Truth:
    logits = torch.randn(64, generator=generator(0, "truth"), dtype=torch.float64)
    return Truth(logits.log_softmax(0), WORLD.rewards)


def test_texts_rewards_and_letters():
    assert WORLD.texts.tolist() == [list(text) for text in itertools.product(range(4), repeat=3)]
    for text, found in list(zip(WORLD.texts.tolist(), WORLD.rewards.tolist(), strict=True))[::7]:
        single = sum(WORLD.single[t].item() for t in text) / math.sqrt(3)
        pairs = sum(WORLD.neighbours[a, b].item() for a, b in itertools.pairwise(text)) / math.sqrt(2)
        wanted = (single + pairs + WORLD.ends[text[0], text[-1]].item()) / math.sqrt(3)
        assert found == pytest.approx(wanted, rel=1e-12)
        assert WORLD.read(WORLD.tokenizer.decode(text)).tolist() == text
    assert WORLD.tokenizer.vocab_size == 4 and WORLD.tokenizer.eos_ids == ()
    again = Enumerated.Config(vocab_size=4, length=3, seed=1).build()
    assert torch.equal(WORLD.rewards, again.rewards)
    with pytest.raises(InputError, match="vocab_size=16, length=7"):
        Enumerated.Config(length=7)


def test_labellers_prefer_as_often_as_bradley_and_terry_say():
    first, second = WORLD.texts[5].expand(20_000, 3), WORLD.texts[50].expand(20_000, 3)
    chance = 1 / (1 + math.exp(WORLD.rewards[50] - WORLD.rewards[5]))
    found = WORLD.preferred(first, second, generator(0, "labels")).double().mean().item()
    assert abs(found - chance) < 4 * math.sqrt(chance * (1 - chance) / 20_000)


def test_people_write_by_their_chain():
    texts = WORLD.written(20_000, generator(0, "texts"))
    begun = torch.bincount(texts[:, 0], minlength=4) / 20_000
    assert (begun - WORLD.chain[PROMPT]).abs().max() < 0.02
    after = texts[texts[:, 0] == 2][:, 1]
    assert (torch.bincount(after, minlength=4) / len(after) - WORLD.chain[2]).abs().max() < 0.03


def test_all_texts_as_a_model_has_them():
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 16}
    module = llama.architecture(vocab_size=4, context=8, **sizes).build()
    found = text_logprobs(module, PROMPT, 3, rows=5)
    assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    with torch.no_grad():
        for place in (0, 13, 63):
            text = WORLD.texts[place]
            logprobs = module(torch.tensor([[PROMPT, *text]])).logits[0].double().log_softmax(-1)
            assert found[place].item() == pytest.approx(
                sum(logprobs[t, x].item() for t, x in enumerate(text)), abs=1e-5
            )
    assert module.training


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_the_best_policy_is_best(beta):
    one = truth()
    best = one.best(beta)
    p, r = one.logprobs.exp(), one.rewards
    torch.testing.assert_close(best.exp(), p * (r / beta).exp() / (p * (r / beta).exp()).sum())

    def worth(policy: torch.Tensor) -> float:
        found = one.at(policy)
        return found.reward - beta * found.kl

    log_z = (p * (r / beta).exp()).sum().log().item()
    assert worth(best) == pytest.approx(beta * log_z, rel=1e-10)
    draw = generator(0, "others")
    for scale in (0.01, 0.1, 1.0):
        other = (best + scale * torch.randn(64, generator=draw, dtype=torch.float64)).log_softmax(0)
        assert worth(other) < worth(best)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_best_of_n_is_what_drawing_gives(count):
    one = Truth(truth().logprobs, WORLD.rewards.round(decimals=0))  # many equals
    found = one.best_of(count).exp()
    assert found.sum().item() == pytest.approx(1.0)
    drawn = torch.multinomial(one.logprobs.exp(), 60_000 * count, replacement=True, generator=generator(0, count))
    drawn = drawn.view(-1, count)
    chosen = drawn.gather(1, one.rewards[drawn].argmax(1, keepdim=True))[:, 0]
    counted = torch.bincount(chosen, minlength=64) / len(chosen)
    assert (counted - found).abs().max() < 0.006
    if count == 1:
        torch.testing.assert_close(found, one.logprobs.exp())


def test_best_of_n_costs_less_than_the_known_bound_and_stays_below_the_frontier():
    one = truth()
    line = [one.start, *one.frontier([10 ** (2 - place / 50) for place in range(201)])]
    for count in (2, 4, 16):
        point = one.at(one.best_of(count))
        assert 0 < point.kl <= math.log(count) - (count - 1) / count + 1e-9  # equal only where no text weighs much
        assert point.reward <= reached(line, point.kl) + 1e-4


def test_near_the_reference_gains_grow_with_the_root_of_the_divergence():
    one = truth()
    mean = one.start.reward
    deviation = (one.logprobs.exp() * (one.rewards - mean) ** 2).sum().sqrt().item()
    near, far = one.frontier([1000.0, 100.0])
    for point in (near, far):
        assert point.reward - mean == pytest.approx(deviation * math.sqrt(2 * point.kl), rel=0.02)
    assert reached([one.start, far], near.kl) == pytest.approx(near.reward, rel=1e-3)
    assert reached([one.start, near, far], near.kl) == pytest.approx(near.reward, rel=1e-12)


def test_divergence_against_sums():
    one, other = truth(), torch.randn(64, generator=generator(1, "x"), dtype=torch.float64).log_softmax(0)
    found = one.at(other)
    rows = zip(other.tolist(), one.logprobs.tolist(), one.rewards.tolist(), strict=True)
    terms = [(math.exp(a) * (a - b), math.exp(a) * r) for a, b, r in rows]
    kl, reward = (sum(column) for column in zip(*terms, strict=True))
    assert found == Point(pytest.approx(kl), pytest.approx(reward))
    nothing = torch.full((64,), -math.inf, dtype=torch.float64)
    nothing[3] = 0.0
    assert one.at(nothing) == Point(pytest.approx(-one.logprobs[3].item()), pytest.approx(one.rewards[3].item()))
