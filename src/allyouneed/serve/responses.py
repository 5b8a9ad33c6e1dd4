"""POST /v1/responses: one answer, as items and as events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from typing_extensions import TypedDict

from allyouneed.generate.requests import Step
from allyouneed.serve.answering import EventStream, warned, whole
from allyouneed.serve.answers import Delta, TokenLogprob, identity
from allyouneed.serve.chat import Talk, check_fields, planned
from allyouneed.serve.documents import described
from allyouneed.serve.response_schemas import ResponseFields, as_chat, by_response_names
from allyouneed.serve.schemas import ignored
from allyouneed.serve.service import Here
from allyouneed.serve.strict import StrictRoute
from allyouneed.serve.turns import chat_logprobs

router = APIRouter(route_class=StrictRoute)
Object = dict[str, Any]


class ResponseAnswer(TypedDict):
    """The answer; `output` holds messages and function calls."""

    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[Object]
    incomplete_details: Object | None
    usage: Object | None


class ResponseEvent(TypedDict):
    """One event, of the type that its name says."""

    type: str
    sequence_number: int


@router.post("/v1/responses", **described(ResponseAnswer, ResponseEvent))
async def responses(fields: ResponseFields, request: Request, service: Here) -> Response:
    """Answer a text or a conversation; nothing of it is kept."""
    served, headers = service.find(fields.model), warned(ignored(fields))
    with by_response_names(fields):
        chat = as_chat(fields)
        check_fields(chat)
        plan = await planned(served, chat)
        generation = served.generation(plan.requests, special=plan.special)
        await service.start(generation, "messages")
    reply = Reply(fields, Talk(served, chat, plan, generation))
    if fields.stream:
        seconds = service.settings.send_seconds
        return EventStream(reply.events(), generation, headers=headers, send_seconds=seconds, named=True)
    return await whole(request, generation, reply.answer(), headers)


class Reply:
    """One response in the making: the deltas of a chat, sorted into items."""

    def __init__(self, fields: ResponseFields, talk: Talk) -> None:
        self.fields, self.talk, self.turn = fields, talk, talk.turns[0]
        self.id, self.created, self.output = identity("resp_"), int(time.time()), list[Object]()
        self.waiting: list[Step] = []  # whose log-probabilities were not told yet
        self.number = 0

    async def answer(self) -> Object:
        """The whole of it."""
        async for _ in self.events():
            pass
        return self._object(self._status())

    async def events(self) -> AsyncIterator[Object]:
        """It as it comes."""
        yield self._event("response.created", response=self._object("in_progress"))
        yield self._event("response.in_progress", response=self._object("in_progress"))
        async for news in self.talk.generation.news():
            if self.talk.fields.logprobs:
                self.waiting += news.steps
            for delta in self.talk.hear(news):
                for event in self._added(delta):
                    yield event
        for event in self._closed():
            yield event
        status = self._status()
        yield self._event(f"response.{status}", response=self._object(status))

    def _added(self, delta: Delta) -> Iterator[Object]:
        if "content" in delta:
            if not self.output or self.output[-1]["type"] != "message":
                yield from self._opened(_message())
                part = self.output[-1]["content"][0]
                yield self._event("response.content_part.added", **self._here(), content_index=0, part=dict(part))
            yield self._said(delta["content"])
        for call in delta.get("tool_calls", []):
            if "id" in call:
                yield from self._opened(_call(call["id"], call["function"]["name"]))
            elif call["function"]["arguments"]:
                self.output[-1]["arguments"] += call["function"]["arguments"]
                piece = call["function"]["arguments"]
                yield self._event("response.function_call_arguments.delta", **self._here(), delta=piece)

    def _said(self, text: str) -> Object:
        part = self.output[-1]["content"][0]
        part["text"] += text
        logprobs = self._logprobs()
        part["logprobs"] += logprobs
        return self._event("response.output_text.delta", **self._here(), content_index=0, delta=text, logprobs=logprobs)

    def _opened(self, item: Object) -> Iterator[Object]:
        yield from self._closed()
        self.output.append(item)
        shown = item | ({"content": []} if item["type"] == "message" else {})
        yield self._event("response.output_item.added", output_index=len(self.output) - 1, item=shown)

    def _closed(self) -> Iterator[Object]:
        if not self.output or self.output[-1]["status"] != "in_progress":
            return
        item = self.output[-1]
        cut = self.turn.finish_reason == "length"
        item["status"] = "incomplete" if cut else "completed"
        if item["type"] == "message":
            part = item["content"][0]
            part["logprobs"] += self._logprobs()
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", **self._here(), content_index=0, **told)
            yield self._event("response.content_part.done", **self._here(), content_index=0, part=part)
        else:
            arguments = {"arguments": item["arguments"], "name": item["name"]}
            yield self._event("response.function_call_arguments.done", **self._here(), **arguments)
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _here(self) -> Object:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _logprobs(self) -> Sequence[TokenLogprob]:
        told, self.waiting = self.waiting, []
        return chat_logprobs(self.talk.served, told)["content"]

    def _event(self, kind: str, **fields: Any) -> Object:
        self.number += 1
        return {"type": kind, "sequence_number": self.number - 1, **fields}

    def _status(self) -> str:
        return "incomplete" if self.turn.finish_reason == "length" else "completed"

    def _object(self, status: str) -> Object:
        fields, done = self.fields, status != "in_progress"
        usage = self.talk.usage()
        counts = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        sent = fields.model_dump(
            include={"instructions", "max_output_tokens", "temperature", "top_p", "user"}, exclude_none=False
        )
        return sent | {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.talk.served.name,
            "output": list(self.output),
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "text": {"format": _format(fields)},
            "tool_choice": _dumped(fields.tool_choice) or "auto",
            "tools": [_dumped(tool) for tool in fields.tools or []],
            "truncation": "disabled",
            "usage": counts if done else None,
            "metadata": fields.metadata or {},
        }


def _message() -> Object:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"id": identity("msg_"), "type": "message", "role": "assistant", "status": "in_progress", "content": [part]}


def _call(call_id: str, name: str) -> Object:
    made = {"id": identity("fc_"), "type": "function_call", "status": "in_progress"}
    return made | {"call_id": call_id, "name": name, "arguments": ""}


def _format(fields: ResponseFields) -> Object:
    form = fields.text.format if fields.text else None
    return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)


def _dumped(value: Any) -> Any:
    return value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value
