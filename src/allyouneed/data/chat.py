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


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    **extras: Any,
) -> str:
    """The conversation as one text. `extras` (`tools`, `documents` …) are variables of the template.

    >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    >>> render(template, [{"role": "user", "content": "Hi"}])
    '<user>Hi'

    Raises:
        InputError: a message is malformed, or the template is, refuses the conversation, or takes too much.
    """
    check(messages)
    # Through JSON and back: the template sees data, never an object's methods.
    plain = json.loads(_dump({"messages": [dict(message) for message in messages]} | extras))
    variables = {"tools": None, "documents": None} | plain
    variables |= {"add_generation_prompt": add_generation_prompt, "bos_token": bos_token, "eos_token": eos_token}
    return run(template, variables, "chat template")


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
