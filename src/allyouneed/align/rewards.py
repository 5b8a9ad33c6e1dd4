"""Rewards: how good an answer is, said by whatever can be called with prompts and completions.

Holds the protocol, how what is wrong with a reward is named, and rewards that are made of others. Models, judges and
files that give rewards are in `align.graders`; what a policy makes of a score, `align.rollouts` says.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from allyouneed.core.errors import InputError, RemoteError, brief
from allyouneed.generate.language_model import Turns

Function = Callable[[Turns, str], float]  # of one prompt and its completion


class Reward(Protocol):
    """Scores of completions, one each; the higher the better. A function of two lists will do."""

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[str]) -> Sequence[float]:
        """(n), (n) -> n numbers."""


def scored(reward: Reward, prompts: Sequence[Turns], completions: Sequence[str]) -> list[float]:
    """What a reward says, held to be one finite number for each completion.

    Raises:
        InputError: it raised something, or gave something else; names reward, prompt and completion.

    >>> scored(EachOf(lambda prompt, completion: len(completion)), ["a", "a"], ["b", "bb"])
    [1.0, 2.0]
    >>> scored(EachOf(lambda prompt, completion: float("nan"), "mine"), ["a"], ["b"])
    Traceback (most recent call last):
    allyouneed.core.errors.InputError: reward mine: gave nan for the completion 'b' of the prompt 'a'; ...
    """
    name = name_of(reward)
    try:
        found = list(reward(prompts, completions))
    except (InputError, RemoteError):
        raise
    except Exception as error:
        first = shown(prompts[0], completions[0]) if prompts else "none"
        raise InputError(f"reward {name}: {said(error)}, among {len(prompts)} completions, first {first}") from error
    if len(found) != len(prompts):
        raise InputError(f"reward {name}: {len(found)} scores for {len(prompts)} completions; one for each is needed")
    for prompt, completion, score in zip(prompts, completions, found, strict=True):
        _check(name, prompt, completion, score)
    return [float(score) for score in found]


def name_of(reward: Reward) -> str:
    """What a reward is called in messages: its `name`, or that of the function."""
    kind = type(reward).__name__
    return str(getattr(reward, "name", getattr(reward, "__name__", kind)))


class EachOf:
    """The reward of a function of one prompt and one completion.

    >>> EachOf(lambda prompt, completion: float(completion.startswith(prompt)))(["a", "b"], ["ab", "ab"])
    [1.0, 0.0]
    """

    def __init__(self, function: Function, name: str | None = None) -> None:
        self.function, self.name = function, name or getattr(function, "__name__", "function")

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[str]) -> list[float]:
        """The function's scores, in order."""
        return [self._score(*pair) for pair in zip(prompts, completions, strict=True)]

    def _score(self, prompt: Turns, completion: str) -> float:
        try:
            return self.function(prompt, completion)
        except Exception as error:
            raise InputError(f"reward {self.name}: {said(error)}, for {shown(prompt, completion)}") from error


class Clipped:
    """A reward no lower and no higher than so much.

    >>> Clipped(EachOf(lambda prompt, completion: 9.0), -1.0, 1.0)(["a"], ["b"])
    [1.0]
    """

    def __init__(self, reward: Reward, lowest: float, highest: float) -> None:
        self.reward, self.name, self.lowest, self.highest = reward, name_of(reward), lowest, highest

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[str]) -> list[float]:
        """The scores, those beyond put at the bounds."""
        return [min(max(x, self.lowest), self.highest) for x in scored(self.reward, prompts, completions)]


class Normalised:
    """A reward shifted and scaled so that some answers have mean 0 and deviation 1: those of the policy that training
    begins with (Ziegler et al. 2019, sec. 2.1), or demonstrations (Ouyang et al. 2022, sec. 3.5, the mean alone).

    >>> half = Normalised.on(EachOf(lambda prompt, completion: len(completion)), ["a", "a"], ["b", "bbb"])
    >>> half(["a"], ["bbb"])
    [1.0]
    """

    def __init__(self, reward: Reward, mean: float, deviation: float = 1.0) -> None:
        if not deviation > 0:
            raise InputError(f"reward {name_of(reward)}: deviation {deviation}; it tells the answers not apart")
        self.reward, self.name, self.mean, self.deviation = reward, name_of(reward), mean, deviation

    @classmethod
    def on(cls, reward: Reward, prompts: Sequence[Turns], completions: Sequence[str]) -> Normalised:
        """By the mean and deviation of these answers.

        Raises:
            InputError: all have the same score.
        """
        found = scored(reward, prompts, completions)
        return cls(reward, statistics.fmean(found), statistics.pstdev(found))

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[str]) -> list[float]:
        """The scores, shifted and scaled."""
        return [(x - self.mean) / self.deviation for x in scored(self.reward, prompts, completions)]


def text_of(prompt: Turns) -> str:
    """A prompt as one text: a conversation as its turns, each with its role."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"


def shown(prompt: Turns, completion: str) -> str:
    """An answer as a message names it."""
    asked = prompt if isinstance(prompt, str) else json.dumps(list(prompt), ensure_ascii=False)
    return f"the completion {brief(completion)} of the prompt {brief(asked)}"


def _check(name: str, prompt: Turns, completion: str, score: Any) -> None:
    try:
        fine = math.isfinite(score)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of tensors of several numbers
        fine = False
    if not fine:
        answer = shown(prompt, completion)
        raise InputError(f"reward {name}: gave {brief(score)} for {answer}; a finite number is needed")
