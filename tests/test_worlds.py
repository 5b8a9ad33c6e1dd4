"""The small worlds are what they say: their truths are held against counting and against the text itself."""

from __future__ import annotations

import math
import re

import pytest
import torch

from allyouneed.core.errors import InputError
from allyouneed.data import passages
from allyouneed.data.chronicle import Chronicle
from allyouneed.data.kinds import NOTHING, Kinds
from allyouneed.data.lexicon import Lexicon
from allyouneed.data.tongues import Tongues
from allyouneed.data.worlds import Markov, Recall
from allyouneed.evaluate.tasks import tasks


def test_markov_text_follows_its_own_rules():
    world = Markov.Config(vocab_size=4).build()
    ids = world.sample(400, 200, torch.Generator().manual_seed(0))
    counts = torch.zeros(4, 4, 4, dtype=torch.double)
    places = (ids[:, :-2].flatten(), ids[:, 1:-1].flatten(), ids[:, 2:].flatten())
    counts.index_put_(places, torch.ones(len(places[0]), dtype=torch.double), accumulate=True)
    seen = counts.sum(-1)
    often = seen > 1000
    shares = counts / seen.clamp(min=1)[..., None]
    assert often.sum() >= 8
    assert (shares - world.logprobs.exp())[often].abs().max() < 0.06
    empirical = (-shares.clamp(min=1e-12).log() * counts).sum() / counts.sum()
    assert abs(world.nll(ids).mean() - empirical) < 0.01


def test_markov_nll_is_the_logprob_of_the_rule():
    world = Markov.Config(vocab_size=5, seed=3).build()
    ids = torch.tensor([[0, 1, 2, 3]])
    assert torch.allclose(world.nll(ids), -torch.stack((world.logprobs[0, 1, 2], world.logprobs[1, 2, 3]))[None])
    assert torch.allclose(world.logprobs.exp().sum(-1), torch.ones(5, 5, dtype=torch.double))
    assert not torch.equal(world.logprobs, Markov.Config(vocab_size=5, seed=4).build().logprobs)


def test_recall_is_consistent_within_a_row_only():
    world = Recall.Config(symbols=4, pairs=40).build()
    ids, targets = world.sample(64, torch.Generator().manual_seed(0))
    keys, values = ids[:, ::2], targets[:, ::2]
    for row_keys, row_values in zip(keys.tolist(), values.tolist(), strict=True):
        assert len(set(zip(row_keys, row_values, strict=True))) == len(set(row_keys))
    assert (targets[:, 1::2] == -100).all() and (values >= 4).all() and (keys < 4).all()
    first_value = {int(row_values[0]) for row_keys, row_values in zip(keys, values, strict=True) if row_keys[0] == 0}
    assert len(first_value) > 1


def test_recalls_best_loss_by_counting():
    world = Recall.Config(symbols=4, pairs=12).build()
    keys = world.sample(20_000, torch.Generator().manual_seed(1))[0][:, ::2]
    for n, expected in enumerate(world.best_loss()):
        new = (keys[:, :n] != keys[:, n : n + 1]).all(1).double().mean().item()
        assert abs(new * math.log(4) - expected) < 0.02
    assert Recall.Config(symbols=4, pairs=3, consistent=False).build().best_loss() == [math.log(4)] * 3


@pytest.mark.parametrize("seed", [0, 1])
def test_no_question_stands_in_the_chronicle(seed):
    for sound in (True, False):
        world = Chronicle.Config(seed=seed, sound=sound).build()
        text = world.text(300_000, seed=seed)
        for task in world.tasks:
            for line, options in world.questions(task, 40, seed):
                assert f". {line.beginning} " not in text
                assert options[0] == line.answer and len(set(options)) == 4
            shown = world.questions(task, 40, seed)[0][0].beginning.split()[0]
            assert shown in text


def repeated_rightly(text: str) -> list[bool]:
    found = [re.fullmatch(r"they said (.*) and again (.*)", one) for one in text.strip().rstrip(".").split(". ")]
    return [match[1] == match[2] for match in found if match]


