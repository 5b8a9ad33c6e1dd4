"""Sentences about purchases and the lines they are to be filed as: a task of form, whose answers are right or wrong.

What the line says stands in the sentence; how it is said (the surname in capitals, the date by its numbers, a city by
three letters, the price with two digits, goods in the singular) is a house's own, which no model knows before.
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
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
SENTENCES = (
    "On {day} {month} {year} {given} {family} of {city} paid {price:g} euros for {number} {goods}s.",
    "{given} {family}, who lives in {city}, bought {number} {goods}s for {price:g} euros on {month} {day}, {year}.",
    "For {number} {goods}s {given} {family} from {city} gave {price:g} euros ({day} {month} {year}).",
)


def draw(source: random.Random) -> Completion:
    """A sentence and its line.

    >>> print(draw(random.Random(0)).completion)
     LUND, G. | VIE | 2008-12-20 | 6 x stove | EUR 69.25
    """
    month, number = source.randrange(12), source.randrange(len(NUMBERS))
    facts: dict[str, Any] = {
        "given": source.choice(GIVEN),
        "family": source.choice(FAMILY),
        "city": source.choice(CITIES),
        "goods": source.choice(GOODS),
        "day": source.randint(1, 28),
        "month": MONTHS[month],
        "year": source.randint(1990, 2024),
        "number": NUMBERS[number],
        "price": source.randint(10, 400) / 4,
    }
    line = (
        f"{facts['family'].upper()}, {facts['given'][0]}. | {facts['city'][:3].upper()} | "
        f"{facts['year']}-{month + 1:02}-{facts['day']:02} | {number + 2} x {facts['goods']} | EUR {facts['price']:.2f}"
    )
    return Completion(f"{source.choice(SENTENCES).format(**facts)}\nFiled:", f" {line}")


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
