"""What the papers on alignment train alike: measures held against their definitions on a model of random weights."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from allyouneed.core.seeds import seed_everything
from allyouneed.data.labellers import Labeller
from allyouneed.data.orders import Orders
from allyouneed.data.packing import IGNORED
from allyouneed.papers import aligned
from allyouneed.papers.aligned import Speaker

WORLD = Orders.Config().build()
PROMPTS = [order.prompt for order in WORLD.orders(24, seed=0)]


def speaker(seed: int) -> Speaker:
    seed_everything(seed)
    tokenizer = WORLD.tokenizer()
    model = aligned.small(16, 1, vocab_size=tokenizer.vocab_size, context=48).build()
    torch.nn.init.normal_(model.head.weight, std=0.6)  # far from uniform
    return Speaker(model.eval(), tokenizer, 6)


def things(prompts, completions):
    """How many words of a completion name things."""
    return [float(sum(word in WORLD.things for word in text.split())) for text in completions]


def test_the_divergence_is_that_of_the_answers_own_log_probabilities():
    one, other = speaker(0), speaker(1)
    answers = one.answers(PROMPTS, seed=3)
    assert abs(one.divergence(one.module, PROMPTS, answers)) < 1e-5
    total = 0.0
    for prompt, said in zip(PROMPTS, answers, strict=True):
        ids = one.tokenizer.encode(prompt)
        whole = torch.tensor([ids + list(said.token_ids)])
        for module, sign in ((one.module, 1), (other.module, -1)):
            logprobs = module(whole).logits[0].log_softmax(-1)
            total += sign * sum(logprobs[len(ids) - 1 + i, t].item() for i, t in enumerate(said.token_ids))
    assert one.divergence(other.module, PROMPTS, answers) == pytest.approx(total / len(answers), abs=1e-4)
    assert total / len(answers) > 0.1


def test_the_loss_of_texts_is_the_mean_over_their_words_and_their_end():
    one, texts = speaker(0), WORLD.texts(3, seed=0)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[0, *one.tokenizer.encode(text), 0]])
        logprobs = one.module(ids[:, :-1]).logits[0].log_softmax(-1)
        total -= logprobs.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    assert one.loss(texts) == pytest.approx(total / count, rel=1e-5)


def test_without_a_labeller_the_truth_ranks_and_equals_are_equal():
    one = speaker(0)
    found = aligned.ranked(one, PROMPTS, things, None, 4, seed=0, margin=lambda gap: gap)
    assert len(found) >= 12
    for each in found:
        said = [one.tokenizer.decode([t for t in piece.targets if t != IGNORED]) for piece in each.pieces]
        worth = things(said, said)
        for i, j in combinations(range(len(worth)), 2):
            assert (worth[i] > worth[j]) == (each.ranks[i] < each.ranks[j])
        assert each.margin == max(worth) - min(worth) > 0
        assert len({tuple(piece.ids) for piece in each.pieces}) == len(each.pieces)
    noisy = aligned.ranked(one, PROMPTS, things, Labeller.Config(temperature=0.0, careless=1.0).build(), 4, seed=0)
    assert all(sorted(each.ranks) == list(range(len(each.ranks))) for each in noisy)


def test_a_reward_model_learns_what_is_easy_to_tell(tmp_path):
    one = speaker(0)
    prompts = [order.prompt for order in WORLD.orders(240, seed=1)]
    learned = aligned.ranked(one, prompts, things, None, 4, seed=0)
    model = aligned.graded(one, learned, aligned.stage(60, 1e-2, rows=32), 0, tmp_path)
    assert aligned.right(model, aligned.ranked(one, PROMPTS, things, None, 4, seed=1)) > 0.85
    none, all_ = model([PROMPTS[0]] * 2, ["red blue red", " ".join(WORLD.things[:3])])
    assert none < all_


def test_ties_are_half_a_win():
    assert aligned.winning([1.0, 2.0, 3.0, 0.0], [1.0, 1.0, 4.0, 0.0]) == (0.5 + 1 + 0 + 0.5) / 4
    assert math.isclose(aligned.winning([1.0], [1.0]), 0.5)