def test_only_the_answers_differ_in_the_control():
    sound, control = (Chronicle.Config(sound=sound).build() for sound in (True, False))
    assert sound.words == control.words and sound.meaning == control.meaning
    assert all(repeated_rightly(sound.text(20_000, seed=0))) and len(repeated_rightly(sound.text(20_000, seed=0))) > 20
    assert sum(repeated_rightly(control.text(20_000, seed=0))) <= 2


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.name)
def test_tasks_are_well_formed(task):
    assert len(task.questions) == 72 and len({q.context for q in task.questions}) >= 60
    for question in task.questions:
        assert len(set(question.options)) == len(question.options) == round(1 / task.chance)
    places = [question.answer for question in task.questions]
    assert max(map(places.count, set(places))) < 0.75 * len(places)  # the place of the answer tells nothing


def test_the_chronicle_says_when_its_questions_run_out():
    with pytest.raises(InputError, match=r"questions=500: only \d+ lines of 'sums'"):
        Chronicle.Config().build().questions("sums", 500, seed=0)


def test_a_sum_is_kept_out_with_its_mirror_image():
    world = Chronicle.Config().build()
    text = world.text(400_000, seed=0)
    for line, _ in world.questions("sums", 40, seed=0):
        a, _, b, make = line.beginning.split()
        assert f" {b} and {a} {make}" not in text and f" {a} and {b} {make}" not in text


def test_only_verbs_tell_a_nouns_kind():
    world = Kinds.Config().build()
    text = world.text(60_000, seed=0)
    kind_of = {noun: kind for kind, nouns in enumerate(world.nouns) for noun in nouns}
    does = re.findall(r"the (\w+) (\w+) the (\w+)\.", text)
    assert len(does) > 500
    assert all(verb in world.verbs[kind_of[noun]] for noun, verb, _ in does)
    assert all(kind_of[object_] == (kind_of[noun] + 1) % 4 for noun, _, object_ in does)
    assert {noun for noun, _, _ in does} == set(kind_of)  # those judged too: their kind can be read
    told = {noun for group in world.labelled for noun in group}
    asked = {noun for group in world.judged for noun in group}
    assert told | asked == set(kind_of) and not told & asked
    for make in (world.first_half, world.fitting, world.alike, world.doing):
        words = {word for record in make(world.judged, 60, seed=0) for word in re.findall(r"\w+", str(record))}
        assert words & asked and not words & told


def test_answers_of_the_country_are_right():
    world = Kinds.Config().build()
    kind_of = {noun: kind for kind, nouns in enumerate(world.nouns) for noun in nouns}

    def kind(sentence: str) -> int:
        return next(kind_of[word] for word in re.findall(r"\w+", sentence) if word in kind_of)

    for record in world.first_half(world.labelled, 40, seed=1):
        assert record.label == (kind(record.text) < 2)
    for record in world.fitting(world.labelled, 40, seed=1):
        assert record.label == (record.text_pair[3:-1] in world.verbs[kind(record.text)])
    for record in world.alike(world.labelled, 40, seed=1):
        assert record.label == (kind(record.text) == kind(record.text_pair))
    for record in world.doing(world.labelled, 40, seed=1):
        fitting = [choice[3:-1] in world.verbs[kind(record.context)] for choice in record.choices]
        assert fitting.index(True) == record.label and sum(fitting) == 1
    shown, asked = (
        {record.tokens[2] for record in world.strangers(labelled, 80, seed=1)} for labelled in (True, False)
    )
    assert not shown & asked
    for record in world.strangers(False, 40, seed=1):
        own = next(kind for kind, verbs in enumerate(world.verbs) if record.tokens[2] in verbs)
        assert record.tags == [NOTHING, own, NOTHING, NOTHING, (own + 1) % 4, NOTHING]
        assert not {record.tokens[1], record.tokens[4]} & set(kind_of)
    assert len({kind(document[0]) for document in world.documents(4000, seed=0)}) > 1
    for document in world.documents(4000, seed=0):
        subjects = {kind(sentence) for sentence in document}
        assert len(subjects) == 1 and len(document) == 6


