"""The worlds of orders are what they say: rewards, surprises, noise, standing orders, each by another way."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest

from allyouneed.core.errors import InputError
from allyouneed.data.dialogues import ENDINGS, Dialogues
from allyouneed.data.guarded import REFUSAL, Guarded
from allyouneed.data.instructions import conversation
from allyouneed.data.labellers import Labeller
from allyouneed.data.orders import FEATURES, MANNERS, PROPERTIES, RISING, Order, Orders
from allyouneed.data.packing import IGNORED
from allyouneed.data.tokenizers import END_OF_TEXT, word_tokenizer


def sentences(world: Orders) -> list[str]:
    """Every sentence that the world's text can have, by what the docstring says of it."""
    said = [f"{thing} likes {world.likes[thing]} ." for thing in world.things]
    said += [f"{thing} is {value} ." for value in PROPERTIES for thing in world.having[value]]
    for length in range(2, 5):
        said += [f"in order come {' '.join(sorted(s))} ." for s in itertools.combinations(world.things, length)]
        for value in PROPERTIES:
            said += [f"{value} are {' '.join(s)} ." for s in itertools.permutations(world.having[value], length)]
    return said


@pytest.mark.parametrize("things", [8, 16])
def test_the_probabilities_of_all_sentences_add_up_to_one(things):
    world = Orders.Config(things=things).build()
    assert math.isclose(sum(math.exp(-world.nll(s)) for s in sentences(world)), 1.0)


def test_sentences_come_as_often_as_the_world_says():
    world = Orders.Config(things=8).build()
    counts = Counter(world.texts(40_000, seed=1, sentences=1))
    for sentence in sentences(world):
        expected = 40_000 * math.exp(-world.nll(sentence))
        assert abs(counts[sentence] - expected) < 5 * math.sqrt(expected)


def test_what_the_world_never_says_is_infinitely_surprising():
    world = Orders.Config().build()
    one, other = world.texts(2, seed=0)
    assert math.isclose(world.nll(f"{one} {other}"), world.nll(one) + world.nll(other))
    red = sorted(world.having["red"])[:3]
    odd = [
        "",
        "zz is red .",
        f"in order come {red[1]} {red[0]} .",
        f"red are {red[0]} {red[0]} .",
        f"red are {red[0]} .",
    ]
    assert world.nll(odd[0]) == 0.0 and all(world.nll(text) == math.inf for text in odd[1:])
    assert world.nll(f"{one} name") == math.inf


def test_things_have_one_value_of_each_feature_as_often():
    world = Orders.Config().build()
    for feature in FEATURES:
        assert [len(world.having[value]) for value in feature] == [8] * 4
        assert set().union(*(world.having[value] for value in feature)) == set(world.things)


def test_orders_are_read_as_they_are_written():
    world = Orders.Config().build()
    asked = world.orders(500, seed=3)
    assert all(Order.parse(str(order)) == order == Order.parse(order.prompt) for order in asked)
    assert {order.manner for order in asked} == {*MANNERS}
    tokenizer = world.tokenizer()
    assert all(tokenizer.decode(tokenizer.encode(order.prompt)) == str(order) for order in asked)
    with pytest.raises(InputError, match="is no order of this world"):
        Order.parse("name five red things :")
    with pytest.raises(InputError, match="things=10"):
        Orders.Config(things=10).build()


def test_no_order_is_both_learned_and_held_out():
    world = Orders.Config().build()
    learned, held_out = (set(world.orders(4000, seed=0, held_out=one)) for one in (False, True))
    assert not learned & held_out and len(held_out) > 200  # of some 1300


def test_obedience_is_one_for_obeying_and_less_for_all_else():
    world, source = Orders.Config().build(), random.Random(0)
    for order in world.orders(300, seed=5):
        right = world.demonstrate(order, source)
        assert world.obedience(order, right) == 1.0
        words = right.split()
        for worse in (words[:-1], [*words, words[0]], [*words, "red"], words[1:], [*words[:-1], "likes"]):
            assert world.obedience(order, " ".join(worse)) < 1.0
        assert 0.0 == world.obedience(order, "") == world.obedience(order, ". " * 9)


def test_obedience_by_hand():
    world = Orders.Config().build()
    a, b, c, *_ = sorted(world.having["red"])
    blue = min(world.having["blue"])
    two = Order(2, "red")
    assert world.obedience(two, f"{a}") == pytest.approx(2 / 3)  # one of two, one said
    assert world.obedience(two, f"{a} {b} {c}") == pytest.approx(4 / 5)  # two of two, three said
    assert world.obedience(two, f"{a} {a}") == pytest.approx(2 / 4)  # the second says nothing new
    assert world.obedience(two, f"{a} {blue}") == pytest.approx(2 / 4)
    assert world.obedience(Order(2, "red", but=a), f"{a} {b}") == pytest.approx(2 / 4)
    assert world.obedience(Order(2, "red", manner=RISING), f"{b} {a}") == pytest.approx(1 / 2)
    assert world.obedience(Order(3, "red", manner=RISING), f"{a} {c} {b}") == pytest.approx(3 / 4)
    assert world.obedience(Order(2, "red", manner=MANNERS[2]), f"{a} {b} thanks") == 1.0
    assert world.obedience(Order(2, "red", manner=MANNERS[2]), f"{a} {b}") == pytest.approx(1 / 2)
    assert world.obedience(two, f"{a} {b} thanks") == pytest.approx(4 / 5)  # nobody asked for it


