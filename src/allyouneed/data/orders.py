"""A small world in which orders are given and more or less obeyed: how well an answer obeys is known exactly.

The world has things, each with a colour, a shape, a fate, a place in the alphabet and another thing that it likes. Its
text tells of them and never of orders; what a model loses on that text beyond the world's own entropy is its own. An
order asks for so many things of a property, often but for one, often in a manner. Words are put together with spaces.

>>> world = Orders.Config().build()
>>> order = world.orders(1, seed=0)[0]
>>> str(order), world.obedience(order, world.demonstrate(order, random.Random(0)))
('name three flat things and say thanks :', 1.0)
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.core.seeds import derive
from allyouneed.data.chronicle import SYLLABLES
from allyouneed.data.tokenizers import Tokenizer, word_tokenizer

NUMBERS = ("one", "two", "three", "four")
FEATURES = (
    ("red", "blue", "green", "gold"),
    ("round", "flat", "long", "thin"),
    ("cursed", "blessed", "plain", "lost"),
)
PROPERTIES = tuple(value for feature in FEATURES for value in feature)
RISING, CLOSED = "in order", "and say thanks"
CLOSING = "thanks"
MANNERS = ("", RISING, CLOSED)
GRAMMAR = ("name", "things", "but", "not", "in", "order", "and", "say", CLOSING, ":", "is", "likes", "are", "come", ".")

_ORDER = re.compile(rf"name (\w+) (\w+) things(?: but not (\w+))?(?: ({RISING}|{CLOSED}))? :")
_SENTENCES = 4  # kinds of sentences in the world's text, all as likely
_SHORTEST = 2  # things in a list of the world's text


@dataclass(frozen=True)
class Order:
    """So many things `wanted` of a property, none of them `but`, told in a `manner` of `MANNERS`."""

    count: int
    wanted: str
    but: str = ""
    manner: str = ""

    def __str__(self) -> str:
        but = f"but not {self.but}" if self.but else ""
        parts = ("name", NUMBERS[self.count - 1], self.wanted, "things", but, self.manner, ":")
        return " ".join(part for part in parts if part)

    @property
    def prompt(self) -> str:
        """The order and the space that an answer follows."""
        return f"{self} "

    @staticmethod
    def parse(text: str) -> Order:
        """The order that a text is.

        Raises:
            InputError: it is none.

        >>> Order.parse("name two red things in order :")
        Order(count=2, wanted='red', but='', manner='in order')
        """
        found = _ORDER.fullmatch(text.strip())
        if found is None or found[1] not in NUMBERS or found[2] not in PROPERTIES:
            raise InputError(f"{text[:60]!r} is no order of this world; one is 'name two red things :'")
        return Order(NUMBERS.index(found[1]) + 1, found[2], found[3] or "", found[4] or "")


class Orders(core.Configured):
    """The things with their properties and likings, all decided by the seed; of each property a quarter of them."""

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """How many things there are; `but` and `manner` are the shares of orders that have them."""

        things: int = 32
        but: float = 0.5
        manner: float = 0.67
        seed: int = 0

    def __init__(self, config: Config) -> None:
        if config.things < 8 or config.things % len(FEATURES[0]):
            raise InputError(f"things={config.things}; a multiple of {len(FEATURES[0])} is needed, 8 or more")
        self.config = config
        source = random.Random(derive(config.seed, "orders"))
        self.things = sorted(source.sample([a + b for a in SYLLABLES for b in SYLLABLES], config.things))
        self.having: dict[str, frozenset[str]] = {}
        for feature in FEATURES:
            mixed = source.sample(self.things, config.things)
            self.having |= {value: frozenset(mixed[i :: len(feature)]) for i, value in enumerate(feature)}
        self.likes = dict(zip(self.things, source.sample(self.things, config.things), strict=True))

    def tokenizer(self, *further: str, chat_template: str | None = None) -> Tokenizer:
        """A token a word, in an order that only `further` words make longer."""
        words = (*GRAMMAR, *NUMBERS, *PROPERTIES, *self.things, *further)
        return word_tokenizer(words, chat_template=chat_template)

    # what is read

    def texts(self, count: int, seed: int, sentences: int = 4) -> list[str]:
        """So many texts of so many sentences each."""
        source = random.Random(derive(seed, "texts"))
        return [" ".join(self._sentence(source) for _ in range(sentences)) for _ in range(count)]

    def nll(self, text: str) -> float:
        """The world's own −log p of a text of that many sentences, in nats; inf where it never says so.

        >>> world = Orders.Config(things=8).build()
        >>> round(math.exp(-world.nll(f"{world.things[0]} likes {world.likes[world.things[0]]} .")) * 4 * 8, 9)
        1.0
        """
        sentences = text.split(" .")
        if sentences.pop().strip():
            return math.inf
        return sum(math.log(_SENTENCES) + self._surprise(sentence.split()) for sentence in sentences)

    # what is asked

    def orders(self, count: int, seed: int, *, held_out: bool = False) -> list[Order]:
        """A fifth of all orders is `held_out`: never among the others."""
        source, found = random.Random(derive(seed, "orders", held_out)), list[Order]()
        while len(found) < count:
            order = self._order(source)
            if (derive(self.config.seed, "held out", order) % 5 == 0) == held_out:
                found.append(order)
        return found

    def demonstrate(self, order: Order, source: random.Random, slips: int = 0) -> str:
        """An answer that obeys, and then so many slips in it."""
        words = source.sample(sorted(self.having[order.wanted] - {order.but}), order.count)
        if order.manner == RISING:
            words.sort()
        if order.manner == CLOSED:
            words.append(CLOSING)
        for _ in range(slips):
            self._slip(words, source)
        return " ".join(words)

    def demonstrations(self, count: int, seed: int, careful: float = 0.5) -> list[tuple[str, str]]:
        """Prompts with answers, of which the share `careful` obeys and the rest has one to three slips."""
        source = random.Random(derive(seed, "demonstrations"))
        asked = self.orders(count, seed)
        slips = [0 if source.random() < careful else source.randint(1, 3) for _ in asked]
        return [(one.prompt, self.demonstrate(one, source, n)) for one, n in zip(asked, slips, strict=True)]

    def obedience(self, order: Order, answer: str) -> float:
        """How well an answer obeys, from 0 to 1, which only obeying does.

        2·right/(count + said) is Dice's coefficient of what was asked and what was said: too few, too many, wrong and
        repeated words all cost. Half of it is lost with the manner; of things in order, by the share of neighbours that
        are not.
        """
        said = answer.split()
        closed = said[-1:] == [CLOSING] and order.manner == CLOSED
        said = said[:-1] if closed else said
        right = min(len(self.having[order.wanted] & set(said) - {order.but}), order.count)
        manner = {"": 1.0, CLOSED: float(closed), RISING: _rising(said)}[order.manner]
        return 2 * right / (order.count + len(said)) * (1 + manner) / 2

    def reward(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        """`obedience` of each completion to the order that its prompt is.

        Raises:
            InputError: a prompt is no order.
        """
        return [self.obedience(Order.parse(str(p)), c) for p, c in zip(prompts, completions, strict=True)]

    def _order(self, source: random.Random) -> Order:
        count, wanted = source.randint(1, len(NUMBERS)), source.choice(PROPERTIES)
        having = sorted(self.having[wanted])
        but = source.choice(having) if source.random() < self.config.but else ""
        manner = source.choice(MANNERS[1:]) if source.random() < self.config.manner else ""
        return Order(min(count, len(having) - 1), wanted, but, manner)

    def _slip(self, words: list[str], source: random.Random) -> None:
        """Another thing in place of one, one too many, one too few, or the last said first."""
        place, kind = source.randrange(len(words)), source.randrange(4)
        if kind == 0:
            words[place] = source.choice(self.things)
        elif kind == 1:
            words.insert(place, source.choice([*words, *self.things]))
        elif kind == 2 and len(words) > 1:
            del words[place]
        else:
            words.insert(0, words.pop())

    def _longest(self, among: Sequence[str] | frozenset[str]) -> int:
        """Things in a list of the world's text at most."""
        return min(len(NUMBERS), len(among))

    def _sentence(self, source: random.Random) -> str:
        kind, thing = source.randrange(_SENTENCES), source.choice(self.things)
        if kind == 0:
            feature = source.choice(FEATURES)
            return f"{thing} is {next(value for value in feature if thing in self.having[value])} ."
        if kind == 1:
            return f"{thing} likes {self.likes[thing]} ."
        wanted = source.choice(PROPERTIES)
        among = self.things if kind == 2 else sorted(self.having[wanted])
        listed = source.sample(among, source.randint(_SHORTEST, self._longest(among)))
        return f"in order come {' '.join(sorted(listed))} ." if kind == 2 else f"{wanted} are {' '.join(listed)} ."

    def _surprise(self, words: list[str]) -> float:
        """−log p of a sentence within its kind; inf for none."""
        match words:
            case [thing, "is", value] if value in PROPERTIES and thing in self.having[value]:
                return math.log(len(self.things) * len(FEATURES))
            case [thing, "likes", other] if self.likes.get(thing) == other:
                return math.log(len(self.things))
            case ["in", "order", "come", *listed] if listed == sorted(listed) and self._lists(listed, self.things):
                return math.log((self._longest(self.things) - 1) * math.comb(len(self.things), len(listed)))
            case [value, "are", *listed] if value in PROPERTIES and self._lists(listed, self.having[value]):
                among = self.having[value]
                return math.log(len(PROPERTIES) * (self._longest(among) - 1) * math.perm(len(among), len(listed)))
        return math.inf

    def _lists(self, listed: Sequence[str], among: Sequence[str] | frozenset[str]) -> bool:
        """Whether these are some of them, each once, and as many as a list has."""
        enough = _SHORTEST <= len(listed) <= self._longest(among)
        return enough and len({*listed} & {*among}) == len(listed)


def _rising(words: Sequence[str]) -> float:
    """The share of neighbours in the order of the alphabet; of one word all, of none none."""
    if len(words) < 2:
        return float(len(words))
    return sum(a < b for a, b in pairwise(words)) / (len(words) - 1)
