"""Grades against their definitions spelled out, worlds against arithmetic, generated answers against plain decoding."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator
from allyouneed.data.packing import IGNORED
from allyouneed.data.reckoning import Products, Sums
from allyouneed.evaluate import grades
from allyouneed.evaluate.answers import read, weighed, written
from allyouneed.models import llama
from allyouneed.papers.emergent import PAPER, Ladder


def distance(one, other):
    """Levenshtein's definition, without a table."""

    @functools.cache
    def between(i, j):
        if not i or not j:
            return i + j
        same = between(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(same, between(i - 1, j) + 1, between(i, j - 1) + 1)

    return between(len(one), len(other))


def drawn(source, count, symbols=4, longest=9):
    return [source.integers(symbols, size=source.integers(1, longest)).tolist() for _ in range(count)]


def test_edit_distance_is_levenshteins():
    source = np.random.default_rng(0)
    pairs = list(zip(drawn(source, 300), drawn(source, 300), strict=True))
    assert [grades.edit_distance(a, b) for a, b in pairs] == [distance(a, b) for a, b in pairs]
    assert grades.edit_distance([], [1, 2]) == 2 and grades.edit_distance([], []) == 0


def test_edit_distance_is_a_metric():
    source = np.random.default_rng(1)
    for a, b, c in zip(drawn(source, 60), drawn(source, 60), drawn(source, 60), strict=True):
        assert grades.edit_distance(a, b) == grades.edit_distance(b, a)
        assert grades.edit_distance(a, c) <= grades.edit_distance(a, b) + grades.edit_distance(b, c)


def test_grades_of_answers_are_counted_as_defined():
    source = np.random.default_rng(2)
    found, references = drawn(source, 200), drawn(source, 200)
    for one, right, exact, tokens, edits in zip(
        found,
        references,
        grades.exact_match(found, references),
        grades.token_accuracy(found, references),
        grades.edit_similarity(found, references),
        strict=True,
    ):
        assert exact == (one == right)
        hits = sum(i < len(one) and one[i] == right[i] for i in range(len(right)))
        assert tokens == float(Fraction(hits, len(right)))
        assert edits == pytest.approx(1 - distance(one, right) / max(len(one), len(right)), abs=1e-15)
    assert grades.token_accuracy([[1, 2, 3, 4]], [[1, 2]]).tolist() == [1.0]  # what is too much counts as edits


def test_an_empty_reference_has_no_share():
    with pytest.raises(InputError, match="reference is empty"):
        grades.token_accuracy([[1]], [[]])


def test_brier_and_multiple_choice_are_their_equations_in_float64():
    scores = torch.randn(500, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * 3
    answers = torch.randint(5, (500,), generator=torch.Generator().manual_seed(1))
    p, one_hot = scores.softmax(-1), torch.nn.functional.one_hot(answers, 5)
    found = grades.brier(scores.numpy(), answers.numpy())
    assert np.abs(found - ((p - one_hot) ** 2).sum(-1).numpy()).max() < 1e-12
    chosen = grades.multiple_choice_grade(scores.numpy(), answers.numpy())
    assert chosen.tolist() == (scores.argmax(-1) == answers).double().tolist()


def test_brier_bears_scores_as_far_below_zero_as_sums_of_logprobs():
    assert grades.brier(np.array([[-4000.0, -4001.0]]), np.array([0])) == pytest.approx(
        2 * (1 / (1 + math.e)) ** 2, abs=1e-12
    )


def test_a_model_that_tells_nothing_apart_is_at_chance():
    nothing, answers = np.zeros((100, 4)), np.arange(100) % 4
    assert grades.multiple_choice_grade(nothing, answers).mean() == 0.25
    assert grades.brier(nothing, answers).mean() == 0.75


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 8.0])
def test_bend_of_a_power_is_known(power):
    x = np.linspace(3.0, 5.0, 2001)
    y = 0.1 + 0.6 * ((x - 3) / 2) ** power
    assert grades.bend(x.tolist(), y.tolist()) == pytest.approx((power - 1) / (power + 1), abs=1e-3)


def test_bend_does_not_look_at_units():
    x, y = [0.0, 1.0, 1.5, 4.0], [0.1, 0.2, 0.6, 0.9]
    moved = grades.bend([3 + 2 * a for a in x], [1 + 5 * b for b in y])
    assert moved == pytest.approx(grades.bend(x, y), abs=1e-9)
    assert grades.bend([0, 1, 2], [0.0, 0.01, 0.0]) == pytest.approx(-0.2)  # noise over the least rise, no more


def test_bend_of_too_few_points():
    with pytest.raises(InputError, match="at least three"):
        grades.bend([0, 1], [0, 1])


def test_independent_tokens_make_p_to_the_k_bend_more_the_longer_the_answer():
    """Schaeffer et al.'s calculation (sec. 2): p rises evenly, answers of k tokens do not."""
    x = np.linspace(0, 1, 101)
    bends = [grades.bend(x.tolist(), (x**k).tolist()) for k in (1, 2, 4, 8)]
    assert bends == sorted(bends) and abs(bends[0]) < 1e-9 and bends[-1] > 0.75


def test_unbroken_is_the_share_before_the_first_error():
    source = np.random.default_rng(3)
    right = source.random((40_000, 6)) < 0.7
    assert grades.unbroken(0.7, 6) == pytest.approx(right.cumprod(1).mean(), abs=0.005)


