"""People who compare answers, simulated: by what the answers are truly worth, and with noise that is known.

Knows numbers only: what is compared and what it is worth, a world says.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from allyouneed import core
from allyouneed.core.errors import InputError


class Labeller(core.Configured):
    """Ranks answers of true rewards r by r/temperature + Gumbel noise, or, where careless, by lot.

    So of two answers i is put before j with probability (1 − careless)·σ((rᵢ − rⱼ)/temperature) + careless/2 (Bradley &
    Terry 1952), also where both stand in a longer ranking (Luce 1959; Yellott 1977, th. 5). Temperature 0 makes no
    mistakes but the careless ones, and leaves ties to chance.

    >>> Labeller.Config(temperature=0.0).build().rank([0.2, 0.9, 0.5], random.Random(0))
    [1, 2, 0]
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`temperature` in units of the reward; half of the `careless` comparisons come out the wrong way round."""

        temperature: float = 0.1
        careless: float = 0.0

        def __post_init__(self) -> None:
            """Refuse what is no noise."""
            if not 0 <= self.temperature < math.inf:
                raise InputError(f"temperature={self.temperature}; a labeller's is 0 or more")
            if not 0 <= self.careless <= 1:
                raise InputError(f"careless={self.careless}; a share from 0 to 1 is needed")

    def __init__(self, config: Config) -> None:
        self.config = config

    def rank(self, rewards: Sequence[float], source: random.Random) -> list[int]:
        """The places of the answers, the best first."""
        places = list(range(len(rewards)))
        source.shuffle(places)
        if source.random() < self.config.careless:
            return places
        noise = [self.config.temperature * _gumbel(source) for _ in rewards]
        return sorted(places, key=lambda i: -(rewards[i] + noise[i]))

    def prefers(self, first: float, second: float, source: random.Random) -> bool:
        """Whether the first of two is held to be better."""
        return self.rank([first, second], source)[0] == 0

    def agreement(self, difference: float) -> float:
        """The probability that the better of two is preferred whose rewards differ by that much.

        >>> round(Labeller.Config(temperature=0.1, careless=0.2).build().agreement(0.1), 4)
        0.6848
        """
        gap, T = abs(difference), self.config.temperature
        sure = 1 / (1 + math.exp(-gap / T)) if T else 0.5 + 0.5 * (gap > 0)
        return (1 - self.config.careless) * sure + self.config.careless / 2


def _gumbel(source: random.Random) -> float:
    """−log(−log u), u above 0 and at most 1, at which it would be without end."""
    return -math.log(-math.log(1 - source.random()) or 1e-300)
