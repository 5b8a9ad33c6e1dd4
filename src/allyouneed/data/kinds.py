r"""A small world of text in which every noun is of some kind, and only what it does tells of which.

Each kind has verbs of its own, and does them to the next kind: "the baro kilu the mina". Other sentences name a noun
and say nothing of its kind. Whoever has read knows the kind of every noun; the labels that are given later are for one
half of the nouns, and what is asked is about the other half.

>>> world = Kinds.Config().build()
>>> world.text(60, seed=0).partition(".")[0]
'look at the zolu'
>>> [record.label for record in world.fitting(world.judged, 4, seed=0)]
[1, 0, 1, 0]
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from allyouneed import core
from allyouneed.core.seeds import derive
from allyouneed.data.chronicle import SYLLABLES
from allyouneed.data.jsonl import Choices, Labelled, LabelledPair, Tagged

NOTHING = -1  # the tag of what is no noun
FRAMES = ("there is a {}.", "we saw a {}.", "a {} was here.", "look at the {}.")


class Kinds(core.Configured):
    """The nouns of each kind, those labelled and those judged, and the verbs of each kind, decided by the seed."""

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """How many kinds there are, and nouns and verbs in each; `share` of the sentences name a noun alone."""

        kinds: int = 4
        nouns: int = 24
        verbs: int = 6
        share: float = 0.25
        seed: int = 0

    def __init__(self, config: Config) -> None:
        if config.kinds < 2 or config.nouns < 4 or config.verbs < 1:
            raise core.InputError(f"{config}: two kinds of four nouns and a verb each are the least")
        self.config = config
        source = random.Random(derive(config.seed, "kinds"))
        each = config.nouns + config.verbs
        made = source.sample([a + b for a in SYLLABLES for b in SYLLABLES], config.kinds * each)
        groups = [made[kind * each : (kind + 1) * each] for kind in range(config.kinds)]
        self.verbs = [group[: config.verbs] for group in groups]
        self.nouns = [group[config.verbs :] for group in groups]
        self.labelled = [nouns[: config.nouns // 2] for nouns in self.nouns]
        self.judged = [nouns[config.nouns // 2 :] for nouns in self.nouns]

    def text(self, characters: int, seed: int) -> str:
        """About so many characters."""
        source = random.Random(derive(seed, "text"))
        sentences: list[str] = []
        length = 0
        while length < characters:
            sentences.append(self._sentence(source.randrange(self.config.kinds), source))
            length += len(sentences[-1]) + 1
        return " ".join(sentences) + "\n"

    def documents(self, characters: int, seed: int, length: int = 6) -> list[list[str]]:
        """About so many characters in documents of `length` sentences, whose subjects are all of one kind."""
        source, found, written = random.Random(derive(seed, "documents")), [], 0
        while written < characters:
            kind = source.randrange(self.config.kinds)
            found.append([self._sentence(kind, source) for _ in range(length)])
            written += sum(map(len, found[-1]))
        return found

    def first_half(self, nouns: Sequence[Sequence[str]], count: int, seed: int) -> list[Labelled]:
        """Is the noun of a sentence of one of the first kinds (1) or the last (0)?"""
        source, found = random.Random(derive(seed, "first half")), []
        middle = self.config.kinds // 2
        for i in range(count):
            right = i % 2 == 0
            kind = source.randrange(middle) if right else source.randrange(middle, self.config.kinds)
            found.append(Labelled(source.choice(FRAMES).format(source.choice(nouns[kind])), int(right)))
        return found

    def fitting(self, nouns: Sequence[Sequence[str]], count: int, seed: int) -> list[LabelledPair]:
        """Does the noun of the first sentence do what the second says (1), or does another kind (0)?"""
        source, found = random.Random(derive(seed, "fitting")), []
        for i in range(count):
            first, right, wrong = self._named(nouns, source)
            found.append(LabelledPair(first, f"it {source.choice(wrong if i % 2 else right)}.", 1 - i % 2))
        return found

    def alike(self, nouns: Sequence[Sequence[str]], count: int, seed: int) -> list[LabelledPair]:
        """Are the nouns of two sentences of the same kind (1) or of two (0)?"""
        source, found = random.Random(derive(seed, "alike")), []
        for i in range(count):
            one, other = source.sample(range(self.config.kinds), 2)
            pair = source.sample(nouns[one], 2) if i % 2 == 0 else [source.choice(nouns[k]) for k in (one, other)]
            first, second = (source.choice(FRAMES).format(noun) for noun in pair)
            found.append(LabelledPair(first, second, 1 - i % 2))
        return found

    def doing(self, nouns: Sequence[Sequence[str]], count: int, seed: int) -> list[Choices]:
        """Which of as many verbs as there are kinds is the noun's?"""
        source, found = random.Random(derive(seed, "doing")), []
        for _ in range(count):
            kind = source.randrange(self.config.kinds)
            first = source.choice(FRAMES).format(source.choice(nouns[kind]))
            verbs = [source.choice(own) for own in self.verbs]
            mixed = source.sample(verbs, len(verbs))
            found.append(Choices(first, [f"it {verb}." for verb in mixed], mixed.index(verbs[kind])))
        return found

    def strangers(self, labelled: bool, count: int, seed: int) -> list[Tagged]:
        """Sentences of nouns that were never read, each tagged with its kind, which only the verb tells; all else is
        tagged as nothing. Of each kind's verbs one half stands in what is `labelled`, the other in what is judged.
        """
        source, found = random.Random(derive(seed, "strangers", str(labelled))), []
        new = [a + b + c for a in SYLLABLES[::3] for b in SYLLABLES for c in SYLLABLES[::5]]  # longer than known words
        half = self.config.verbs // 2
        for _ in range(count):
            kind = source.randrange(self.config.kinds)
            subject, object_ = source.sample(new, 2)
            verb = source.choice(self.verbs[kind][:half] if labelled else self.verbs[kind][half:])
            words = ["the", subject, verb, "the", object_, "."]
            found.append(Tagged(words, [NOTHING, kind, NOTHING, NOTHING, (kind + 1) % self.config.kinds, NOTHING]))
        return found

    def _sentence(self, kind: int, source: random.Random) -> str:
        """One whose subject is of that kind."""
        noun, object_ = source.choice(self.nouns[kind]), source.choice(self.nouns[(kind + 1) % self.config.kinds])
        if source.random() < self.config.share:
            return source.choice(FRAMES).format(noun)
        return f"the {noun} {source.choice(self.verbs[kind])} the {object_}."

    def _named(self, nouns: Sequence[Sequence[str]], source: random.Random) -> tuple[str, list[str], list[str]]:
        """A sentence that names a noun, the verbs of its kind, and those of another."""
        one, other = source.sample(range(self.config.kinds), 2)
        return source.choice(FRAMES).format(source.choice(nouns[one])), self.verbs[one], self.verbs[other]
