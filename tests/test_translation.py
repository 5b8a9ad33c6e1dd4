"""The two languages, their batches and the loss of a translation."""

from __future__ import annotations

import pytest
import torch

from allyouneed.core.seeds import generator
from allyouneed.data.languages import END, SPECIAL, START, Languages
from allyouneed.data.pairs import apart, bucketed
from allyouneed.evaluate.translation import agreement, pooled
from allyouneed.objectives.translation import translation


@pytest.fixture(scope="module")
def world() -> Languages:
    return Languages.Config().build()


def test_every_sentence_has_the_one_translation_that_its_words_tell(world):
    for sentence, target in world.pairs(300, seed=1):
        assert world.translate(sentence) == target
        assert all(SPECIAL <= word < world.vocab_size for word in (*sentence, *target))
        assert world.ending(target) is not None and world.ending(sentence) is None
        subject = next(i for i, word in enumerate(sentence) if world._kind(word) == "verb") - 1
        assert (sentence[subject] - world.first_noun) % world.config.classes == target[-1] - world.first_ending


def test_the_ending_agrees_over_the_distance_that_is_told(world):
    for sentence, target in world.pairs(100, seed=2):
        verb = next(i for i, word in enumerate(sentence) if world._kind(word) == "verb")
        noun = sentence[verb - 1]
        places = [i for i, word in enumerate(target) if word in (world.meaning[noun], world.first_compound + noun - 3)]
        assert len(target) - 1 - places[0] - 1 == world.distance(sentence)


def test_endings_are_counted_by_distance(world):
    pairs = world.pairs(60, seed=4)
    found = [target if i % 3 else target[:-1] for i, (_, target) in enumerate(pairs)]
    counts = agreement(world, found, pairs)
    assert [sum(value[i] for value in counts.values()) for i in (0, 1)] == [40, 60]
    assert pooled([agreement(world, [target for _, target in pairs], pairs)] * 2, fewest=1).keys() == set(
        map(int, counts)
    )


def test_nothing_held_out_is_ever_trained_on(world):
    trained = {source for source, _ in world.pairs(3000, seed=0)}
    asked = {source for source, _ in world.pairs(300, seed=0, held_out=True)}
    assert len(asked) > 250 and not trained & asked
    assert max(map(len, trained)) > 15


def test_batches_hold_every_pair_once_an_epoch(world):
    pairs = [(source, (*target, END)) for source, target in world.pairs(200, seed=3)]
    batches = bucketed(pairs, tokens=300, start=START, seed=0)
    drawn = [next(batches) for _ in range(len(batches.examples))]
    told = sorted(tuple(row[row != -100].tolist()) for batch in drawn for row in batch["targets"])
    assert told == sorted(target for _, target in pairs)
    for batch in drawn:
        assert batch["ids"].numel() <= 300 or len(batch["ids"]) == 1
    padded = sum(int((batch["segments"] == 0).sum()) for batch in drawn) / sum(batch["ids"].numel() for batch in drawn)
    assert padded < 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_equation_in_float64(smoothing):
    source = generator(0, "translation")
    logits = torch.randn(2, 4, 11, generator=source, dtype=torch.double)

    class Fixed(torch.nn.Module):
        def forward(self, *given, **named):
            self.logits = logits
            return self

    batch = apart([([5, 6], [7, 3, 4, END]), ([5], [8, END])], start=START)
    loss = translation(smoothing)(Fixed(), batch)
    logprobs = logits.log_softmax(-1)
    expected = plain = 0.0
    for row, column in zip(*torch.where(batch["targets"] != -100), strict=True):
        right = logprobs[row, column, batch["targets"][row, column]]
        plain -= right
        expected -= (1 - smoothing) * right + smoothing * logprobs[row, column].mean()
    assert loss.weight == 6
    torch.testing.assert_close(loss.total, expected)
    if smoothing:
        torch.testing.assert_close(loss.metrics["nll"], plain)
