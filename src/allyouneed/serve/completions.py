"""POST /v1/completions: prompts continued, as text or as ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from allyouneed.core.errors import InputError
from allyouneed.generate.requests import Request as Asked
from allyouneed.generate.requests import Step, Top
from allyouneed.serve.answering import EventStream, warned, whole
from allyouneed.serve.answers import FinishReason, TextAnswer, TextChoice, TextLogprobs, Usage, envelope, usage
from allyouneed.serve.asked import client_of, text_sampling
from allyouneed.serve.chat import check_stream, format_guide
from allyouneed.serve.documents import described
from allyouneed.serve.driver import Generation, News
from allyouneed.serve.errors import ApiError, refused
from allyouneed.serve.schemas import CompletionFields, ignored
from allyouneed.serve.served import Served, spread_seeds
from allyouneed.serve.service import Here
from allyouneed.serve.strict import StrictRoute
from allyouneed.serve.turns import LEAST_LOGPROB

router = APIRouter(route_class=StrictRoute)
DEFAULT_MOST = 16  # OpenAI's
MOST_AT_ONCE = 1024  # answers of one request
MOST_ECHOED = 1 << 18  # log-probabilities of prompts in one answer, which takes some ten megabytes


@router.post("/v1/completions", **described(TextAnswer, TextAnswer))
async def completions(fields: CompletionFields, request: Request, service: Here) -> Response:
    """Continue one prompt, or several."""
    served, headers = service.find(fields.model), warned(ignored(fields))
    _check(fields)
    prompts = await _prompts(served, fields)
    requests = await _requests(served, fields, prompts)
    generation = served.generation(requests)
    await service.start(generation, "prompt")
    job = Continuations(served, fields, prompts, generation)
    if fields.stream:
        return EventStream(job.chunks(), generation, headers=headers, send_seconds=service.settings.send_seconds)
    return await whole(request, generation, job.answer(), headers)


@dataclass(frozen=True)
class Prompt:
    """What is continued."""

    ids: list[int]
    text: str


class Continuation:
    """One text in the making."""

    def __init__(self, served: Served, fields: CompletionFields, prompt: Prompt) -> None:
        self.served, self.fields, self.prompt = served, fields, prompt
        self.pieces = served.tokenizer.stream()
        self.text, self.tokens, self.summed, self.offset = "", 0, 0.0, 0
        self.finish_reason: FinishReason | None = None
        self.told: list[tuple[int, float | None, Top, int]] = []  # token, log-probability, others, offset
        self.begun, self.cached = False, 0  # tokens of its prompt that were not read for it

    def hear(self, news: News) -> str:
        """The text that `news` adds."""
        text = news.text
        if not self.begun:
            self.cached = news.steps[0].cached
        if not self.begun and self.fields.echo:
            text = self.prompt.text + text
            self._note_prompt(news.steps[0])
        self.begun = True
        if news.finish_reason:
            self.finish_reason = "length" if news.finish_reason == "length" else "stop"
        if self.fields.max_tokens == 0:  # one token was made for the engine to read the prompt, and nobody asked for it
            text, self.finish_reason = self.prompt.text, "length"
        else:
            self.tokens += len(news.steps)
            self.summed += sum(step.logprob for step in news.steps)
            for step in news.steps:
                self._note(step.token, step.logprob, step.top)
        self.text += text
        return text

    def choice(self, index: int, text: str) -> TextChoice:
        """What is told now: `text`, and the log-probabilities that were not told yet."""
        told, self.told = self.told, []
        logprobs = None if self.fields.logprobs is None else self._logprobs(told)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}

    @property
    def mean(self) -> float:
        """The mean log-probability of its tokens, by which `best_of` chooses."""
        return self.summed / max(self.tokens, 1)

    def _note_prompt(self, step: Step) -> None:
        if self.fields.logprobs is None:
            self.pieces, self.offset = self.served.tokenizer.stream(), len(self.prompt.text)
            return
        assert step.prompt is not None
        for token, (logprob, top) in zip(self.prompt.ids, step.prompt, strict=True):
            self._note(token, logprob, top)

    def _note(self, token: int, logprob: float | None, top: Top) -> None:
        if self.fields.logprobs is not None:
            self.told.append((token, logprob, top, self.offset))
            self.offset += len(self.pieces.push(token))

    def _logprobs(self, told: Sequence[tuple[int, float | None, Top, int]]) -> TextLogprobs:
        spell = self.served.token_name
        return {
            "tokens": [spell(token) for token, *_ in told],
            "token_logprobs": [None if value is None else max(value, LEAST_LOGPROB) for _, value, *_ in told],
            "top_logprobs": [
                None if value is None else {spell(i): max(v, LEAST_LOGPROB) for i, v in (*top, (token, value))}
                for token, value, top, _ in told
            ],
            "text_offset": [offset for *_, offset in told],
        }


class Continuations:
    """All texts of one request."""

    def __init__(
        self, served: Served, fields: CompletionFields, prompts: Sequence[Prompt], generation: Generation
    ) -> None:
        self.served, self.fields, self.prompts, self.generation = served, fields, prompts, generation
        self.copies = fields.best_of or fields.n or 1
        self.texts = [Continuation(served, fields, prompt) for prompt in prompts for _ in range(self.copies)]

    async def answer(self) -> TextAnswer:
        """The whole of it: of each prompt the best."""
        async for news in self.generation.news():
            self.texts[news.index].hear(news)
        kept = [text for i in range(len(self.prompts)) for text in self._best(i)]
        choices = await asyncio.to_thread(lambda: [text.choice(i, text.text) for i, text in enumerate(kept)])
        frame: Any = envelope("cmpl-", "text_completion", self.served.name)
        answer: TextAnswer = frame | {"choices": choices, "usage": self._usage()}
        return answer

    async def chunks(self) -> AsyncIterator[TextAnswer]:
        """It as it comes."""
        counted = bool(self.fields.stream_options and self.fields.stream_options.include_usage)
        frame: Any = envelope("cmpl-", "text_completion", self.served.name)
        frame |= {"usage": None} if counted else {}
        async for news in self.generation.news():
            text = self.texts[news.index]
            piece = text.hear(news)
            if piece or text.finish_reason:
                yield frame | {"choices": [text.choice(news.index, piece)]}
        if counted:
            yield frame | {"choices": [], "usage": self._usage()}

    def _best(self, prompt: int) -> list[Continuation]:
        texts = self.texts[prompt * self.copies : (prompt + 1) * self.copies]
        n = self.fields.n or 1
        return texts if n == self.copies else sorted(texts, key=lambda text: -text.mean)[:n]

    def _usage(self) -> Usage:
        copies = [self.texts[i : i + self.copies] for i in range(0, len(self.texts), self.copies)]
        cached = sum(min(text.cached for text in texts) for texts in copies)  # of copies, one reads for all
        return usage(sum(len(prompt.ids) for prompt in self.prompts), sum(text.tokens for text in self.texts), cached)


async def _prompts(served: Served, fields: CompletionFields) -> list[Prompt]:
    given: Any = fields.prompt
    several = isinstance(given, list) and (not given or not isinstance(given[0], int))
    if given == [] or (several and [] in given):
        raise ApiError("prompt: holds no text and no token", param="prompt")
    found = []
    for i, one in enumerate(given if several else [given]):
        await asyncio.sleep(0)  # many short texts are one long one
        param = f"prompt[{i}]" if several else "prompt"
        if isinstance(one, str):
            found.append(Prompt(await _ids(served, one, param), one))
        else:
            served.check_ids(one, param)
            found.append(Prompt(one, served.tokenizer.decode(one) if fields.echo else ""))
    return found


async def _ids(served: Served, text: str, param: str) -> list[int]:
    _ = served.driver  # an encoder has none, and says so
    try:
        return await served.prompt_ids(text, param)
    except InputError as error:
        raise refused(param, error) from None


async def _requests(served: Served, fields: CompletionFields, prompts: Sequence[Prompt]) -> list[Asked]:
    copies = fields.best_of or fields.n or 1
    if len(prompts) * copies > MOST_AT_ONCE:
        raise ApiError(f"n: {len(prompts)} prompts times {copies} are more than {MOST_AT_ONCE} answers", param="n")
    if fields.echo and fields.logprobs is not None:
        echoed = sum(len(prompt.ids) for prompt in prompts) * copies * (fields.logprobs + 1)
        if echoed > MOST_ECHOED:
            said = f"logprobs: {echoed} log-probabilities of the prompts, {MOST_ECHOED} at most; send fewer prompts"
            raise ApiError(said, param="logprobs")
    asked = DEFAULT_MOST if fields.max_tokens is None else fields.max_tokens
    requests = []
    for prompt in prompts:
        most = max(served.fit(len(prompt.ids), asked, "max_tokens", "prompt"), 1)
        asking = Asked(
            ids=prompt.ids,
            sampling=text_sampling(fields, most, served.tokenizer.vocab_size),
            priority=fields.priority or 0,
            client=client_of(fields),
            top_logprobs=fields.logprobs or 0,
            prompt_logprobs=bool(fields.echo and fields.logprobs is not None),
        )
        for _ in range(copies):
            guide = await format_guide(served, fields.response_format, "response_format")
            requests.append(replace(asking, guide=guide))
    seeded = spread_seeds(requests[0].sampling, len(requests))
    return [
        replace(one, sampling=one.sampling.replace(seed=sampling.seed))
        for one, sampling in zip(requests, seeded, strict=True)
    ]


def _check(fields: CompletionFields) -> None:
    """Refuse fields that contradict each other."""
    check_stream(fields.stream, fields.stream_options)
    if fields.best_of is not None and fields.best_of < (fields.n or 1):
        raise ApiError(f"best_of: {fields.best_of} is less than n={fields.n}", param="best_of")
    if fields.stream and fields.best_of is not None and fields.best_of > (fields.n or 1):
        raise ApiError("best_of: the best are known at the end only; leave out stream", param="best_of")
    if fields.max_tokens == 0 and not fields.echo:
        raise ApiError("max_tokens: 0 asks for nothing; it must be 1 or more, or with echo 0", param="max_tokens")
