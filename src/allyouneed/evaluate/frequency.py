"""How often terms occur in what a model was trained on, and what their frequency does to its answers.

Biderman et al. 2023, sec. 4.3, after Razeghi et al. 2022: questions are grouped by how often their terms occur in the
training data up to a checkpoint, and accuracy is read off group by group. Knows ids only, no text.

Shapes: L tokens, N questions or terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import derive
from allyouneed.evaluate.memorisation import reproduced
from allyouneed.evaluate.statistics import Interval, paired_bootstrap, wilson
from allyouneed.generate.engine import Engine


def count_terms(rows: Iterable[Tensor], terms: Sequence[Sequence[int]]) -> np.ndarray:
    """How often each of `terms` (token ids) occurs within rows, overlapping occurrences included: (N,), int64.

    Args:
        rows: pieces of the data, (L,) or (B, T) each; nothing is counted across a row's end. The batches of an order
            up to a step (`data.replay`) give the frequencies that a checkpoint has seen.

    Raises:
        InputError: an empty term.

    >>> import torch
    >>> count_terms([torch.tensor([1, 2, 1, 2, 1]), torch.tensor([[2, 1], [2, 2]])], [[1, 2], [1, 2, 1], [2], [7]])
    array([2, 2, 5, 0])
    """
    if any(not len(term) for term in terms):
        raise InputError("count_terms: an empty term occurs everywhere; give at least one token")
    total = np.zeros(len(terms), dtype=np.int64)
    for piece in rows:
        total += _occurrences(np.atleast_2d(piece.cpu().numpy()), terms)
    return total


def _occurrences(rows: np.ndarray, terms: Sequence[Sequence[int]]) -> np.ndarray:
    """Looks for a term only where its rarest token stands; (B, T) -> (N,)."""
    width, flat = rows.shape[1], rows.ravel()
    order = np.argsort(flat, kind="stable")
    tokens = flat[order]
    found = np.zeros(len(terms), dtype=np.int64)
    for number, term in enumerate(terms):
        spans = [np.searchsorted(tokens, [token, token + 1]) for token in term]
        rarest = min(range(len(term)), key=lambda i: spans[i][1] - spans[i][0])
        starts = order[slice(*spans[rarest])] - rarest
        # a start that this moved back into the row before has too little of that row left for the term
        starts = starts[(starts >= 0) & (starts % width + len(term) <= width)]
        for offset, token in enumerate(term):
            starts = starts[flat[starts + offset] == token]
        found[number] = len(starts)
    return found


def answered(engine: Engine, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> np.ndarray:
    """Which prompts greedy decoding continues exactly with their answers: (N,), bool."""
    return reproduced(engine, prompts, answers) == np.array([len(answer) for answer in answers])


@dataclass(frozen=True)
class Group:
    """Questions whose terms occur from `least` to `most` times, and how many of them were answered rightly."""

    least: int
    most: int
    questions: int
    accuracy: Interval


def by_frequency(frequencies: np.ndarray, right: np.ndarray, *, groups: int = 10) -> list[Group]:
    """Accuracy in `groups` of equally many questions, from the rarest terms to the most frequent, Wilson's intervals.

    Args:
        frequencies: (N,), how often each question's term occurs.
        right: (N,), whether it was answered rightly.

    Raises:
        InputError: fewer questions than groups.

    >>> [str(group.accuracy) for group in by_frequency(np.arange(4), np.array([0, 0, 1, 1]), groups=2)]
    ['0 [0, 0.6576]', '1 [0.3424, 1]']
    """
    if len(frequencies) < groups:
        raise InputError(f"by_frequency: {len(frequencies)} questions are too few for {groups} groups")
    order, right = np.argsort(frequencies, kind="stable"), np.asarray(right, dtype=bool)
    found = []
    for some in np.array_split(order, groups):
        accuracy = wilson(int(right[some].sum()), len(some))
        found.append(Group(int(frequencies[some].min()), int(frequencies[some].max()), len(some), accuracy))
    return found


def frequency_gap(frequencies: np.ndarray, right: np.ndarray, *, share: float = 0.1, seed: int = 0) -> Interval:
    """Accuracy on the `share` of questions with the most frequent terms minus that with the rarest (Razeghi et al.
    2022, sec. 3.3: the performance gap, with a tenth), with a bootstrap interval over questions.

    Raises:
        InputError: too few questions for a share of them to hold one.

    >>> frequency_gap(np.arange(100), np.arange(100) >= 50).estimate
    1.0
    """
    size = int(len(frequencies) * share)
    if size < 1 or share > 0.5:
        raise InputError(f"frequency_gap: share={share} of {len(frequencies)} questions; at least 1 and at most half")
    order, right = np.argsort(frequencies, kind="stable"), np.asarray(right, dtype=np.float64)
    # one from each end makes a pair, and which with which means nothing: resampling pairs is resampling both ends
    mixed = np.random.default_rng(derive(seed, "pairs")).permutation(size)
    return paired_bootstrap(right[order[-size:]][mixed], right[order[:size]], seed=seed)
