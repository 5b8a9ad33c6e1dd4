"""POST /v1/responses: what it takes, and the chat that it comes to.

The two routes ask for the same things by other names. Here the names are exchanged, both ways: fields on the way in,
and the field that an error names on the way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field

from allyouneed.serve.errors import ApiError
from allyouneed.serve.schemas import TOKENS, ChatFields, Fields, JsonObject, NamedFunction, Part, SamplingFields

LOGPROBS = "message.output_text.logprobs"
PARTS = ("input_text", "output_text", "text")


class Item(Fields):
    """One item of the conversation: a message, a call, or what a call gave."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    id: str | None = None
    status: str | None = None


class FlatTool(Fields):
    """A function, its fields beside its type."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class FlatChoice(NamedFunction):
    """The function that must be called."""

    type: Literal["function"] = "function"


class TextFormat(Fields):
    """What the text looks like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Fields):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseFields(SamplingFields):
    """POST /v1/responses."""

    input: str | Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=TOKENS)] | None = None
    tools: Annotated[list[FlatTool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(fail_fast=True, max_length=8)] | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None


def as_chat(fields: ResponseFields) -> ChatFields:
    """The chat that `fields` ask for.

    >>> as_chat(ResponseFields(input="Hi", instructions="Be brief.")).messages[0].role
    'system'
    """
    same: tuple[str, ...] = (
        "model",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "user",
        "safety_identifier",
    )
    same += ("priority", "top_logprobs", "parallel_tool_calls")
    found: dict[str, Any] = {name: getattr(fields, name) for name in same}
    found |= {"messages": _messages(fields), "max_tokens": fields.max_output_tokens}
    found |= {"logprobs": LOGPROBS in (fields.include or []) or None}
    if fields.tools:
        found["tools"] = [_tool(tool) for tool in fields.tools]
    choice = fields.tool_choice
    found["tool_choice"] = {"function": {"name": choice.name}} if isinstance(choice, FlatChoice) else choice
    form = fields.text.format if fields.text else None
    if form is not None:
        found["response_format"] = {"type": form.type, "json_schema": {"schema": form.schema_}}
    return ChatFields.model_validate(found)


@contextmanager
def by_response_names(fields: ResponseFields) -> Iterator[None]:
    """Errors raised inside name the fields of this route."""
    try:
        yield
    except ApiError as error:
        if error.param is None:
            raise
        param = _renamed(error.param, 1 if fields.instructions is not None else 0)
        message = str(error).replace(error.param, param)
        raise ApiError(message, status=error.status, param=param, code=error.code) from None


def _renamed(param: str, before: int) -> str:
    """The name that a chat's field has here; `before` messages stand before the first item.

    >>> _renamed("messages[1].content", 1), _renamed("max_tokens", 0), _renamed("tools[0].function.strict", 0)
    ('input[0].content', 'max_output_tokens', 'tools[0].strict')
    """
    place = re.match(r"messages\[(\d+)\]", param)
    if place:
        i = int(place[1]) - before
        return "instructions" if i < 0 else f"input[{i}]{param[place.end() :]}"
    for chat, here in (("messages", "input"), ("max_tokens", "max_output_tokens"), ("response_format", "text.format")):
        if param.startswith(chat):
            return here
    return re.sub(r"^(tools\[\d+\])\.function", r"\1", param)


def _messages(fields: ResponseFields) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if fields.instructions is not None:
        messages.append({"role": "system", "content": fields.instructions})
    if isinstance(fields.input, str):
        return [*messages, {"role": "user", "content": fields.input}]
    for i, item in enumerate(fields.input):
        messages.append(_message(item, f"input[{i}]"))
    return messages


def _message(item: Item, path: str) -> dict[str, Any]:
    if item.type == "message":
        _need(item, ("role", "content"), path)
        return {"role": item.role, "content": _text(item.content, f"{path}.content")}
    if item.type == "function_call_output":
        _need(item, ("call_id", "output"), path)
        return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output, f"{path}.output")}
    _need(item, ("call_id", "name", "arguments"), path)
    function = {"name": item.name, "arguments": item.arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": item.call_id, "function": function}]}


def _need(item: Item, names: tuple[str, ...], path: str) -> None:
    for name in names:
        if getattr(item, name) is None:
            raise ApiError(f"{path}.{name}: is missing", param=f"{path}.{name}")


def _text(content: str | list[Part] | None, path: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str) or content is None:
        return content or ""
    for i, part in enumerate(content):
        if part.type not in PARTS or part.text is None:
            param = f"{path}[{i}]"
            raise ApiError(f"{param}: a part of type {part.type[:60]!r}; only text is read here", param=param)
    return [{"type": "text", "text": part.text} for part in content]


def _tool(tool: FlatTool) -> dict[str, Any]:
    function = {name: getattr(tool, name) for name in ("name", "description", "parameters", "strict")}
    return {"type": "function", "function": function}
