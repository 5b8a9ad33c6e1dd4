"""From a request's fields to what the engine and the template are asked for. Pure: no HTTP, no engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from allyouneed.core.errors import InputError
from allyouneed.generate.language_model import Sampling
from allyouneed.serve.errors import ApiError
from allyouneed.serve.schemas import ChatMessage, Part, SamplingFields, TextFields, Tool, ToolCall

LEAST_TOP_P = 1e-9  # OpenAI lets top_p be 0, which keeps the likeliest token alone, as this does


def text_sampling(fields: TextFields, max_new_tokens: int, vocab_size: int) -> Sampling:
    """The sampling that chat and plain completions ask for.

    Raises:
        ApiError: names the field.
    """
    stop = fields.stop or ()
    least = fields.min_tokens or 0
    if least > max_new_tokens:
        raise ApiError(f"min_tokens: {least} is more than the {max_new_tokens} at most", param="min_tokens")
    return plain_sampling(
        fields,
        max_new_tokens,
        seed=fields.seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        frequency_penalty=fields.frequency_penalty or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        logit_bias=_biases(fields.logit_bias or {}, vocab_size),
        min_tokens=least,
        ignore_eos=bool(fields.ignore_eos),
    )


def plain_sampling(fields: SamplingFields, max_new_tokens: int, **others: Any) -> Sampling:
    """The sampling of the fields that all routes know; OpenAI's defaults where they are absent."""
    try:
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=_given(fields.temperature, 1.0),
            top_p=max(_given(fields.top_p, 1.0), LEAST_TOP_P),
            top_k=max(fields.top_k or 0, 0),
            min_p=_given(fields.min_p, 0.0),
            repetition_penalty=_given(fields.repetition_penalty, 1.0),
            **others,
        )
    except InputError as error:
        raise ApiError(str(error)) from None


def client_of(fields: SamplingFields) -> str:
    """Between whom turns are shared."""
    return fields.safety_identifier or fields.user or ""


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The conversation as `data.chat` knows it, after what only a request can be wrong in was refused by its name.

    >>> template_messages([ChatMessage(role="user", content=[Part(type="text", text="Hi", weight=1)])])
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]}]
    """
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as chat templates know them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]


def _message(message: ChatMessage, path: str) -> dict[str, Any]:
    content = message.content
    if content is None and not message.tool_calls:
        raise ApiError(f"{path}.content: is missing; text is needed", param=f"{path}.content")
    if message.tool_calls and message.role != "assistant":
        raise ApiError(f"{path}.tool_calls: only an assistant calls tools", param=f"{path}.tool_calls")
    found: dict[str, Any] = {
        "role": message.role,
        "content": content if isinstance(content, str) else _parts(content or [], f"{path}.content"),
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if message.tool_calls:
        found["tool_calls"] = [
            _call(call, f"{path}.tool_calls[{i}].function.arguments") for i, call in enumerate(message.tool_calls)
        ]
    return found


def _parts(parts: Sequence[Part], path: str) -> list[dict[str, Any]]:
    for i, part in enumerate(parts):
        if part.type != "text" or part.text is None:
            param = f"{path}[{i}]"
            raise ApiError(f"{param}: a part of type {part.type[:60]!r}; only text is read here", param=param)
    return [{"type": "text", "text": part.text} for part in parts]


def _call(call: ToolCall, path: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        raise ApiError(f"{path}: is no JSON", param=path) from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _biases(given: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    for token in given:
        if not (token.isascii() and token.isdigit() and len(token) < 12 and int(token) < vocab_size):
            said = f"logit_bias: {token[:60]!r} is no token of the vocabulary of {vocab_size}"
            raise ApiError(said, param="logit_bias")
    return tuple((int(token), bias) for token, bias in given.items())


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