def test_crossing_is_the_first_place_above():
    x, y = [1.0, 2.0, 4.0, 8.0], [0.0, 0.3, 0.1, 0.9]
    for level in (0.05, 0.2, 0.3, 0.5):
        fine = np.linspace(1, 8, 700_001)
        assert grades.crossing(x, y, level) == pytest.approx(fine[np.interp(fine, x, y) > level][0], abs=2e-5)
    assert grades.crossing(x, y, 0.95) == 8.0 and grades.crossing(x, [0.5, 0.6, 0.7, 0.8], 0.1) == 1.0


def test_emergence_score():
    assert grades.emergence_score([1.0, 0.5, 0.0]) == -2.0
    assert grades.emergence_score([0.0, 0.0, 0.0, 1.0]) == math.inf


@pytest.mark.parametrize("base", [2, 10, 20])
def test_sums_are_sums(base):
    world = Sums.Config(base=base, length=5).build()
    prompts, answers = world.sample(64, generator(0))
    assert prompts.max() < world.vocab_size and answers.max() < base
    for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True):
        columns = [world.column(token) for token in prompt[:-1]]
        a, b = (sum(column[side] * base**i for i, column in enumerate(columns)) for side in (0, 1))
        assert sum(digit * base**i for i, digit in enumerate(answer)) == (a + b) % base**5


def test_products_are_products_of_permutations():
    world = Products.Config(things=7, letters=5, length=4, seed=3).build()
    assert world.permutations.sort(1).values.tolist() == [list(range(7))] * 5
    prompts, answers = world.sample(64, generator(0))
    for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True):
        product = torch.arange(7)
        for letter, place in zip(prompt[:-1], answer, strict=True):
            product = world.permutations[letter - 7][product]  # one matrix more from the left
            assert place == product[prompt[-1]]


def test_letters_are_as_unequal_as_words():
    world = Products.Config(length=50).build()
    letters = world.sample(2000, generator(0))[0][:, :-1] - world.symbols
    shares = torch.bincount(letters.flatten(), minlength=64) / letters.numel()
    wanted = world.frequencies / world.frequencies.sum()
    assert (shares - wanted).abs().max() < 0.005


@pytest.mark.parametrize("config", [Sums.Config(length=3), Products.Config(length=3)])
def test_a_batch_asks_for_the_answers_only(config):
    world = config.build()
    batch, (prompts, answers) = world.batch(5, generator(1)), world.sample(5, generator(1))
    assert torch.equal(batch["targets"][:, -3:], answers) and torch.equal(batch["ids"][:, :4], prompts)
    assert (batch["targets"][:, :-3] == IGNORED).all() and torch.equal(batch["ids"][:, -2:], answers[:, :-1])


@pytest.mark.parametrize("length", [1, 3, 8])
def test_options_differ_from_the_answer_in_one_token_and_from_each_other(length):
    world = Sums.Config(base=5, length=length).build()
    answers = world.sample(200, generator(2))[1]
    options = world.options(answers, 4, generator(3))
    assert torch.equal(options[:, 0], answers) and options.max() < 5
    assert ((options[:, 1:] != answers[:, None]).sum(-1) == 1).all()
    for row in options.tolist():
        assert len({tuple(option) for option in row}) == 4


def test_an_answer_has_a_length():
    with pytest.raises(InputError, match="length=0"):
        Sums.Config(length=0).build()


@pytest.fixture(scope="module")
def asked():
    """A random model and questions; an untied head, so that it does not repeat its last token."""
    torch.manual_seed(0)
    world = Products.Config(things=6, letters=4, length=5).build()
    model = llama.architecture(
        vocab_size=world.vocab_size, context=16, dim=16, num_layers=2, num_heads=2, hidden_dim=24
    )
    return (model.build().eval(), *world.sample(7, generator(0)), world)


def test_what_is_written_is_plain_greedy_decoding(asked):
    module, prompts, answers, _ = asked
    ids = prompts
    with torch.inference_mode():
        for _ in range(answers.shape[1]):
            ids = torch.cat((ids, module(ids).logits[:, -1:].argmax(-1)), 1)
    assert written(module, prompts, answers.shape[1], batch=3) == ids[:, prompts.shape[1] :].tolist()


def test_what_is_read_are_the_logprobs_of_the_right_tokens(asked):
    module, prompts, answers, world = asked
    logprobs, likeliest = read(module, prompts, answers, batch=3)
    options = world.options(answers, 3, generator(1))
    sums = weighed(module, prompts, options, batch=2)
    with torch.inference_mode():
        for row in range(len(prompts)):
            for number, option in enumerate(options[row]):
                ids = torch.cat((prompts[row], option))[None]
                logits = module(ids).logits[0, prompts.shape[1] - 1 : -1].double().log_softmax(-1)
                right = logits[torch.arange(len(option)), option]
                assert torch.allclose(sums[row, number].double(), right.sum(), atol=1e-5)
                if number == 0:
                    assert torch.allclose(logprobs[row].double(), right, atol=1e-5)
                    assert torch.equal(likeliest[row], logits.argmax(-1) == option)


def test_ladders_that_cannot_be_judged_are_refused():
    smoke = PAPER.sizes["smoke"]
    ladder = smoke.ladders[0]
    with pytest.raises(InputError, match="three sizes"):
        Ladder(world=ladder.world, names=("a", "b"), members=ladder.members[:2])
    with pytest.raises(InputError, match="rising lengths"):
        smoke.replace(lengths=(4, 2, 1))
    with pytest.raises(InputError, match="not as long"):
        smoke.replace(lengths=(1, 2, 3))
