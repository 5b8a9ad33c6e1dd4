"""A model that is served: its text side. Prompts to ids, ids to the text of their tokens, names to what they mean.

What takes long – rendering and tokenising long texts, compiling grammars, vectors – runs in threads, a few at a time,
and never before what is short.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import anyio
import numpy as np

from allyouneed.core.errors import InputError
from allyouneed.generate.guides import Guides
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.local import LocalModel
from allyouneed.generate.local_encoder import LocalEncoder
from allyouneed.generate.requests import Guide, Request
from allyouneed.serve.driver import Driver, Generation
from allyouneed.serve.errors import ApiError, refused
from allyouneed.serve.tools import form_of

T = TypeVar("T")
SHORT = 4096  # characters that are rendered and tokenised at once, in about a millisecond
WORKERS = 2  # threads for longer texts, and as many for grammars; one more reads texts for their vectors


class Served:
    """One model by the name that clients ask for.

    Args:
        context: the most tokens of one request; None: any number.
        driver: None for a model that only makes vectors.
    """

    def __init__(
        self, lm: LocalModel | LocalEncoder, name: str, driver: Driver | None, context: int | None, most_seconds: float
    ) -> None:
        self.lm, self.name, self._driver, self.context, self.most_seconds = lm, name, driver, context, most_seconds
        self.tokenizer = lm.tokenizer
        self.form = form_of(self.tokenizer.chat_template)
        self._texts, self._grammars = anyio.CapacityLimiter(WORKERS), anyio.CapacityLimiter(WORKERS)
        self._vectors = anyio.CapacityLimiter(1)

    def with_adapter(self, name: str) -> Served:
        """The same model as one of its adapters has it: beside it in the same engine, with a name of its own.

        Raises:
            InputError: there is no such adapter.
        """
        assert isinstance(self.lm, LocalModel), "an encoder has no adapters"
        found = copy.copy(self)
        found.lm = self.lm.with_adapter(name)
        found.name = found.lm.name
        return found

    @property
    def generates(self) -> bool:
        """Whether it makes text."""
        return self._driver is not None

    @property
    def driver(self) -> Driver:
        """What generates.

        Raises:
            ApiError: nothing does; the model is an encoder.
        """
        if self._driver is None:
            raise ApiError(f"{self.name} is an encoder: it makes vectors only; ask /v1/embeddings", param="model")
        return self._driver

    def generation(self, requests: Sequence[Request], *, special: bool = False) -> Generation:
        """Requests on their way to the engine; `special`: the text of special tokens is wanted too."""
        driver, pieces = self.driver, functools.partial(self.tokenizer.stream, skip_special_tokens=not special)
        assert isinstance(self.lm, LocalModel)
        mine = [replace(request, adapter=self.lm.adapter) for request in requests]
        return Generation(driver, mine, pieces, self.most_seconds)

    async def embed(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """(n, dim), of unit length."""
        return await anyio.to_thread.run_sync(self.lm.embed_ids, rows, limiter=self._vectors)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text that may be long."""
        work = functools.partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self.aside(work, len(text))

    async def prompt_ids(self, prompt: str, param: str) -> list[int]:
        """The ids of a prompt, which stood in the field `param`; an empty one is the token that begins a text.

        Raises:
            ApiError: by its length alone it cannot fit the context.
        """
        assert isinstance(self.lm, LocalModel)
        self.check_length(prompt, param)
        return await self.aside(functools.partial(self.lm.prompt_ids, prompt), len(prompt))

    async def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], param: str | None
    ) -> list[int]:
        """The ids of a conversation, which stood in the field `param`, through the model's own template. None: however
        long it is.

        Raises:
            InputError: the template refuses it.
            ApiError: by its length alone it cannot fit the context.
        """
        if not isinstance(self.lm, LocalModel):
            raise ApiError(f"{self.name} is an encoder: it makes vectors only; ask /v1/embeddings", param="model")
        lm = self.lm

        def work() -> list[int]:
            prompt = lm.chat_prompt(messages, variables)
            if param is not None:
                self.check_length(prompt, param)
            return self.tokenizer.encode(prompt)

        return await self.aside(work, _size(messages) + _size(variables))

    async def guide(self, make: Callable[[Guides], Guide], param: str) -> Guide:
        """What `make` makes of the model's guides.

        Raises:
            ApiError: the guide cannot be made; `param` is at fault.
        """
        lm = self.lm
        assert isinstance(lm, LocalModel)
        try:
            return await anyio.to_thread.run_sync(lambda: make(lm.guides), limiter=self._grammars)
        except InputError as error:
            raise refused(param, error) from None

    async def aside(self, work: Callable[[], T], length: int = SHORT) -> T:
        """`work` on a text of `length`, in a thread where that is long."""
        if length < SHORT:
            return work()
        return await anyio.to_thread.run_sync(work, limiter=self._texts)

    def fit(self, length: int, asked: int | None, param: str, prompt: str) -> int:
        """How many tokens an answer to a prompt of `length` may have: what was asked for, or all there is room for.

        Raises:
            ApiError: the context cannot hold both. Nothing is ever cut short.
        """
        if self.context is None:
            return asked if asked is not None else 1 << 16
        if length >= self.context + (asked == 0):
            said = f"{prompt}: {length} tokens, and the context of {self.context} has no room for an answer"
            raise ApiError(f"{said}; shorten it", param=prompt, code="context_length_exceeded")
        if asked is not None and length + asked > self.context:
            said = f"{param}: {asked} and a prompt of {length} tokens exceed the context of {self.context}"
            mend = f"ask for at most {self.context - length}"
            raise ApiError(f"{said}; {mend}", param=param, code="context_length_exceeded")
        return self.context - length if asked is None else asked

    def check_length(self, text: str, param: str) -> None:
        """Refuse, before it is tokenised, a text that no tokens of this vocabulary bring into the context."""
        least = self.tokenizer.least(text) if len(text) >= SHORT else 0
        if self.context is not None and least > self.context:
            said = f"{param}: {len(text)} characters are {least} tokens at least, and the context holds {self.context}"
            raise ApiError(f"{said}; shorten it", param=param, code="context_length_exceeded")

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Refuse ids that are not in the vocabulary."""
        worst = max(ids, default=0)
        if worst >= self.tokenizer.vocab_size:
            raise ApiError(
                f"{param}: token {worst} is not in the vocabulary of {self.tokenizer.vocab_size}", param=param
            )

    def token_bytes(self, token: int) -> bytes:
        """What a token writes; a special one, how it is spelled. Of an id beyond the vocabulary nothing is known."""
        if token >= self.tokenizer.vocab_size:
            return b""
        written = self._writes[token]
        return self.tokenizer.token(token).encode() if written is None else written

    def token_name(self, token: int) -> str:
        """What a token writes; where that is no text, its bytes as OpenAI spells them: `bytes:\\xe2\\x80`."""
        written = self.token_bytes(token)
        try:
            return written.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)

    @functools.cached_property
    def _writes(self) -> Sequence[bytes | None]:
        try:
            return self.tokenizer.spelling().writes
        except InputError:  # it depends on what follows: each as if alone
            size = self.tokenizer.vocab_size
            return [self.tokenizer.decode([i], skip_special_tokens=False).encode() for i in range(size)]


def _size(value: Any) -> int:
    """About how many characters a value of JSON has, counted no further than to `SHORT`."""
    total, left = 0, [value]
    while left and total < SHORT:
        one = left.pop()
        if isinstance(one, Mapping):
            left += one.values()
        total += len(one) if isinstance(one, str) else 8
        if isinstance(one, list | tuple):
            left += one
    return total


def spread_seeds(sampling: Sampling, copies: int) -> list[Sampling]:
    """`sampling` for each of several answers to one prompt: with a seed, answer i draws from `seed + i`.

    >>> [one.seed for one in spread_seeds(Sampling(seed=5), 2)]
    [5, 6]
    """
    seed = sampling.seed
    return [sampling if seed is None else sampling.replace(seed=seed + i) for i in range(copies)]
