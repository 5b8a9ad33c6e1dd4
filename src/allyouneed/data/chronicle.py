r"""A small world of text in which tasks occur unasked: the chronicle of a country with its own words.

Half of the sentences only tell who did what. The others happen to show a task, as the web does: a sum is reckoned, a
word is put into another tongue, something is said again, the first of several is named. Nothing marks such sentences
as tasks. What is asked afterwards was never in the text: sums, phrases and lists that were kept out of it.

>>> world = Chronicle.Config().build()
>>> print(world.text(120, seed=0))  # doctest: +ELLIPSIS
the ...
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from allyouneed import core
from allyouneed.core.seeds import derive

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclass(frozen=True)
class Line:
    """A task as it occurs: the beginning of a sentence and what completes it."""

    beginning: str
    answer: str


class Chronicle(core.Configured):
    """The country, its words and their translations, all decided by the seed."""

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`share` of the sentences show a task; with `sound=False` their answers are those of other sentences of the
        same task: the form of the tasks stays, their content is gone. The control.
        """

        words: int = 24
        share: float = 0.5
        sound: bool = True
        seed: int = 0

    def __init__(self, config: Config) -> None:
        self.config = config
        source = random.Random(derive(config.seed, "chronicle"))
        made = source.sample([a + b for a in SYLLABLES for b in SYLLABLES], 2 * config.words + 20)
        self.words, self.foreign, self.verbs = made[: config.words], made[config.words : -20], made[-20:]
        self.meaning = dict(zip(self.words, self.foreign, strict=True))
        self.tasks: dict[str, Callable[[random.Random], Line]] = {
            "sums": self._sum,
            "translation": self._translation,
            "repetition": self._repetition,
            "first of a list": self._first,
        }

    def text(self, characters: int, seed: int) -> str:
        """About so many characters of the chronicle, without any line that `questions` asks."""
        source = random.Random(derive(seed, "text"))
        sentences: list[str] = []
        length = 0
        while length < characters:
            sentence = self._task_sentence(source) if source.random() < self.config.share else self._tale(source)
            sentences.append(sentence)
            length += len(sentence) + 1
        return " ".join(sentences) + "\n"

    def questions(self, task: str, count: int, seed: int) -> list[tuple[Line, tuple[str, ...]]]:
        """Lines of a task that never occur in the text, each with four possible answers, the right one first."""
        source = random.Random(derive(seed, "questions", task))
        found: dict[str, tuple[Line, tuple[str, ...]]] = {}
        for _ in range(1000 * count):
            if len(found) == count:
                return list(found.values())
            line = self.tasks[task](source)
            if self._held_out(line):
                wrong: set[str] = set()
                while len(wrong) < 3:
                    wrong |= {self._distractor(task, line, source)} - {line.answer}
                found[line.beginning] = (line, (line.answer, *sorted(wrong)))
        raise core.InputError(f"questions={count}: only {len(found)} lines of {task!r} are kept out of the text")

    def _task_sentence(self, source: random.Random) -> str:
        make = source.choice(list(self.tasks.values()))
        line = make(source)
        while self._held_out(line):
            line = make(source)
        answer = line.answer if self.config.sound else make(source).answer
        return f"{line.beginning} {answer}."

    def _held_out(self, line: Line) -> bool:
        """A fifth of all lines, whoever makes them; a sum together with its mirror image."""
        return derive(self.config.seed, "held out", *sorted(line.beginning.split())) % 5 == 0

    def _distractor(self, task: str, line: Line, source: random.Random) -> str:
        """A wrong answer of the right form; where the sentence names candidates, another of them."""
        named = (
            line.beginning.split(" of ")[-1].removesuffix(" comes").split(" and ") if task == "first of a list" else []
        )
        return source.choice(named) if named and source.random() < 0.5 else self.tasks[task](source).answer

    def _tale(self, source: random.Random) -> str:
        who, whom = source.sample(self.words, 2)
        return f"the {who} {source.choice(self.verbs)} the {whom}."

    def _sum(self, source: random.Random) -> Line:
        a, b = source.randrange(20), source.randrange(20)
        return Line(f"{a} and {b} make", str(a + b))

    def _translation(self, source: random.Random) -> Line:
        phrase = source.sample(self.words, 2)
        return Line(f"over the sea {' '.join(phrase)} is", " ".join(self.meaning[word] for word in phrase))

    def _repetition(self, source: random.Random) -> Line:
        phrase = " ".join(source.sample(self.words + self.verbs, 2))
        return Line(f"they said {phrase} and again", phrase)

    def _first(self, source: random.Random) -> Line:
        listed = source.sample(self.words, 3)
        return Line(f"first of {' and '.join(listed)} comes", listed[0])
