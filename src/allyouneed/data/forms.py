"""Sentences about purchases and the lines they are to be filed as: a task of form, whose answers are right or wrong.

What the line says stands in the sentence; how it is said (the surname first and in capitals, a city by three letters,
how many by a number, goods in the singular, the price with two digits) is a house's own, which no model knows before.
"""

from __future__ import annotations

import random
from typing import Any

from allyouneed.core.seeds import derive
from allyouneed.data.jsonl import Completion

GIVEN = ("Anna", "Bruno", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Luca")
FAMILY = ("Rossi", "Meyer", "Novak", "Silva", "Larsen", "Dubois", "Kowal", "Moreau", "Weber", "Costa", "Lund", "Horvat")
CITIES = ("Lyon", "Turin", "Porto", "Vienna", "Oslo", "Gdansk", "Bergen", "Zagreb", "Leeds", "Malaga", "Basel", "Ghent")
GOODS = ("lamp", "chair", "clock", "table", "mirror", "carpet", "kettle", "ladder", "pillow", "basket", "mug", "stove")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
SENTENCES = (
    "{given} {family} of {city} paid {price:g} euros for {number} {goods}s.",
    "In {city} {given} {family} bought {number} {goods}s for {price:g} euros.",
    "{number} {goods}s went to {given} {family}, {city}, for {price:g} euros.",
)


def draw(source: random.Random) -> Completion:
    """A sentence and its line.

    >>> print(draw(random.Random(0)).completion)
     ROSSI, G. | OSL | 8 x pillow | 64.50
    """
    number = source.randrange(len(NUMBERS))
    facts: dict[str, Any] = {
        "given": source.choice(GIVEN),
        "family": source.choice(FAMILY),
        "city": source.choice(CITIES),
        "goods": source.choice(GOODS),
        "number": NUMBERS[number],
        "price": source.randint(10, 400) / 4,
    }
    line = (
        f"{facts['family'].upper()}, {facts['given'][0]}. | {facts['city'][:3].upper()} | "
        f"{number + 2} x {facts['goods']} | {facts['price']:.2f}"
    )
    sentence = source.choice(SENTENCES).format(**facts)
    return Completion(f"{sentence[0].upper()}{sentence[1:]}\nFiled:", f" {line}")


def drawn(count: int, *, seed: int, without: frozenset[str] = frozenset()) -> list[Completion]:
    """So many different ones, none of whose prompts is in `without`.

    >>> len({one.prompt for one in drawn(50, seed=1)})
    50
    """
    source, found = random.Random(derive(seed, "forms")), dict[str, Completion]()
    while len(found) < count:
        one = draw(source)
        if one.prompt not in without:
            found[str(one.prompt)] = one
    return list(found.values())
