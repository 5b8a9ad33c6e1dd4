"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from allyouneed.core.errors import InputError
from allyouneed.generate.requests import Guide, Step
from allyouneed.generate.requests import Request as Asked
from allyouneed.serve.answering import EventStream, warned, whole
from allyouneed.serve.answers import ChatAnswer, ChatChunk, ChunkChoice, Delta, Usage, envelope, usage
from allyouneed.serve.asked import client_of, template_messages, template_tools, text_sampling
from allyouneed.serve.calling import call_schema, calling_grammar
from allyouneed.serve.documents import described
from allyouneed.serve.driver import Generation, News
from allyouneed.serve.errors import ApiError, refused
from allyouneed.serve.schemas import ChatFields, NamedTool, ResponseFormat, StreamOptions, Tool, ignored
from allyouneed.serve.served import Served, spread_seeds
from allyouneed.serve.service import Here
from allyouneed.serve.strict import StrictRoute
from allyouneed.serve.tools import Reader
from allyouneed.serve.turns import Turn, chat_logprobs

router = APIRouter(route_class=StrictRoute)
NO_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "template")


@router.post("/v1/chat/completions", **described(ChatAnswer, ChatChunk))
async def chat_completions(fields: ChatFields, request: Request, service: Here) -> Response:
    """Answer a conversation, through the model's own chat template."""
    served, headers = service.find(fields.model), warned(ignored(fields))
    check_fields(fields)
    plan = await planned(served, fields)
    generation = served.generation(plan.requests, special=plan.special)
    await service.start(generation, "messages")
    talk = Talk(served, fields, plan, generation)
    if fields.stream:
        return EventStream(talk.chunks(), generation, headers=headers, send_seconds=service.settings.send_seconds)
    return await whole(request, generation, talk.answer(), headers)


@dataclass(frozen=True)
class Plan:
    """What the engine is asked for, and how to read what it gives."""

    requests: Sequence[Asked]
    tools: Sequence[Tool]  # that the model was told of
    forced: bool = False  # a guide lets nothing but a call be written
    special: bool = False


class Talk:
    """One chat completion: all its turns."""

    def __init__(self, served: Served, fields: ChatFields, plan: Plan, generation: Generation) -> None:
        self.served, self.fields, self.plan, self.generation = served, fields, plan, generation
        self.turns = [self._turn() for _ in plan.requests]

    async def answer(self) -> ChatAnswer:
        """The whole of it."""
        steps: list[list[Step]] = [[] for _ in self.turns]
        async for news in self.generation.news():
            self.hear(news)
            steps[news.index] += news.steps
        choices = [
            {
                "index": i,
                "message": turn.message(),
                "logprobs": chat_logprobs(self.served, steps[i]) if self.fields.logprobs else None,
                "finish_reason": turn.finish_reason,
            }
            for i, turn in enumerate(self.turns)
        ]
        whole: Any = envelope("chatcmpl-", "chat.completion", self.served.name)
        answer: ChatAnswer = whole | {"choices": choices, "usage": self.usage()}
        return answer

    async def chunks(self) -> AsyncIterator[ChatChunk]:
        """It as it comes."""
        counted = bool(self.fields.stream_options and self.fields.stream_options.include_usage)
        frame: Any = envelope("chatcmpl-", "chat.completion.chunk", self.served.name)
        frame |= {"usage": None} if counted else {}
        waiting: list[list[Step]] = [[] for _ in self.turns]  # whose log-probabilities were not told yet
        for i in range(len(self.turns)):
            yield frame | {"choices": [_choice(i, {"role": "assistant", "content": ""})]}
        async for news in self.generation.news():
            i, turn = news.index, self.turns[news.index]
            waiting[i] += news.steps
            deltas = self.hear(news)
            last: list[Delta] = [{}] if turn.finish_reason else []
            for delta in [*deltas, *last]:
                choice = _choice(i, delta)
                if self.fields.logprobs and waiting[i]:
                    choice["logprobs"], waiting[i] = chat_logprobs(self.served, waiting[i]), []
                choice["finish_reason"] = None if delta else turn.finish_reason
                yield frame | {"choices": [choice]}
        if counted:
            yield frame | {"choices": [], "usage": self.usage()}

    def hear(self, news: News) -> list[Delta]:
        """What `news` adds; a turn of which enough was heard is ended."""
        turn = self.turns[news.index]
        deltas = turn.hear(news)
        if turn.finish_reason and not news.finish_reason:
            self.generation.end(news.index)
        return deltas

    def _turn(self) -> Turn:
        if not self.plan.tools or self.served.form is None:
            return Turn()
        reader = Reader(self.served.form, forced=self.plan.forced)
        return Turn(reader, forced=self.plan.forced, parallel=self.fields.parallel_tool_calls is not False)

    def usage(self) -> Usage:
        """Tokens read and made so far."""
        cached = min((turn.cached for turn in self.turns if turn.cached is not None), default=0)
        return usage(len(self.plan.requests[0].ids), sum(turn.tokens for turn in self.turns), cached)


