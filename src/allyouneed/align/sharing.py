"""Ranks that train one policy together: each writes its share of the answers, the first asks for rewards, and all have
all of them. They hold the same weights, so that what they write is what one alone would have written.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from allyouneed.align.rewards import Reward, name_of, scored
from allyouneed.align.samplers import Sampler
from allyouneed.generate.language_model import Completion, Sampling, Turns, samplings_of

Value = TypeVar("Value")


class Ranks(Protocol):
    """Processes that all do the same (`train.ranks`)."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""

    @property
    def world(self) -> int:
        """How many there are."""

    def every(self, value: Value) -> list[Value]:
        """What each was given, in order."""

    def told(self, value: Value) -> Value:
        """What the first was given."""

    def alike(self) -> AbstractContextManager[None]:
        """Within, what is wrong for one is raised on all."""


class SharedSampler:
    """A `Sampler` of which each rank writes every n-th answer with its own.

    Args:
        own: this rank's.
        ranks: all of them.
    """

    def __init__(self, own: Sampler, ranks: Ranks) -> None:
        self.own, self.ranks = own, ranks

    def prompt_ids(self, prompt: Turns) -> list[int]:
        """As of the model."""
        return self.own.prompt_ids(prompt)

    def complete(self, prompts: Sequence[Turns], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """Those of all ranks, in order.

        Raises:
            InputError: one rank's, on all of them.
        """
        samplings, mine = samplings_of(sampling, len(prompts)), list[Completion]()
        rank, world = self.ranks.rank, self.ranks.world
        with self.ranks.alike():
            mine = self.own.complete(prompts[rank::world], samplings[rank::world])
        return interleaved(self.ranks.every(mine))

    def renew(self) -> None:
        """The weights have changed, on this rank as on all."""
        self.own.renew()


class SharedReward:
    """A reward that the first rank asks for all, since a judge is paid for and may not say the same twice."""

    def __init__(self, reward: Reward, ranks: Ranks) -> None:
        self.reward, self.name, self.ranks = reward, name_of(reward), ranks

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[str]) -> list[float]:
        """The scores, the same on all ranks.

        Raises:
            InputError: the first rank's, on all of them.
        """
        found = list[float]()
        with self.ranks.alike():
            if self.ranks.rank == 0:
                found = scored(self.reward, prompts, completions)
        return self.ranks.told(found)


def interleaved(shares: Sequence[Sequence[Value]]) -> list[Value]:
    """The whole of which share i is every n-th from the i-th on.

    >>> interleaved([["a", "c"], ["b"]])
    ['a', 'b', 'c']
    """
    longest = len(shares[0]) if shares else 0
    return [share[k] for k in range(longest) for share in shares if k < len(share)]
