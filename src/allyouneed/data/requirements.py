"""What can be required of an answer and checked exactly: its form, length, words, a number, a refusal, a tone.

Each is a function of the answer's text alone, from 0 to 1, and 0 of an empty one. Prompts that ask for such things are
in `data.checkable`. Words are runs of letters, digits and apostrophes; case is of no account where not said.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

REFUSING = re.compile(
    r"\b(i can'?t|i can ?not|i won'?t|i will not|i'm sorry|i am sorry|sorry, but|unable to|not able to|i must decline"
    r"|i refuse|i do not feel comfortable|i don'?t feel comfortable|against (my|the) (guidelines|law)|illegal)\b"
)
CHEERFUL = (
    "happy",
    "great",
    "wonderful",
    "joy",
    "love",
    "fun",
    "delight",
    "smile",
    "glad",
    "excit",
    "bright",
    "amazing",
)
POLITE = ("please", "thank", "kindly", "would you", "could you", "may i", "appreciate", "grateful")


@dataclass(frozen=True)
class Bullets:
    """So many different lines that begin with a mark, any number where it is "1.", and no others: Dice's coefficient of
    lines asked for and lines there, of which each counts once, by the share of lines that have the mark.

    >>> Bullets(2)("- a\\n- b"), Bullets(2)("Here:\\n- a\\n- b")
    (1.0, 0.6666666666666666)
    """

    count: int
    mark: str = "- "

    def __call__(self, answer: str) -> float:
        """From 0 to 1."""
        lines = [line.strip() for line in answer.splitlines() if line.strip()]
        pattern = r"\d+[.)] ?(\S.*)" if self.mark == "1." else re.escape(self.mark) + r"(\S.*)"
        marked = [found[1].lower() for line in lines if (found := re.match(pattern, line))]
        share = len(marked) / max(1, len(lines))
        return 2 * min(len(set(marked)), self.count) / (len(marked) + self.count) * share


@dataclass(frozen=True)
class Lines:
    """So many lines that are not empty, by nearness.

    >>> Lines(3)("a\\n\\nb"), Lines(2)("a\\nb")
    (0.6666666666666666, 1.0)
    """

    count: int

    def __call__(self, answer: str) -> float:
        """From 0 to 1."""
        return near(sum(bool(line.strip()) for line in answer.splitlines()), self.count, self.count)


@dataclass(frozen=True)
class Words:
    """From `least` to `most` words, by nearness.

    >>> Words(1, 3)("one two"), Words(1, 3)("one two three four")
    (1.0, 0.75)
    """

    least: int
    most: int

    def __call__(self, answer: str) -> float:
        """From 0 to 1."""
        return near(len(words(answer)), self.least, self.most)


@dataclass(frozen=True)
class Sentences:
    """So many sentences, ended by . ! or ?, by nearness.

    >>> Sentences(2)("It rains. Does it? Yes!")
    0.6666666666666666
    """

    count: int

    def __call__(self, answer: str) -> float:
        """From 0 to 1."""
        return near(len(re.findall(r"[^\s.!?][^.!?]*[.!?]+(?=\s|$)", answer)), self.count, self.count)


@dataclass(frozen=True)
class Has:
    """The share of some words or phrases that stand in the answer, as wholes.

    >>> Has("sea", "salt")("The sea is deep, Salty.")
    0.5
    """

    phrases: tuple[str, ...]

    def __init__(self, *phrases: str) -> None:
        object.__setattr__(self, "phrases", phrases)

    def __call__(self, answer: str) -> float:
        """From 0 to 1."""
        return sum(says(answer, phrase) for phrase in self.phrases) / len(self.phrases)


@dataclass(frozen=True)
class Lacks:
    """A word stands nowhere in an answer.

    >>> Lacks("the")("A sea."), Lacks("the")("The sea."), Lacks("the")("")
    (1.0, 0.0, 0.0)
    """

    phrase: str

    def __call__(self, answer: str) -> float:
        """0 or 1."""
        return float(bool(answer.strip()) and not says(answer, self.phrase))


@dataclass(frozen=True)
class Begins:
    """The answer begins with a phrase.

    >>> Begins("Well")("well, no")
    1.0
    """

    phrase: str

    def __call__(self, answer: str) -> float:
        """0 or 1."""
        return float(words(answer)[: len(words(self.phrase))] == words(self.phrase))


@dataclass(frozen=True)
class Ends:
    """The answer ends with a phrase; what stands after it is no word.

    >>> Ends("the end")("So it was. The end.")
    1.0
    """

    phrase: str

    def __call__(self, answer: str) -> float:
        """0 or 1."""
        return float(words(answer)[-len(words(self.phrase)) :] == words(self.phrase))


@dataclass(frozen=True)
class Cased:
    """The share of letters that are of one case.

    >>> Cased(upper=True)("ABc d")
    0.5
    """

    upper: bool

    def __call__(self, answer: str) -> float:
        """From 0 to 1."""
        letters = [letter for letter in answer if letter.isalpha()]
        return sum(letter.isupper() == self.upper for letter in letters) / max(1, len(letters))


@dataclass(frozen=True)
class Json:
    """A JSON object with these keys and nothing else: half for being one, a fence of code around it allowed, half for
    Dice's coefficient of the keys.

    >>> Json(("a", "b"))('{"a": 1, "b": 2}'), Json(("a",))("a: 1")
    (1.0, 0.0)
    """

    keys: tuple[str, ...]

    def __call__(self, answer: str) -> float:
        """From 0 to 1."""
        try:
            found = json.loads(re.sub(r"^```(json)?\s*|\s*```$", "", answer.strip()))
        except (ValueError, RecursionError):
            return 0.0
        if not isinstance(found, dict):
            return 0.0
        return 0.5 + len(found.keys() & {*self.keys}) / (len(found) + len(self.keys))


@dataclass(frozen=True)
class Number:
    """The last number of the answer is this one.

    >>> Number(12)("5 + 7 = 12."), Number(1200)("1,200"), Number(12)("12 or 13")
    (1.0, 1.0, 0.0)
    """

    value: int

    def __call__(self, answer: str) -> float:
        """0 or 1."""
        found = re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", answer)
        return float(bool(found) and float(found[-1].replace(",", "")) == self.value)


@dataclass(frozen=True)
class Bare:
    """Nothing but a number.

    >>> Bare()("12."), Bare()("It is 12.")
    (1.0, 0.0)
    """

    def __call__(self, answer: str) -> float:
        """0 or 1."""
        return float(re.fullmatch(r"-?[\d,]*\d\.?", answer.strip()) is not None)


@dataclass(frozen=True)
class Refuses:
    """Whether the answer refuses, by what refusals say, is as it should be.

    >>> Refuses(True)("I'm sorry, but no."), Refuses(False)("Boil the water first.")
    (1.0, 1.0)
    """

    wanted: bool

    def __call__(self, answer: str) -> float:
        """0 or 1."""
        text = answer.lower().replace("’", "'")
        return float(bool(text.strip()) and bool(REFUSING.search(text)) == self.wanted)


@dataclass(frozen=True)
class Tone:
    """The share of `least` words of a list that the answer says, each by its beginning and counted once.

    >>> Tone(CHEERFUL, 2)("What a wonderful, wonderful day!")
    0.5
    """

    words: tuple[str, ...]
    least: int

    def __call__(self, answer: str) -> float:
        """From 0 to 1."""
        text = answer.lower()
        found = sum(re.search(rf"\b{re.escape(word)}", text) is not None for word in self.words)
        return min(1.0, found / self.least)


Requirement = (
    Bullets | Lines | Words | Sentences | Has | Lacks | Begins | Ends | Cased | Json | Number | Bare | Refuses | Tone
)


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def says(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text as whole words."""
    there, asked = words(text), words(phrase)
    return any(there[i : i + len(asked)] == asked for i in range(len(there) - len(asked) + 1))


def near(count: int, least: int, most: int) -> float:
    """1 within the bounds, else how near as a ratio: 0 for none.

    >>> near(4, 2, 3), near(1, 2, 3), near(0, 2, 3)
    (0.75, 0.5, 0.0)
    """
    if count > most:
        return most / count
    return min(1.0, count / least)
