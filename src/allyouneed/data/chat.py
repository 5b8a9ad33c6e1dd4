"""Conversations as the text a model was tuned on: the checkpoint's own Jinja template, rendered as Hugging Face does.

Holds what a message may be. How a template is kept from doing harm is `data.templates`' business. Knows no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from allyouneed.core.errors import InputError, brief
from allyouneed.data.templates import run

KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
TEXTS = ("text", "input_text", "output_text")  # types of parts, as OpenAI's routes name them


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as one text. `variables` (`tools`, `documents` …) are the template's, beside those of this call.

    >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    >>> render(template, [{"role": "user", "content": "Hi"}])
    '<user>Hi'

    Raises:
        InputError: a message is malformed, or the template is, refuses the conversation, or takes too much.
    """
    check(messages)
    # Through JSON and back: the template sees data, never an object's methods.
    plain = json.loads(_dump(dict(variables or {}) | {"messages": [dict(message) for message in messages]}))
    known = {"tools": None, "documents": None} | plain
    known |= {"add_generation_prompt": add_generation_prompt, "bos_token": bos_token, "eos_token": eos_token}
    return run(template, known, "chat template")


def plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation in the one form in which models here are asked, wherever it comes from: content is text, of
    which parts are lines; the developer is the system; a call's arguments are an object.

    >>> plain([{"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]}])
    [{'role': 'system', 'content': 'Be\\nbrief.'}]

    Raises:
        InputError: names the message that has something else than text, or is none.
    """
    check(messages)
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain(message: Mapping[str, Any], path: str) -> dict[str, Any]:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    found = dict(message) | {"content": content if isinstance(content, str) else _joined(parts, f"{path}.content")}
    if message["role"] == "developer":
        found["role"] = "system"
    if message.get("tool_calls"):
        path = f"{path}.tool_calls"
        found["tool_calls"] = [_called(call, f"{path}[{i}]") for i, call in enumerate(message["tool_calls"])]
    return found


def _joined(parts: Sequence[Any], path: str) -> str:
    for i, part in enumerate(parts):
        if not (isinstance(part, Mapping) and part.get("type") in TEXTS and isinstance(part.get("text"), str)):
            kind = brief(part.get("type") if isinstance(part, Mapping) else part)
            raise InputError(f"{path}[{i}]: a part of type {kind}; only text is read here")
    return "\n".join(part["text"] for part in parts)


def _called(call: Any, path: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InputError(f"{path}: is {brief(call)}; an object with a function is needed")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise InputError(f"{path}.function.arguments: is no JSON") from None
    return dict(call) | {"function": dict(function) | ({} if arguments is None else {"arguments": arguments})}


def check(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what is no conversation.

    Raises:
        InputError: names the message, and what one has.
    """
    if isinstance(messages, str | Mapping):
        raise InputError(f"messages: a list of messages is accepted, not one {type(messages).__name__}")
    accepted = ", ".join(KEYS)
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"messages[{i}]: is {brief(message)}; an object is accepted, with keys {accepted}")
        odd = [key for key in message if key not in KEYS]
        if odd:
            raise InputError(f"messages[{i}]: has the key {brief(odd[0])}; accepted keys: {accepted}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise InputError(f"messages[{i}]: role is {brief(role)}; a name like 'user' is needed")
        if not isinstance(content, str | list) and not (content is None and "tool_calls" in message):
            raise InputError(f"messages[{i}]: content is {brief(content)}; text or a list of parts is needed")


def _dump(value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages: hold what JSON has no form for: {error}") from None
