"""What the engine is asked for, and what comes back: token ids both, no text.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from allyouneed.generate.language_model import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from allyouneed.nn.sight import Memory

Top = tuple[tuple[int, float], ...]  # (token, natural log-probability), likeliest first


def never(token: int) -> bool:
    """A text that no token ends."""
    return False


class Guide(Protocol):
    """Says which tokens may come next, and hears which came: constrained decoding. One guide guides one request."""

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token may follow."""

    def allowed(self) -> Tensor:
        """Which tokens may come next: (V,) bool on the CPU, at least one of them true unless `finished`."""

    def take(self, token: int) -> None:
        """Go on past an allowed token.

        Raises:
            InputError: no text can go on from there; the request ends with reason "error".
        """

    def copy(self) -> Guide:
        """Another guide at the same place, which guesses are made with."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """Ids to continue, and how.

    >>> Request(ids=[1, 2], sampling=Sampling(max_new_tokens=4, temperature=0.0)).priority
    0
    """

    ids: Sequence[int]  # at least one
    sampling: Sampling  # its stop strings, and from which token on they count, are the business of `stop`
    stop: Callable[[int], bool] = never  # asked after every token but an end token, once: whether the text ends there
    guide: Guide | None = None  # which tokens may come next
    priority: int = 0  # higher first
    client: str = ""  # whose it is: turns are shared fairly between clients of one priority
    top_logprobs: int = 0  # how many of the likeliest alternatives each `Step` carries
    prompt_logprobs: bool = False  # the first `Step` carries the prompt's own log-probabilities (OpenAI's `echo`)
    memory: Memory | None = None  # what an encoder read, one row of it, for encoder–decoders
    adapter: str | None = (
        None  # who answers, of the module's adapters; None: the module as it stands when this is added
    )


class RequestError(Exception):
    """One request is over, others go on: its own `stop`, its guide or its logits raised `cause`."""

    def __init__(self, request: int, cause: Exception) -> None:
        """`request` is the number that `Engine.add` gave."""
        super().__init__(f"request {request} of the engine: {cause}")
        self.request, self.cause = request, cause


@dataclass(frozen=True)
class Step:
    """One token of one request."""

    request: int  # the number that `Engine.add` gave
    token: int
    logprob: float  # natural, under the model's own distribution, before any filter
    finish_reason: str | None  # "stop", "length" or "error" (the guide gave up) with a request's last token
    top: Top = ()  # as many as `top_logprobs`
    cached: int = 0  # tokens of the prompt that were found instead of read, with the first step
    prompt: tuple[tuple[float | None, Top], ...] | None = None  # of each prompt token; the first has no log-probability
