"""Rewards: how good an answer is, from a function, a program, a model of rewards or a judge, all asked alike.

Holds who is asked and how a wrong answer of theirs is named. What a policy makes of a score, `align.rollouts` says.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from allyouneed.core.errors import InputError, RemoteError, brief
from allyouneed.generate.language_model import LanguageModel, Sampling, Turns

Function = Callable[[Turns, str], float]  # of one prompt and its completion

GRADED = """You grade answers. Read the request and the answer, and judge how well the answer does what was asked.

[Request]
{prompt}

[Answer]
{completion}

Give a grade from {lowest} (of no use) to {highest} (perfect). Write the number alone."""


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
        first = _shown(prompts[0], completions[0]) if prompts else "none"
        raise InputError(f"reward {name}: {_said(error)}, among {len(prompts)} completions, first {first}") from error
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
            raise InputError(f"reward {self.name}: {_said(error)}, for {_shown(prompt, completion)}") from error


class Judge:
    """The reward of a language model that is asked for a grade: any of `LanguageModel`, mostly a remote one.

    Zheng et al. 2023 (arXiv:2306.05685, sec. 3.1, single answer grading). The first number of what it says counts; one
    that says none is asked `tries` times, the first time greedily.

    Args:
        lm: the judge.
        template: with {prompt}, {completion}, {lowest} and {highest}; asked as the user's turn of a conversation.
        lowest: the worst grade there is.
        highest: the best.
        tries: how often it is asked before it is given up.
    """

    def __init__(
        self, lm: LanguageModel, template: str = GRADED, *, lowest: float = 1, highest: float = 10, tries: int = 3
    ) -> None:
        for field in ("{prompt}", "{completion}"):
            if field not in template:
                raise InputError(f"judge {lm.name}: the template has no {field}; it would not see what it grades")
        self.lm, self.name, self.template, self.tries = lm, f"judge {lm.name}", template, tries
        self.lowest, self.highest = lowest, highest

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[str]) -> list[float]:
        """Grades, in order.

        Raises:
            InputError: no grade came of a completion, `tries` times.
        """
        grades: dict[int, float] = {}
        for attempt in range(self.tries):
            left = [i for i in range(len(prompts)) if i not in grades]
            asked: list[Turns] = [[{"role": "user", "content": self._text(prompts[i], completions[i])}] for i in left]
            sampling = Sampling(max_new_tokens=16, temperature=float(attempt > 0), seed=attempt)
            for i, answer in zip(left, self.lm.complete(asked, sampling) if left else (), strict=True):
                grade = self._grade(answer.text)
                if grade is not None:
                    grades[i] = grade
                elif attempt + 1 == self.tries:
                    shown = _shown(prompts[i], completions[i])
                    raise InputError(f"reward {self.name}: {brief(answer.text)} is no grade, for {shown}")
        return [grades[i] for i in range(len(prompts))]

    def _text(self, prompt: Turns, completion: str) -> str:
        values = {"prompt": text_of(prompt), "completion": completion}
        values |= {"lowest": f"{self.lowest:g}", "highest": f"{self.highest:g}"}
        return re.sub(r"\{(prompt|completion|lowest|highest)\}", lambda found: values[found[1]], self.template)

    def _grade(self, text: str) -> float | None:
        found = re.search(r"-?\d+(\.\d+)?", text)
        grade = None if found is None else float(found[0])
        return grade if grade is not None and self.lowest <= grade <= self.highest else None


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


def from_file(path: Path | str) -> Reward:
    """The reward that a Python file defines: `reward(prompt, completion)` of one, or `rewards(prompts, completions)` of
    lists. The file is run, as a program of whoever names it.

    Raises:
        InputError: it cannot be run, or defines neither.
    """
    path = Path(path)
    defined = _run(path)
    many, one = defined.get("rewards"), defined.get("reward")
    if callable(many):
        many.__dict__.setdefault("name", f"{path}: rewards")
        return many  # type: ignore[no-any-return]
    if callable(one):
        return EachOf(one, f"{path}: reward")
    raise InputError(f"{path}: defines no reward(prompt, completion) and no rewards(prompts, completions)")


def text_of(prompt: Turns) -> str:
    """A prompt as one text: a conversation as its turns, each with its role."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _run(path: Path) -> dict[str, Any]:
    """The names that a file defines."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; a Python file with a function `reward` is wanted")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: a Python file is wanted, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path}: {_said(error)}") from error
    return vars(module)


def _check(name: str, prompt: Turns, completion: str, score: Any) -> None:
    try:
        fine = math.isfinite(score)
    except TypeError:
        fine = False
    if not fine:
        shown = _shown(prompt, completion)
        raise InputError(f"reward {name}: gave {brief(score)} for {shown}; a finite number is needed")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"


def _shown(prompt: Turns, completion: str) -> str:
    asked = prompt if isinstance(prompt, str) else json.dumps(list(prompt), ensure_ascii=False)
    return f"the completion {brief(completion)} of the prompt {brief(asked)}"
