"""Two small languages with a grammar each, and the only right translation from one into the other.

What is hard about real translation is there on purpose: constituents change their order, adjectives move behind their
noun, the verb takes an ending that agrees with the class of a subject several words away, a pair of words has one word
for its translation, and one verb has two. Vocabulary and sentences are made by seeded code; nothing is random but the
choice of the sentence.

>>> world = Languages.Config().build()
>>> source, target = world.pairs(1, seed=0)[0]
>>> world.translate(source) == target
True
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from allyouneed import core
from allyouneed.core.seeds import derive

PAD, START, END = 0, 1, 2  # ids that both languages share
SPECIAL = 3


@dataclass(frozen=True)
class Phrase:
    """A noun with the adjectives before it and, where there is one, the phrase that it belongs to."""

    noun: int
    adjectives: tuple[int, ...]
    owner: Phrase | None = None

    def words(self) -> list[int]:
        """How the source language says it: owner, adjectives, noun."""
        return [*(self.owner.words() if self.owner else ()), *self.adjectives, self.noun]


class Languages(core.Configured):
    """Source: subject phrase, verb, object phrase. Target: subject, object, verb with its ending.

    Sentences are tuples of ids; ids below `SPECIAL` are not words. Each kind of word has its own range of ids in either
    language.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """How many words of each kind; nouns are of `classes` classes in turn, and so are verbs' endings."""

        nouns: int = 24
        verbs: int = 12
        adjectives: int = 12
        classes: int = 3
        most_adjectives: int = 3  # a noun
        most_owners: int = 2  # phrases within phrases
        seed: int = 0

    def __init__(self, config: Config) -> None:
        self.config = config
        kinds = (config.nouns, config.verbs, config.adjectives)
        self.first_noun, self.first_verb, self.first_adjective = (SPECIAL + sum(kinds[:i]) for i in range(3))
        words = SPECIAL + sum(kinds)
        # target words are the source's, shuffled, beyond them; then the endings and the words for pairs
        order = list(range(words, 2 * words - SPECIAL))
        random.Random(derive(config.seed, "languages")).shuffle(order)
        self.meaning = dict(zip(range(SPECIAL, words), order, strict=True))
        self.first_ending = 2 * words - SPECIAL
        self.first_compound = self.first_ending + config.classes
        self.vocab_size = self.first_compound + config.nouns

    def pairs(self, count: int, seed: int, *, held_out: bool = False) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Sentences with their translations. A tenth of all sentences is `held_out`: never among the others."""
        source = random.Random(derive(seed, "pairs", held_out))
        found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        while len(found) < count:
            subject, thing = self._phrase(source), self._phrase(source)
            verb = self.first_verb + source.randrange(self.config.verbs)
            sentence = (*subject.words(), verb, *thing.words())
            if (derive(self.config.seed, "held out", *sentence) % 10 == 0) == held_out:
                found.append((sentence, self._say(subject, verb, thing)))
        return found

    def translate(self, sentence: Sequence[int]) -> tuple[int, ...]:
        """The one right translation of a source sentence."""
        (place,) = (i for i, word in enumerate(sentence) if self._kind(word) == "verb")
        return self._say(self._parse(sentence[:place]), sentence[place], self._parse(sentence[place + 1 :]))

    def distance(self, sentence: Sequence[int]) -> int:
        """How many words of the translation stand between the subject's noun and the ending that agrees with it."""
        (place,) = (i for i, word in enumerate(sentence) if self._kind(word) == "verb")
        subject, thing = self._parse(sentence[:place]), self._parse(sentence[place + 1 :])
        behind = self._said(subject)[1:]  # the noun comes first, what describes it behind
        return len(behind) + len(self._said(thing)) + len(self._verb(sentence[place]))

    def ending(self, translation: Sequence[int]) -> int | None:
        """The ending that a translation closes with, None if it has none."""
        last = translation[-1] if translation else PAD
        return last if self.first_ending <= last < self.first_compound else None

    def name(self, word: int) -> str:
        """A word of either language in letters, its kind first: `noun3`, `NOUN3` for its translation.

        >>> world = Languages.Config().build()
        >>> noun = world.first_noun + 3
        >>> world.name(noun), world.name(world.meaning[noun])
        ('noun3', 'NOUN3')
        """
        if word < SPECIAL:
            return ("-", "start", "end")[word]
        if word >= self.first_compound:
            return f"ADJECTIVE0+NOUN{word - self.first_compound}"
        if word >= self.first_ending:
            return f"ENDING{word - self.first_ending}"
        here = next((ours for ours, theirs in self.meaning.items() if theirs == word), word)
        kind = self._kind(here)
        number = here - {"noun": self.first_noun, "verb": self.first_verb, "adjective": self.first_adjective}[kind]
        return f"{kind if here == word else kind.upper()}{number}"

    def _kind(self, word: int) -> str:
        if word >= self.first_adjective:
            return "adjective"
        return "verb" if word >= self.first_verb else "noun"

    def _phrase(self, source: random.Random, depth: int = 0) -> Phrase:
        noun = self.first_noun + source.randrange(self.config.nouns)
        count = source.randrange(self.config.most_adjectives + 1)
        adjectives = tuple(self.first_adjective + source.randrange(self.config.adjectives) for _ in range(count))
        owned = depth < self.config.most_owners and source.random() < 0.4
        return Phrase(noun, adjectives, self._phrase(source, depth + 1) if owned else None)

    def _parse(self, words: Sequence[int]) -> Phrase:
        phrase: Phrase | None = None
        adjectives: list[int] = []
        for word in words:
            if self._kind(word) == "adjective":
                adjectives.append(word)
            else:
                phrase, adjectives = Phrase(word, tuple(adjectives), phrase), []
        assert phrase is not None, "a phrase without a noun"
        return phrase

    def _say(self, subject: Phrase, verb: int, thing: Phrase) -> tuple[int, ...]:
        ending = self.first_ending + (subject.noun - self.first_noun) % self.config.classes
        return (*self._said(subject), *self._said(thing), *self._verb(verb), ending)

    def _said(self, phrase: Phrase) -> list[int]:
        """Noun, adjectives in reverse, owner. The first adjective and its noun are one word."""
        first = self.first_adjective
        rest = [self.meaning[word] for word in reversed(phrase.adjectives) if word != first]
        noun = phrase.noun - self.first_noun
        said = self.first_compound + noun if first in phrase.adjectives else self.meaning[phrase.noun]
        return [said, *rest, *(self._said(phrase.owner) if phrase.owner else ())]

    def _verb(self, verb: int) -> list[int]:
        """The first verb is said with two words."""
        said = self.meaning[verb]
        return [said, self.meaning[self.first_verb + 1]] if verb == self.first_verb else [said]
