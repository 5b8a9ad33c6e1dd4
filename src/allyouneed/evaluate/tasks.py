"""Short tasks with checkable answers for in-context learning, each question with wrong options beside the right one.

All are made here, by hand or by seeded code; no benchmark's items are used.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from allyouneed.evaluate.options import Question


@dataclass(frozen=True)
class Task:
    """A line that says what is asked, and questions with options."""

    name: str
    description: str
    questions: tuple[Question, ...]

    @property
    def chance(self) -> float:
        """The accuracy of guessing: 1 / number of options."""
        return 1 / len(self.questions[0].options)


def tasks(questions: int = 72, seed: int = 0) -> list[Task]:
    """All tasks, each with up to `questions` questions in an order that only `seed` decides.

    >>> [task.name for task in tasks()]
    ['capitals', 'opposites', 'plurals', 'categories', 'sentiment', 'addition', 'patterns']
    """
    return [
        _task(name, description, make, questions, random.Random(f"{seed}/{name}"))
        for name, description, make in (
            ("capitals", "The capital of each country.", _capitals),
            ("opposites", "Words and their opposites.", _opposites),
            ("plurals", "One and many.", _plurals),
            ("categories", "The kind of thing each word names.", _categories),
            ("sentiment", "Reviews, positive or negative.", _sentiment),
            ("addition", "Sums.", _addition),
            ("patterns", "Which letter comes next.", _patterns),
        )
    ]


def _task(
    name: str, description: str, make: Callable[[random.Random], list[Question]], count: int, source: random.Random
) -> Task:
    questions = make(source)
    source.shuffle(questions)
    return Task(name, description, tuple(questions[:count]))


def _among(pairs: list[tuple[str, str]], source: random.Random, others: int = 3) -> list[Question]:
    """Questions whose wrong options are the answers of other questions."""
    answers = sorted({answer for _, answer in pairs})
    items = []
    for question, answer in pairs:
        wrong = source.sample([a for a in answers if a != answer], others)
        items.append(_question(question, answer, wrong, source))
    return items


def _question(asked: str, answer: str, wrong: list[str], source: random.Random) -> Question:
    options = [answer, *wrong]
    source.shuffle(options)
    return Question(f"Q: {asked}\nA:", tuple(options), options.index(answer))


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(left.strip(), right.strip()) for left, _, right in (line.partition("-") for line in text.split(","))]


CAPITALS = """France-Paris, Germany-Berlin, Italy-Rome, Spain-Madrid, Portugal-Lisbon, Greece-Athens, Austria-Vienna,
Poland-Warsaw, Hungary-Budapest, Sweden-Stockholm, Norway-Oslo, Finland-Helsinki, Denmark-Copenhagen, Ireland-Dublin,
Belgium-Brussels, Netherlands-Amsterdam, Switzerland-Bern, Russia-Moscow, Ukraine-Kiev, Romania-Bucharest,
Bulgaria-Sofia, Serbia-Belgrade, Croatia-Zagreb, Turkey-Ankara, Egypt-Cairo, Kenya-Nairobi, Nigeria-Abuja,
Ghana-Accra, Ethiopia-Addis Ababa, Morocco-Rabat, Algeria-Algiers, Tunisia-Tunis, Libya-Tripoli, Sudan-Khartoum,
Senegal-Dakar, Uganda-Kampala, Zimbabwe-Harare, Zambia-Lusaka, Angola-Luanda, Cuba-Havana, Canada-Ottawa,
Mexico-Mexico City, Brazil-Brasilia, Argentina-Buenos Aires, Chile-Santiago, Peru-Lima, Colombia-Bogota,
Venezuela-Caracas, Ecuador-Quito, Uruguay-Montevideo, Paraguay-Asuncion, Japan-Tokyo, China-Beijing,
South Korea-Seoul, Vietnam-Hanoi, Thailand-Bangkok, Indonesia-Jakarta, Malaysia-Kuala Lumpur, Philippines-Manila,
India-New Delhi, Pakistan-Islamabad, Bangladesh-Dhaka, Nepal-Kathmandu, Afghanistan-Kabul, Iran-Tehran,
Iraq-Baghdad, Syria-Damascus, Lebanon-Beirut, Jordan-Amman, Saudi Arabia-Riyadh, Qatar-Doha, Australia-Canberra,
New Zealand-Wellington, Iceland-Reykjavik, Jamaica-Kingston, Mongolia-Ulaanbaatar"""

OPPOSITES = """hot-cold, big-small, tall-short, happy-sad, fast-slow, old-young, rich-poor, strong-weak, hard-soft,
light-dark, wet-dry, full-empty, open-closed, clean-dirty, early-late, easy-difficult, good-bad, high-low,
inside-outside, left-right, loud-quiet, near-far, rough-smooth, safe-dangerous, sharp-blunt, sweet-bitter,
thick-thin, tight-loose, true-false, ugly-beautiful, wise-foolish, alive-dead, awake-asleep, begin-end, buy-sell,
arrive-depart, accept-refuse, win-lose, push-pull, rise-fall, remember-forget, love-hate, laugh-cry, give-take,
increase-decrease, find-hide, build-destroy, ask-answer, above-below, always-never, before-after, up-down, day-night,
friend-enemy, heaven-hell, north-south, east-west, peace-war, success-failure, summer-winter, birth-death, front-back,
top-bottom, brave-cowardly, polite-rude, generous-greedy, guilty-innocent, import-export, lend-borrow, entrance-exit,
maximum-minimum, public-private, visible-invisible, attack-defend, float-sink, odd-even, possible-impossible"""

PLURALS = """cat-cats, dog-dogs, house-houses, car-cars, tree-trees, book-books, box-boxes, fox-foxes, bus-buses,
church-churches, dish-dishes, glass-glasses, class-classes, brush-brushes, match-matches, city-cities, baby-babies,
lady-ladies, story-stories, country-countries, party-parties, army-armies, fly-flies, berry-berries, boy-boys,
day-days, key-keys, toy-toys, monkey-monkeys, leaf-leaves, wolf-wolves, knife-knives, life-lives, wife-wives,
shelf-shelves, half-halves, loaf-loaves, thief-thieves, man-men, woman-women, child-children, foot-feet, tooth-teeth,
goose-geese, mouse-mice, ox-oxen, potato-potatoes, tomato-tomatoes, hero-heroes, echo-echoes,
photo-photos, piano-pianos, radio-radios, bird-birds, cliff-cliffs, chief-chiefs, pencil-pencils, window-windows,
garden-gardens, river-rivers, mountain-mountains, teacher-teachers, student-students, doctor-doctors, lunch-lunches,
peach-peaches, family-families, factory-factories, lorry-lorries, penny-pennies, valley-valleys, journey-journeys"""

KINDS = {
    "fruit": "apple banana cherry grape mango pear melon strawberry pineapple fig kiwi raspberry blueberry papaya",
    "animal": "dog cat horse cow sheep goat tiger lion elephant rabbit monkey wolf bear fox deer camel donkey zebra",
    "colour": "red blue green yellow purple black white brown grey pink crimson scarlet beige turquoise",
    "tool": "hammer saw drill wrench chisel screwdriver pliers shovel axe rake spade clamp crowbar",
    "metal": "iron zinc nickel aluminium steel brass platinum titanium tin lead cobalt chromium tungsten",
}

GOOD = """wonderful excellent delightful brilliant charming superb lovely amazing touching perfect fantastic beautiful
magnificent marvellous splendid outstanding terrific great impressive exquisite thrilling captivating enchanting
remarkable gorgeous fabulous enjoyable pleasant refreshing glorious inspiring stunning uplifting admirable first-rate
masterly"""
BAD = """terrible awful boring dreadful stupid horrible dull disappointing tedious ugly pointless annoying appalling
atrocious abysmal pathetic miserable lousy mediocre unbearable disgusting ghastly clumsy tiresome worthless dismal
irritating unpleasant disastrous laughable shoddy hopeless depressing revolting insulting unwatchable"""
SUBJECTS = ["The film was", "The acting was", "The story was", "I found it", "The music was", "The food was"]
ENDINGS = ["from start to finish.", "and I told all my friends.", "as I expected.", "to say the least.", "this time."]


def _capitals(source: random.Random) -> list[Question]:
    return _among(_pairs(CAPITALS), source)


def _opposites(source: random.Random) -> list[Question]:
    return _among(_pairs(OPPOSITES), source)


def _plurals(source: random.Random) -> list[Question]:
    """Wrong options are other endings of the same word."""
    items = []
    for one, many in _pairs(PLURALS):
        forms = [one + "s", one + "es", one[:-1] + "ies", one + "en", one, one[:-1] + "ves"]
        items.append(_question(one, many, source.sample([form for form in forms if form != many], 3), source))
    return items


def _categories(source: random.Random) -> list[Question]:
    return [
        _question(word, kind, [other for other in KINDS if other != kind], source)
        for kind, words in KINDS.items()
        for word in words.split()
    ]


def _sentiment(source: random.Random) -> list[Question]:
    return [
        _question(f"{source.choice(SUBJECTS)} {word} {source.choice(ENDINGS)}", label, [other], source)
        for label, other, words in (("positive", "negative", GOOD), ("negative", "positive", BAD))
        for word in words.split()
    ]


def _addition(source: random.Random) -> list[Question]:
    items = []
    for a in range(1, 13):
        for b in range(1, a + 1):  # a sum once, not also the other way round
            wrong = [str(a + b + d) for d in (-2, -1, 1, 2, 10) if a + b + d > 0]
            items.append(_question(f"{a} + {b}", str(a + b), source.sample(wrong, 3), source))
    return items


def _patterns(source: random.Random) -> list[Question]:
    """Two or three letters repeated; the wrong options are the pattern's other letters and strangers."""
    items = []
    for _ in range(90):
        letters = source.sample("ABCDEFGHJKLMNPRSTUVWXYZ", 4)
        cycle = letters[: source.choice((2, 3))]
        shown = source.randrange(5, 8)
        sequence = [cycle[i % len(cycle)] for i in range(shown + 1)]
        wrong = [letter for letter in letters if letter != sequence[-1]]
        items.append(_question(" ".join(sequence[:-1]), sequence[-1], wrong[:3], source))
    return items
