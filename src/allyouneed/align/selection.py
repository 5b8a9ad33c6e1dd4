"""Choosing among samples: best of n, and what it is worth exactly.

Holds no training; `align.rejection` learns from what is chosen. Shapes: X distinct outcomes, N scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from allyouneed.align.rewards import Reward, scored
from allyouneed.align.samplers import Writer
from allyouneed.core.errors import InputError
from allyouneed.generate.language_model import Completion, Sampling, Turns


@dataclass(frozen=True)
class Sampled:
    """One answer to a prompt and what the reward says of it."""

    prompt: Turns
    completion: Completion
    score: float


def sample(writer: Writer, prompts: Sequence[Turns], reward: Reward, n: int, sampling: Sampling) -> list[list[Sampled]]:
    """`n` scored answers to each prompt, in the order they were drawn; with a seed, answer k of prompt i draws from
    `seed + n·i + k`.

    Raises:
        InputError: n below 1, or the reward's own.
    """
    if n < 1:
        raise InputError(f"best of n: n={n}; at least 1 is needed")
    asked = [prompt for prompt in prompts for _ in range(n)]
    completions = writer.complete(asked, sampling)
    scores = scored(reward, asked, [one.text for one in completions])
    found = [Sampled(*one) for one in zip(asked, completions, scores, strict=True)]
    return [found[i : i + n] for i in range(0, len(found), n)]


def best(samples: Iterable[Sampled]) -> Sampled:
    """The one with the highest score, the first among equals."""
    return max(samples, key=lambda one: one.score)


def best_of_n(writer: Writer, prompts: Sequence[Turns], reward: Reward, n: int, sampling: Sampling) -> list[Sampled]:
    """The best of `n` answers to each prompt (Stiennon et al. 2020, sec. 3; Nakano et al. 2021, sec. 3.2)."""
    return [best(found) for found in sample(writer, prompts, reward, n, sampling)]


def best_of_n_kl(n: int) -> float:
    """KL(best of n ‖ policy) = log n − (n − 1)/n in nats (Stiennon et al. 2020, app. G.3): exact where no two answers
    have the same score, else what it cannot exceed.

    >>> best_of_n_kl(1), round(best_of_n_kl(4), 3)
    (0.0, 0.636)
    """
    return math.log(n) - (n - 1) / n


def best_distribution(probabilities: np.ndarray, rewards: np.ndarray, n: int) -> np.ndarray:
    """The distribution of the best of n draws, ties decided by chance: (X), (X) -> (X), float64.

    An outcome x shares what its reward r has: P(all draws ≤ r) − P(all draws < r) = F(r)ⁿ − F(r⁻)ⁿ.

    >>> best_distribution(np.array([0.5, 0.5]), np.array([0.0, 1.0]), 2).tolist()
    [0.25, 0.75]
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    levels, place = np.unique(rewards, return_inverse=True)
    mass = np.bincount(place, weights=probabilities, minlength=len(levels))
    upto = np.minimum(mass.cumsum(), 1.0)
    highest = np.diff(upto**n, prepend=0.0)
    share = np.divide(highest, mass, out=np.zeros_like(mass), where=mass > 0)
    found: np.ndarray = probabilities * share[place]
    return found


def expected_best(probabilities: np.ndarray, rewards: np.ndarray, n: int) -> float:
    """E[max of n draws] of a known distribution: (X), (X).

    >>> expected_best(np.array([0.5, 0.5]), np.array([0.0, 1.0]), 2)
    0.75
    """
    return float(best_distribution(probabilities, rewards, n) @ np.asarray(rewards, dtype=np.float64))


def estimated_best(scores: Sequence[float], n: int) -> float:
    """E[max of n draws], without bias from N ≥ n of them: Σ C(i − 1, n − 1)/C(N, n) · the i-th lowest score (Nakano et
    al. 2021, app. I).

    Raises:
        InputError: fewer scores than n.

    >>> estimated_best([3.0, 1.0, 2.0], 1), estimated_best([3.0, 1.0, 2.0], 3)
    (2.0, 3.0)
    """
    if not 1 <= n <= len(scores):
        raise InputError(f"best of {n} from {len(scores)} scores; n must be from 1 to their number")
    ordered, total = sorted(scores), math.comb(len(scores), n)
    return sum(math.comb(i, n - 1) / total * score for i, score in enumerate(ordered))