async def planned(served: Served, fields: ChatFields) -> Plan:
    """What a chat asks of the engine.

    Raises:
        ApiError: names the field that is at fault.
    """
    tools, forced = _tools(served, fields)
    ids = await conversation(served, fields, tools)
    asked = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    most = served.fit(len(ids), asked, name, "messages")
    sampling = text_sampling(fields, most, served.tokenizer.vocab_size)
    asking = Asked(
        ids=ids,
        sampling=sampling,
        priority=fields.priority or 0,
        client=client_of(fields),
        top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else 0,
    )
    requests = [
        replace(asking, sampling=one, guide=await _guide(served, fields, tools, forced))
        for one in spread_seeds(sampling, fields.n or 1)
    ]
    special = bool(tools) and served.form is not None and served.form.special
    return Plan(requests, tools, forced, special)


async def conversation(served: Served, fields: Any, tools: Sequence[Tool], *, bounded: bool = True) -> list[int]:
    """The ids of the messages, and of the tools that the model is told of; `bounded`, as many as the context holds."""
    variables = dict(getattr(fields, "chat_template_kwargs", None) or {})
    for name in variables:
        if name in NO_VARIABLES:
            raise ApiError(f"chat_template_kwargs.{name}: has a field of its own", param="chat_template_kwargs")
    if tools:
        variables["tools"] = template_tools(tools)
    try:
        param = "messages" if bounded else None
        return await served.chat_ids(template_messages(fields.messages), variables, param)
    except InputError as error:
        raise refused("messages", error) from None


async def format_guide(served: Served, form: ResponseFormat | None, param: str) -> Guide | None:
    """The guide of a response format; None where any text is right."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return await served.guide(lambda guides: guides.json_object(), param)
    schema = form.json_schema.schema_ if form.json_schema else None
    if schema is None:
        where = f"{param}.json_schema.schema"
        raise ApiError(f"{where}: is missing", param=where)
    return await served.guide(lambda guides: guides.json_schema(schema), param)


async def _guide(served: Served, fields: ChatFields, tools: Sequence[Tool], forced: bool) -> Guide | None:
    form = served.form
    if not forced and form and any(tool.function.strict for tool in tools):
        return await served.guide(lambda guides: guides.grammar(calling_grammar(tools, form)), "tools")
    if not forced:
        return await format_guide(served, fields.response_format, "response_format")
    choice = fields.tool_choice
    wanted = [tool for tool in tools if not isinstance(choice, NamedTool) or tool.function.name == choice.function.name]
    return await served.guide(lambda guides: guides.json_schema(call_schema(wanted)), "tools")


def _tools(served: Served, fields: ChatFields) -> tuple[Sequence[Tool], bool]:
    """The tools that the model is told of, and whether it must call one."""
    choice, tools = fields.tool_choice, fields.tools or []
    forced = choice == "required" or isinstance(choice, NamedTool)
    if forced and not tools:
        raise ApiError("tool_choice: needs tools to choose from", param="tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in [tool.function.name for tool in tools]:
        raise ApiError(f"tool_choice: no tool is called {choice.function.name[:64]!r}", param="tool_choice")
    if not tools or choice == "none":
        return [], False
    if served.form is None:
        said = f"tools: the chat template of {served.name} takes none; serve a model tuned for tools"
        raise ApiError(said, param="tools")
    for i, tool in enumerate(tools):
        if tool.function.strict and not forced and not served.form.plain:
            param = f"tools[{i}].function.strict"
            said = (
                "this model marks the end of a call by no plain text; tool_choice required or a named function keeps it"
            )
            raise ApiError(f"{param}: {said}", param=param)
    return tools, forced


def check_fields(fields: ChatFields) -> None:
    """Refuse fields that contradict each other."""
    check_stream(fields.stream, fields.stream_options)
    if fields.top_logprobs and not fields.logprobs:
        raise ApiError("top_logprobs: needs logprobs", param="top_logprobs")
    both = (fields.max_tokens, fields.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise ApiError("max_tokens: differs from max_completion_tokens; set one of them", param="max_tokens")
    formed = fields.response_format is not None and fields.response_format.type != "text"
    if formed and fields.tools and fields.tool_choice != "none":
        raise ApiError("response_format: holds the answer, not calls; set tool_choice none", param="response_format")


def check_stream(stream: bool | None, options: StreamOptions | None) -> None:
    """Refuse options of a stream where there is none."""
    if options is not None and not stream:
        raise ApiError("stream_options: needs stream", param="stream_options")


def _choice(index: int, delta: Delta) -> ChunkChoice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
