"""The one way to ask a language model. Whoever asks knows only this protocol; local and remote models satisfy it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, TypedDict, runtime_checkable

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError, RemoteError, unknown

if TYPE_CHECKING:
    import numpy as np


class AccessError(InputError):
    """Not what is asked is wrong but who asks, or whom: a key is refused, a model unknown. All else will fail alike."""


class LateError(RemoteError):
    """No answer came in time from a server that is well: asked again, it would work as long, and be paid once more."""


class Message(TypedDict):
    """One turn of a conversation: `role` is system, user or assistant."""

    role: str
    content: str


MOST = 1e9  # of penalties, biases and temperatures: what they make of logits stays a float32
Turns = str | Sequence[Message]  # a text to continue, or a conversation to answer


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How the next token is chosen and when to stop. The filters apply in the order in which they stand here."""

    max_new_tokens: int = 128
    min_tokens: int = 0  # so many come first: no end token is chosen before, no stop string ends the text
    repetition_penalty: float = 1.0  # > 1 makes tokens already seen less likely (Keskar et al. 2019, sec. 4.1)
    frequency_penalty: float = 0.0  # taken from a token's logit for each time it was generated (OpenAI's definition)
    presence_penalty: float = 0.0  # taken once from the logit of a token that was generated at all
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # keep the likeliest that together reach p (Holtzman et al. 2020)
    min_p: float = 0.0  # keep those at least min_p times as likely as the likeliest
    seed: int | None = None  # None: a new one each time
    stop: tuple[str, ...] = ()  # strings that end the text; they are not part of it
    ignore_eos: bool = False
    json_schema: str = ""  # the text is JSON that satisfies this schema, itself JSON (`generate.guides`)
    regex: str = ""  # the text matches this as a whole

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name, valid, right in (
            ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_new_tokens, f"0 to max_new_tokens={self.max_new_tokens}"),
            ("repetition_penalty", 1 / MOST <= self.repetition_penalty <= MOST, f"{1 / MOST} to {MOST}"),
            ("frequency_penalty", abs(self.frequency_penalty) <= MOST, f"{-MOST} to {MOST}"),
            ("presence_penalty", abs(self.presence_penalty) <= MOST, f"{-MOST} to {MOST}"),
            ("logit_bias", all(abs(bias) <= MOST for _, bias in self.logit_bias), f"of numbers from {-MOST} to {MOST}"),
            ("temperature", 0 <= self.temperature <= MOST, f"0 (greedy) to {MOST}"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("regex", not (self.regex and self.json_schema), "alone, without json_schema"),
        ):
            if not valid:
                raise InputError(f"sampling: {name}={getattr(self, name)!r}; it must be {right}")


@dataclass(frozen=True)
class Completion:
    """What came back for one prompt; of a conversation, the assistant's answer."""

    text: str
    finish_reason: str  # "stop" (end token, stop string, guided text whole), "length", or "error": a guide gave up
    prompt_tokens: int
    completion_tokens: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # natural log-probability of each token under the unfiltered distribution


Answer = Completion | InputError | RemoteError  # an error: what went wrong with this one alone, or with all


class Queue(Protocol):
    """Prompts that are answered as they come, in no order. One asker's."""

    width: int  # so many are under way at once; the others wait

    def ask(self, number: int, prompt: Turns, sampling: Sampling) -> None:
        """Have a prompt answered; `answers` tells of it by `number`.

        Raises:
            InputError: it is wrong. The others go on.
        """

    def answers(self) -> Mapping[int, Answer]:
        """Wait for those that come next; none where nothing is under way."""

    def stop(self) -> None:
        """Begin nothing more: what waits is forgotten. What has begun may still come."""


@runtime_checkable
class LanguageModel(Protocol):
    """What every model can be asked, wherever it runs."""

    name: str

    def complete(self, prompts: Sequence[Turns], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """One completion per prompt, in order: a text is continued, a conversation answered.

        Args:
            prompts: any number.
            sampling: one for each prompt; or one for all, prompt i then drawing from `seed + i`.
        """

    def queue(self) -> Queue:
        """Answers prompts as they come, for who has more of them than fit the memory."""

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Pieces of the completion's text as they come; joined they equal `complete`'s text."""

    def chat_stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """Pieces of the assistant's answer as they come."""

    def generate(self, prompts: Sequence[str], **sampling: object) -> list[str]:
        """The completions' texts; keywords are fields of `Sampling`."""

    def chat(self, messages: Sequence[Message], **sampling: object) -> str:
        """The assistant's answer, through the checkpoint's own chat template."""

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """Summed natural log-probability of each continuation given its prompt."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32 vectors of unit length."""


@runtime_checkable
class CountsTokens(Protocol):
    """A language model that can say how many tokens a text has."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text alone has, none added in front."""


def spread(sampling: Sampling, i: int) -> Sampling:
    """`sampling` as number `i` of several answers has it: with a seed it draws from `seed + i`.

    >>> spread(Sampling(seed=5), 2).seed
    7
    """
    return sampling if sampling.seed is None else sampling.replace(seed=sampling.seed + i)


def samplings_of(sampling: Sampling | Sequence[Sampling], count: int) -> list[Sampling]:
    """One for each of `count` prompts, as `complete` has them.

    >>> [one.seed for one in samplings_of(Sampling(seed=5), 3)]
    [5, 6, 7]

    Raises:
        InputError: their number is not that of the prompts.
    """
    if isinstance(sampling, Sampling):
        return [spread(sampling, i) for i in range(count)]
    if len(sampling) != count:
        raise InputError(f"complete: {count} prompts but {len(sampling)} samplings; give one for each, or one for all")
    return list(sampling)


def sampling_from(keywords: dict[str, object]) -> Sampling:
    """`Sampling` from the keywords of `generate` and `chat`; `stop` may be one string or a list, `json_schema` a JSON
    value or its text.
    """

    names = [f.name for f in fields(Sampling)]
    for name in keywords:
        if name not in names:
            raise unknown("sampling option", name, names)
    stop = keywords.get("stop", ())
    keywords = keywords | {"stop": (stop,) if isinstance(stop, str) else tuple(stop)}  # type: ignore[arg-type]
    if not isinstance(schema := keywords.get("json_schema", ""), str):
        keywords = keywords | {"json_schema": json.dumps(schema)}
    return Sampling(**keywords)  # type: ignore[arg-type]
