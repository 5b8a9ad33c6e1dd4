"""Requests that the engine of this process answers as they come, and the texts that grow of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from allyouneed.core.errors import InputError
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.generate.language_model import Answer, Completion, Sampling, Turns
from allyouneed.generate.requests import Request, RequestError, Step
from allyouneed.generate.stopping import StopStrings

if TYPE_CHECKING:
    from allyouneed.generate.local import LocalModel


class Writing:
    """What was made of one prompt so far. `text.push` is asked by the engine whether it ends."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling) -> None:
        self.prompt, self.reason = prompt, "length"
        self.text = StopStrings(tokenizer.stream(), sampling.stop, sampling.min_tokens)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []

    def hear(self, step: Step) -> None:
        """One token more."""
        self.tokens.append(step.token)
        self.logprobs.append(step.logprob)
        self.reason = step.finish_reason or self.reason

    def completion(self) -> Completion:
        """All of it."""
        return Completion(
            text=self.text.finish(),
            finish_reason=self.reason,
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.tokens),
            token_ids=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
        )


class LocalQueue:
    """Satisfies `Queue`. It has the engine to itself as long as anything is under way.

    Raises:
        InputError: others are being answered.
    """

    def __init__(self, lm: LocalModel) -> None:
        if not lm.engine.idle:
            raise InputError(f"{lm.name}: other prompts are being answered; end them first")
        self.lm, self.width = lm, lm.engine.config.max_batch
        self._under_way: dict[int, tuple[int, Writing]] = {}  # by the engine's number
        self._ready: dict[int, Answer] = {}

    def ask(self, number: int, prompt: Turns, sampling: Sampling) -> None:
        """Have a prompt wait its turn."""
        ids = self.lm.prompt_ids(prompt)
        writing = Writing(self.lm.tokenizer, ids, sampling)
        if sampling.max_new_tokens:
            guide = self.lm.guide(sampling)
            adapter = self.lm.adapter
            request = Request(ids=ids, sampling=sampling, stop=writing.text.push, guide=guide, adapter=adapter)
            self._under_way[self.lm.engine.add(request)] = number, writing
        else:
            self.lm.engine.check(ids, 0)
            self._ready[number] = writing.completion()

    def answers(self) -> dict[int, Answer]:
        """Those that are done, at least one as long as any is under way."""
        while self._under_way and not self._ready:
            assert not self.lm.engine.idle, "somebody else took this queue's steps"
            try:
                for step in self.lm.engine.step():
                    self._hear(step)
            except RequestError as error:
                self._give_up(error)
        ready, self._ready = self._ready, {}
        return ready

    def stop(self) -> None:
        """Forget all that is not done."""
        for number in self._under_way:
            self.lm.engine.cancel(number)
        self._under_way = {}

    def _give_up(self, error: RequestError) -> None:
        """What went wrong with one prompt is its answer; a fault of ours ends all."""
        if not isinstance(error.cause, InputError):
            raise error.cause
        self.lm.engine.cancel(error.request)  # what it still says of it
        number, _ = self._under_way.pop(error.request)
        self._ready[number] = error.cause

    def _hear(self, step: Step) -> None:
        number, writing = self._under_way[step.request]
        writing.hear(step)
        if step.finish_reason:
            del self._under_way[step.request]
            self._ready[number] = writing.completion()