def test_tasks_that_text_sets_are_right():
    documents = [tuple(f"{name} line {n} says word{n} and word{n + 1}" for n in range(30)) for name in ("one", "two")]
    for record in passages.in_order(documents, 30, seed=0):
        assert record.label == any(record.text in document for document in documents)
    for record in passages.follows(documents, 30, seed=0):
        document = next(d for d in documents if record.text in d)
        assert record.text_pair in document
        assert record.label == (document.index(record.text_pair) == document.index(record.text) + 1)
    for record in passages.same_kind([[documents[0]], [documents[1]]], 30, seed=0):
        assert record.label == (record.text.split()[0] == record.text_pair.split()[0])
    for record in passages.continuation(documents, 30, seed=0):
        document = next(d for d in documents if record.context in d)
        assert record.choices[record.label] == document[document.index(record.context) + 1]
        assert sum(choice in document for choice in record.choices) == 1
    with pytest.raises(InputError, match="different examples"):
        passages.in_order([documents[0][:2]], 50, seed=0)
    assert passages.lines("ACT I\n  a line that is long enough  \n" + "x" * 100) == ("a line that is long enough",)


def test_a_lexicon_s_text_is_as_unpredictable_as_its_entropy_says():
    world = Lexicon.Config(letters=8, length=3, words=100, exponent=1.3, seed=1).build()
    batch = world.batch(2000, 60, torch.Generator().manual_seed(0))
    words = batch["targets"].unflatten(1, (-1, 3)).flatten(0, 1)
    found, counts = words.unique(dim=0, return_counts=True)
    assert len(found) == 100  # all different, and none but they
    p = counts.double() / counts.sum()
    assert abs(-(p * p.log()).sum() / 3 - world.entropy) < 0.01  # counted, against the closed form
    assert abs(world.nll(batch["targets"]).mean() / 3 - world.entropy) < 0.01
    assert (counts.sort(descending=True).values[:5] / counts.sum() - world.probabilities[:5]).abs().max() < 0.01
    assert torch.equal(batch["ids"][:, 1:], batch["targets"][:, :-1])


def test_a_lexicon_s_nll_is_that_of_the_words_drawn():
    world = Lexicon.Config(letters=4, length=2, words=6).build()
    text = world.spelling[torch.tensor([[0, 5], [3, 0]])].flatten(1)
    assert torch.allclose(world.nll(text), -world.probabilities[torch.tensor([[0, 5], [3, 0]])].log())


def test_a_lexicon_refuses_what_it_cannot_spell():
    with pytest.raises(InputError, match="at most half of the 16 strings"):
        Lexicon.Config(letters=4, length=2, words=9).build()
    with pytest.raises(InputError, match="length=5; words have 2 letters"):
        Lexicon.Config(letters=4, length=2, words=8).build().batch(1, 5, torch.Generator())


def test_a_lexicon_s_held_out_rows_are_the_same_for_all_and_judged_by_the_entropy():
    world = Lexicon.Config(letters=8, length=3, words=100).build()
    (batch, chance), (again, _) = world.held_out(40, 30), world.held_out(40, 30)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    own = world.nll(batch["targets"]).sum().item() / batch["targets"].numel()
    assert abs(own - chance - world.entropy) < 1e-12 and 0 < abs(chance) < 0.2
    assert not torch.equal(next(world.batches(40, 30, seed=0))["ids"], batch["ids"])


def test_tongues_give_their_texts_the_probability_they_are_drawn_with() -> None:
    world = Tongues.Config(languages=3, words=5, spread=1.5).build()
    ids = world.sample(20_000, 9, torch.Generator().manual_seed(0))
    assert set(ids[:, 0].tolist()) == {5, 6, 7} and ids[:, 1:].max() < 5
    nll = world.nll(ids)
    deviation = nll.mean(1).std() / len(ids) ** 0.5
    assert abs(nll.mean() - world.entropy(9)) < 4 * deviation
    for language in range(3):
        rows = ids[ids[:, 0] == 5 + language]
        before, after = rows[:, 1:-1].flatten(), rows[:, 2:].flatten()
        counted = torch.zeros(5, 5).index_put((before, after), torch.ones(len(after)), accumulate=True)
        told = world.logprobs[language].exp()
        assert (counted / counted.sum(1, keepdim=True) - told).abs().max() < 0.03
    expected = -sum(world.logprobs[ids[0, 0] - 5, ids[0, t - 1], ids[0, t]] for t in range(2, 9))
    assert abs(nll[0].sum() - expected - math.log(5)) < 1e-9
