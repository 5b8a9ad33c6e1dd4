"""Grades of one and the same answers, all or nothing and graded, and how sharply a grade bends with scale.

Schaeffer et al. 2023 (arXiv:2304.15004) say of abilities that appear suddenly in larger models (Wei et al. 2022,
arXiv:2206.07682) that the grade is what is sudden: an answer of L tokens is right as a whole about p^L of the time if
each of them is with probability p. Every grade here is of a single answer, the higher the better unless it is called a
distance or a score that says otherwise.

Shapes: n answers, C options.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allyouneed.core.errors import InputError

Ids = Sequence[object]  # or words, or letters


def exact_match(found: Sequence[Ids], references: Sequence[Ids]) -> np.ndarray:
    """1 where the answer is the reference to the last token, else 0: (n,).

    >>> exact_match([[1, 2, 3], [1, 2]], [[1, 2, 3], [1, 2, 3]]).tolist()
    [1.0, 0.0]
    """
    return np.array([float(list(one) == list(right)) for one, right in zip(found, references, strict=True)])


def token_accuracy(found: Sequence[Ids], references: Sequence[Ids]) -> np.ndarray:
    """The share of the reference's places that hold the right token; what is missing is wrong: (n,).

    Raises:
        InputError: a reference is empty.

    >>> token_accuracy([[1, 9, 3], [1]], [[1, 2, 3], [1, 2]]).round(3).tolist()
    [0.667, 0.5]
    """
    if not all(map(len, references)):
        raise InputError("token_accuracy: a reference is empty, so there is no share of it to be right")
    pairs = zip(found, references, strict=True)
    return np.array([sum(a == b for a, b in zip(one, right, strict=False)) / len(right) for one, right in pairs])


def edit_distance(one: Ids, other: Ids) -> int:
    """The least number of tokens put in, left out or exchanged that makes one of the other (Levenshtein 1966).

    >>> edit_distance("kitten", "sitting")
    3
    """
    above = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
        above = row
    return above[-1]


def edit_similarity(found: Sequence[Ids], references: Sequence[Ids]) -> np.ndarray:
    """1 less the edit distance as a share of the longer of the two: 1 the same, 0 nothing in common: (n,).

    >>> edit_similarity([[2, 3, 4]], [[1, 2, 3, 4]]).tolist()
    [0.75]
    """
    pairs = zip(found, references, strict=True)
    return np.array([1 - edit_distance(one, right) / max(len(one), len(right), 1) for one, right in pairs])


def unbroken(p: float, length: int) -> float:
    """The mean of pⁱ for i = 1 … length: the share of an answer before its first wrong token, if every token is right
    with probability p. It is the token accuracy of answers in which all that follows an error is wrong too.

    >>> unbroken(0.5, 2)
    0.375
    """
    return sum(p**i for i in range(1, length + 1)) / length


def multiple_choice_grade(scores: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """1 where the right option has the highest score, shared among equals, else 0: (n, C), (n,) -> (n,).

    Sharing keeps a model that tells nothing apart at chance, 1/C, wherever the right option stands.

    >>> multiple_choice_grade(np.array([[-1.0, -2.0], [-3.0, -3.0]]), np.array([0, 0])).tolist()
    [1.0, 0.5]
    """
    best = scores == scores.max(1, keepdims=True)
    return best[np.arange(len(answers)), answers] / best.sum(1)


def brier(scores: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Σ (pᵢ − [i is right])² over the options, with p the softmax of the scores (Brier 1950): 0 is best, 2 worst, and a
    model that tells nothing apart has 1 − 1/C: (n, C), (n,) -> (n,).

    >>> brier(np.zeros((1, 4)), np.array([2])).tolist()
    [0.75]
    """
    odds = np.exp(scores - scores.max(1, keepdims=True))
    wrong = odds / odds.sum(1, keepdims=True)
    wrong[np.arange(len(answers)), answers] -= 1
    found: np.ndarray = (wrong**2).sum(1)
    return found


def bend(x: Sequence[float], y: Sequence[float], *, least: float = 0.05) -> float:
    """How much later than evenly a grade rises along `x`: twice the area between the chord and the curve, over the rise
    from the first point to the last and the length of `x`.

    0: evenly (along log compute, say); towards 1: flat, then a jump at the end; towards −1: at once, then flat. y = xᵐ
    from 0 to 1 has (m − 1)/(m + 1). It is an area, under straight lines from point to point, because second differences
    would measure the noise of single points.

    Args:
        x: rising.
        y: a grade at each.
        least: a smaller rise counts as this one, so that the noise of a grade that does not rise is no shape.

    Raises:
        InputError: fewer than three points.

    >>> round(bend([0, 1, 2, 3], [0, 0, 0, 1]), 3), bend([0, 1, 2], [0.1, 0.3, 0.5]), bend([0, 1, 2], [0, 0, 0])
    (0.667, 0.0, 0.0)
    """
    if len(x) < 3 or len(x) != len(y):
        raise InputError(f"bend: {len(x)} and {len(y)} points; at least three of both")
    along = (np.asarray(x, dtype=np.float64) - x[0]) / (x[-1] - x[0])
    values = np.asarray(y, dtype=np.float64)
    rise = values[-1] - values[0]
    return round(float(2 * np.trapezoid(values[0] + rise * along - values, along) / max(rise, least)), 12)


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float:
    """The first x at which the grade exceeds `level`, on straight lines from point to point; else the last x.

    >>> crossing([0.0, 1.0, 2.0], [0.0, 0.0, 0.2], 0.05)
    1.25
    """
    above = next((i for i, value in enumerate(y) if value > level), None)
    if not above:
        return float(x[-1] if above is None else x[0])
    share = (level - y[above - 1]) / (y[above] - y[above - 1])
    return float(x[above - 1] + share * (x[above] - x[above - 1]))


def emergence_score(y: Sequence[float]) -> float:
    """(max − min)/√median((yᵢ₊₁ − yᵢ)²), negative if the highest comes before the lowest: the range as a multiple of a
    typical step (Srivastava et al. 2022, "breakthroughness"; Schaeffer et al. 2023, sec. 4). ∞ where most steps are 0.

    >>> emergence_score([0.0, 0.1, 0.0, 1.0]), emergence_score([0.0, 1.0, 2.0, 3.0])
    (10.0, 3.0)
    """
    values = np.asarray(y, dtype=np.float64)
    sign = 1.0 if values.argmax() >= values.argmin() else -1.0
    step = float(np.sqrt(np.median(np.diff(values) ** 2)))
    return sign * float(np.ptp(values)) / step if step else sign * float("inf")