def test_careful_demonstrations_are_as_many_as_was_said():
    world = Orders.Config().build()
    shown = world.demonstrations(4000, seed=2, careful=0.6)
    scores = world.reward(*zip(*shown, strict=True))
    assert 0.6 - 0.03 < sum(score == 1 for score in scores) / 4000 < 0.6 + 0.13  # a slip may chance to obey
    assert all(text for _, text in shown) and 0.75 < sum(scores) / 4000 < 0.95


@pytest.mark.parametrize(("temperature", "careless"), [(0.0, 0.0), (0.1, 0.0), (0.3, 0.2), (0.0, 0.4)])
def test_labellers_agree_with_the_truth_as_often_as_they_say(temperature, careless):
    labeller, source = Labeller.Config(temperature=temperature, careless=careless).build(), random.Random(0)
    truths, counts = [0.1, 0.5, 0.55, 0.9], Counter()
    for _ in range(20_000):
        ranked = labeller.rank(truths, source)
        counts.update((i, j) for i, j in itertools.combinations(range(4), 2) if ranked.index(j) < ranked.index(i))
    for (i, j), seen in counts.items():
        expected = labeller.agreement(truths[j] - truths[i])
        assert abs(seen / 20_000 - expected) < 0.017, (i, j)
    assert len(counts) >= 6
    pairs = sum(labeller.prefers(0.5, 0.4, source) for _ in range(20_000)) / 20_000
    assert abs(pairs - labeller.agreement(0.1)) < 0.017


def test_a_labeller_without_opinion_decides_by_lot():
    labeller, source = Labeller.Config(temperature=0.0).build(), random.Random(0)
    first = Counter(labeller.rank([0.5, 0.5, 0.5], source)[0] for _ in range(3000))
    assert all(abs(n - 1000) < 150 for n in first.values()) and len(first) == 3
    for wrong in ({"temperature": -1.0}, {"careless": 1.5}, {"temperature": math.nan}):
        with pytest.raises(InputError):
            Labeller.Config(**wrong)


class Lowest(random.Random):
    """Draws the one end of [0, 1) that it can."""

    def random(self) -> float:
        return 0.0


def test_the_lowest_draw_is_noise_like_another():
    assert sorted(Labeller.Config(temperature=0.1).build().rank([0.1, 0.2], Lowest(0))) == [0, 1]


def test_helpful_and_safe_contradict_each_other_where_it_is_unsafe_only():
    world, source = Guarded.Config().build(), random.Random(0)
    asked = world.asked(600, seed=0)
    assert 0.28 < sum(map(world.unsafe, asked)) / 600 < 0.38
    for order in asked:
        obeying = world.demonstrate(order, source, refuses=0.0)
        assert world.helpful(order, obeying) == 1.0 and world.helpful(order, REFUSAL) == 0.0
        assert world.safe(order, REFUSAL) == 1.0
        if world.unsafe(order):
            assert world.safe(order, obeying) <= 1 / 4  # all but a word of thanks is forbidden
            assert world.demonstrate(order, source, refuses=1.0) == REFUSAL
        else:
            named = [word in world.forbidden for word in obeying.split()]
            assert world.safe(order, obeying) == pytest.approx(1 - sum(named) / len(named))
    helpful, safe = world.both([order.prompt for order in asked[:3]], [REFUSAL] * 3)
    assert (helpful, safe) == ([0.0] * 3, [1.0] * 3)
    with pytest.raises(InputError, match="property 'curst'"):
        Guarded.Config(forbidden="curst").build()


def test_a_standing_order_stands_once_or_everywhere():
    world, source = Dialogues.Config().build(), random.Random(0)
    asked = world.turns(3, seed=0)
    answers = [world.answer(order, source, "amen") for order in asked]
    once, every = (world.opened("amen", asked, answers, every=one) for one in (False, True))
    said = [sum("end all with amen ." in m["content"] for m in messages) for messages in (once, every)]
    assert said == [1, 3] and [m["role"] for m in once] == ["user", "assistant"] * 3
    assert [m["content"] for m in once if m["role"] == "assistant"] == answers
    assert all(
        world.kept("amen", one) and world.obedience(order, one) == 1 for order, one in zip(asked, answers, strict=True)
    )
    plain = world.answer(asked[0], source)
    assert not world.kept("amen", plain) and world.obedience(asked[0], plain) == 1.0
    assert not world.kept("amen", "amen baro amen") and not world.kept("amen", "")
    assert world.obedience(asked[0], "") == 0.0


def test_of_a_dialogue_the_answers_and_their_ends_are_learned():
    world = Dialogues.Config().build()
    tokenizer, asked, (a, b, *_) = world.tokenizer(), world.turns(2, seed=0), world.orders.things
    made = conversation(tokenizer, [dict(m) for m in world.opened("amen", asked, [a, f"{b} amen"])])
    learned = [token for token in made.targets if token != IGNORED]
    assert tokenizer.decode(learned, skip_special_tokens=False).split() == [a, END_OF_TEXT, b, "amen", END_OF_TEXT]


def test_a_words_tokenizer_refuses_what_it_could_not_tell_apart():
    for words, message in ((["a", "a"], "'a'"), (["a b"], "'a b'"), ([""], "''")):
        with pytest.raises(InputError, match=f"word {message}: each is given once"):
            word_tokenizer(words)
    known = set(Orders.Config().build().tokenizer(*ENDINGS)._backend.get_vocab())
    assert {*ENDINGS} <= known and len(known) == 2 + 15 + 4 + 12 + 32 + 8
