"""Memorisation and term frequency against slow twins: one prompt at a time, one term at a time, one place at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from allyouneed.core.errors import InputError
from allyouneed.evaluate.frequency import answered, by_frequency, count_terms, frequency_gap
from allyouneed.evaluate.memorisation import arrivals, auc, memorised, reproduced
from allyouneed.generate.engine import Engine
from allyouneed.models import gpt_neox


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    made = gpt_neox.architecture(vocab_size=31, context=24, dim=16, num_layers=2, num_heads=2).build().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


@torch.no_grad()
def greedy(module, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(module(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_reproduced_is_how_far_greedy_decoding_agrees(module):
    """Continuations that the model would give, spoilt after 0 … all of their tokens; prompts of any length."""
    source = torch.Generator().manual_seed(1)
    prompts, continuations, expected = [], [], []
    for n in range(40):
        prompt = torch.randint(31, (1 + n % 7,), generator=source).tolist()
        own, right = greedy(module, prompt, 3 + n % 5), n % 9
        if right < len(own):
            own[right] = (own[right] + 1) % 31
        prompts, continuations, expected = [*prompts, prompt], [*continuations, own], [*expected, min(right, len(own))]
    assert len(set(expected)) > 5
    for batch in (1, 7, 100):
        assert (
            reproduced(Engine(module, config=Engine.Config(max_batch=batch)), prompts, continuations).tolist()
            == expected
        )
    # the end token is a token like any other here
    assert reproduced(Engine(module, list(range(31))), prompts, continuations).tolist() == expected
    wholly = [count == len(own) for count, own in zip(expected, continuations, strict=True)]
    assert answered(Engine(module), prompts, continuations).tolist() == wholly and any(wholly)


def test_memorised_takes_all_of_the_continuation_and_no_more(module):
    prompts = torch.randint(31, (6, 8), generator=torch.Generator().manual_seed(2))
    own = torch.tensor([greedy(module, row.tolist(), 8) for row in prompts])
    sequences = torch.cat((prompts, own, torch.full((6, 2), 5)), 1)
    sequences[1, 15] = (sequences[1, 15] + 1) % 31  # the last token that is asked for
    sequences[2, 8] = (sequences[2, 8] + 1) % 31  # the first
    sequences[3, 16] = 9  # beyond
    found = memorised(Engine(module), sequences, prompt=8, continuation=8)
    assert found.tolist() == [True, False, False, True, True, True]


def test_memorisation_refuses_what_it_cannot_ask(module):
    with pytest.raises(InputError, match=r"32 \+ 32 are asked for"):
        memorised(Engine(module), torch.zeros(2, 63, dtype=torch.long))
    with pytest.raises(InputError, match="context"):
        memorised(Engine(module), torch.zeros(2, 64, dtype=torch.long))
    with pytest.raises(InputError, match="empty continuation"):
        reproduced(Engine(module), [[1]], [[]])


# The order of arrival


def test_p_is_uniform_where_places_do_not_matter():
    """Sequences that stand at several places and groups that are memorised unequally often: p ≤ α with chance ≤ α."""
    source, found = np.random.default_rng(0), []
    groups = np.repeat([0, 1, 2], 40)
    for seed in range(150):
        places = source.integers(0, 500, (120, 4))
        places[groups < 2, 2:] = -1
        events = source.random(120) < np.array([0.1, 0.3, 0.8])[groups]
        found.append(arrivals(events, places, end=500, bins=8, groups=groups, seed=seed).p)
    for alpha in (0.05, 0.2, 0.5):
        share = np.mean(np.array(found) <= alpha)
        assert abs(share - alpha) < 3.5 * (alpha * (1 - alpha) / 150) ** 0.5, (alpha, share)


def test_where_few_of_many_are_memorised_the_dispersion_is_poissons():
    source = np.random.default_rng(1)
    places = source.integers(0, 10_000, 5_000)
    dispersions = [
        arrivals(source.random(5_000) < 0.04, places, end=10_000, bins=50, seed=s).dispersion for s in range(8)
    ]
    assert abs(np.mean(dispersions) - 1) < 3 * (2 / 49 / 8) ** 0.5


def test_an_order_that_matters_is_found():
    source = np.random.default_rng(2)
    places = source.integers(0, 1000, 300)
    late = source.random(300) < 0.2 + 0.4 * places / 1000
    assert arrivals(late, places, end=1000, bins=8).p < 0.01
    assert auc(places, late) > 0.6


def test_counts_are_those_of_the_bins():
    found = arrivals(np.array([1, 0, 1]), np.array([[0, 99], [50, 51], [49, -1]]), end=100, bins=4)
    assert found.counts == (1, 1, 0, 1)
    with pytest.raises(InputError, match="nothing was memorised"):
        arrivals(np.zeros(3), np.arange(3), end=3, bins=3)


def test_auc_is_the_share_of_pairs():
    source = np.random.default_rng(3)
    scores, events = source.integers(0, 9, 70), source.random(70) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[events] for b in scores[~events]]
    assert abs(auc(scores, events) - np.mean(pairs)) < 1e-12
    with pytest.raises(InputError, match="both kinds"):
        auc(scores, np.ones(70))


# Frequencies of terms


def test_terms_are_counted_as_by_hand():
    source = np.random.default_rng(4)
    pieces = [torch.from_numpy(source.integers(0, 4, shape)) for shape in ((200,), (30, 9), (1, 5))]
    terms = [source.integers(0, 5, 1 + n % 4).tolist() for n in range(60)] + [[3] * 12]
    by_hand = [
        sum(
            row[i : i + len(term)].tolist() == term
            for piece in pieces
            for row in (piece[None] if piece.dim() == 1 else piece)
            for i in range(len(row) - len(term) + 1)
        )
        for term in terms
    ]
    assert count_terms(pieces, terms).tolist() == by_hand
    assert count_terms([piece.to(torch.uint8) for piece in pieces], terms).tolist() == by_hand
    assert max(by_hand) > 50 and min(by_hand) == 0
    with pytest.raises(InputError, match="empty term"):
        count_terms(pieces, [[]])


def test_accuracy_by_frequency():
    source = np.random.default_rng(5)
    frequencies = source.permutation(1000)
    right = source.random(1000) < frequencies / 1000
    groups = by_frequency(frequencies, right, groups=10)
    assert [(group.least, group.most) for group in groups] == [(k, k + 99) for k in range(0, 1000, 100)]
    for group in groups:
        inside = (frequencies >= group.least) & (frequencies <= group.most)
        assert group.accuracy.estimate == right[inside].mean() and group.questions == 100
    gap = frequency_gap(frequencies, right)
    assert abs(gap.estimate - (groups[-1].accuracy.estimate - groups[0].accuracy.estimate)) < 1e-12
    assert gap.low < 0.9 < gap.high and gap.low > 0.7
    nothing = frequency_gap(frequencies, source.random(1000) < 0.5)
    assert nothing.low < 0 < nothing.high
    for bad in ({"share": 0.6}, {"share": 1e-4}):
        with pytest.raises(InputError, match="frequency_gap"):
            frequency_gap(frequencies, right, **bad)
    with pytest.raises(InputError, match="too few"):
        by_frequency(frequencies[:5], right[:5])
