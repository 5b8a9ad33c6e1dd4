"""Rows of a batch job: what a line asks for, and the line that answers it. Knows no model and no file.

    {"prompt": "…"} or {"messages": […]}, beside fields of `Sampling`           -> the row with its answer
    {"custom_id": "…", "body": {"messages": […], "max_tokens": 5, …}}, OpenAI's -> {"custom_id": …, "response": {…}}

What a row says of sampling goes before what holds for all. `id` and `metadata` pass through.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from allyouneed.core.config import TAG, Config
from allyouneed.core.errors import InputError, about, brief
from allyouneed.data import chat, jsonl
from allyouneed.generate.language_model import Completion, Sampling, Turns

ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}  # OpenAI's names
SAMPLING = (*(field.name for field in fields(Sampling)), *ALIASES)
LARGEST = 2**63 - 1  # of whole numbers, as JSON's readers have them
PASSED = ("id", "metadata")
ENVELOPE = ("custom_id", "method", "url", "body")
FIXED = {"n": 1, "stream": False}  # what a body may say only in this way
IDLE = ("model", "metadata", "user", "store", "service_tier")  # what a body may say that changes no answer
KINDS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}  # what is asked where


@dataclass(frozen=True)
class Plain:
    """A prompt or messages; its answer makes it a line that `finetune` reads."""

    number: int
    found: Mapping[str, Any]
    prompt: Turns
    sampling: Sampling

    def answered(self, completion: Completion) -> dict[str, Any]:
        """The row with `completion`, or with one message more."""
        kept = {name: self.found[name] for name in (*PASSED, "prompt") if name in self.found}
        if "messages" in self.found:
            kept["messages"] = [*self.found["messages"], {"role": "assistant", "content": completion.text}]
        else:
            kept["completion"] = completion.text
        counts = {name: getattr(completion, name) for name in ("finish_reason", "prompt_tokens", "completion_tokens")}
        return kept | counts

    def refused(self, message: str) -> dict[str, Any]:
        """The row's number, and why."""
        return Bad(self.number, self.found).refused(f"row {self.number}: {message}")


@dataclass(frozen=True)
class Enveloped:
    """OpenAI's batch shape, both ways."""

    number: int
    custom_id: str
    prompt: Turns
    sampling: Sampling

    def answered(self, completion: Completion) -> dict[str, Any]:
        """A response with a body of the kind that was asked for."""
        text = completion.text
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
        kind, choice = (
            ("text_completion", {"text": text}) if isinstance(self.prompt, str) else ("chat.completion", said)
        )
        usage = {"prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.completion_tokens}
        body = {
            "object": kind,
            "choices": [{"index": 0, **choice, "finish_reason": completion.finish_reason}],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }
        return {"custom_id": self.custom_id, "response": {"status_code": 200, "body": body}, "error": None}

    def refused(self, message: str) -> dict[str, Any]:
        """An error in the place of the response."""
        return Bad(self.number, {"custom_id": self.custom_id}).refused(f"row {self.number}: {message}")


@dataclass(frozen=True)
class Bad:
    """A line that asks for nothing that can be answered, and what of it was found."""

    number: int
    found: Mapping[str, Any]

    def refused(self, message: str) -> dict[str, Any]:
        """The line that says why, in the shape of the row."""
        if isinstance(self.found.get("custom_id"), str):
            error = {"code": "invalid_request", "message": message}
            return {"custom_id": self.found["custom_id"], "response": None, "error": error}
        return {"row": self.number} | {k: self.found[k] for k in PASSED if k in self.found} | {"error": message}


Row = Plain | Enveloped


def read(number: int, line: bytes, sampling: Sampling) -> Row | dict[str, Any]:
    """What line `number` asks for, `sampling` being what it does not say itself; or the line that refuses it.

    >>> read(3, b'{"prompt": "Once", "max_tokens": 5}', Sampling()).sampling.max_new_tokens
    5
    >>> read(3, b'{"promt": "Once"}', Sampling())["error"].partition(", and")[0]
    "row 3: keys 'promt'; accepted: prompt or messages"
    """
    found: dict[str, Any] = {}
    try:
        with about(f"row {number}"):
            found = _parsed(line, f"row {number}")
            if "custom_id" in found or "body" in found:
                return _enveloped(number, found, sampling)
            return Plain(number, found, *_asked(found, PASSED, sampling))
    except InputError as error:
        return Bad(number, found).refused(str(error))


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    """The object in a line, which can be written again."""
    found = jsonl.parse_object(line, where)
    try:
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise InputError("holds half a surrogate pair, which is no text") from None
    except ValueError:
        raise InputError("holds NaN or Infinity, which JSON has no form for") from None
    except RecursionError:
        raise InputError("nested too deeply") from None
    return found


def _enveloped(number: int, found: Mapping[str, Any], sampling: Sampling) -> Enveloped:
    if odd := [key for key in found if key not in ENVELOPE]:
        raise InputError(f"keys {jsonl.shown(odd)}; accepted: {', '.join(ENVELOPE)}")
    custom_id, body = found.get("custom_id"), found.get("body")
    if not isinstance(custom_id, str) or not isinstance(body, dict):
        raise InputError(f"custom_id is {brief(custom_id)}, body {brief(body)}; text and an object are accepted")
    for name, right in FIXED.items():
        if body.get(name, right) not in (right, None):
            raise InputError(f"body.{name} is {brief(body[name])}; only {json.dumps(right)} is accepted")
    _check_address(found, body)
    form = _form(body.get("response_format"))
    return Enveloped(number, custom_id, *_asked(body, (*IDLE, *FIXED, "response_format"), sampling.replace(**form)))


def _check_address(found: Mapping[str, Any], body: Mapping[str, Any]) -> None:
    """Refuse what another route than a body's own would answer."""
    method, url = found.get("method"), found.get("url")
    if method not in ("POST", None):
        raise InputError(f"method is {brief(method)}; only POST is accepted")
    if url is None:
        return
    if not isinstance(url, str) or url not in KINDS:
        raise InputError(f"url is {brief(url)}; accepted: {', '.join(KINDS)}")
    if KINDS[url] not in body:
        raise InputError(f"url is {url}, which asks with {KINDS[url]}; body has none")


def _form(asked: Any) -> dict[str, str]:
    """What an OpenAI `response_format` means as fields of `Sampling`, going before those for all rows."""
    match asked:
        case None:
            return {}
        case {"type": "text"}:
            schema: Any = None
        case {"type": "json_object"}:
            schema = {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            pass
        case _:
            raise _no_form(asked)
    return {"json_schema": "" if schema is None else json.dumps(schema), "regex": ""}


def _no_form(asked: Any) -> InputError:
    schema = '{"type": "json_schema", "json_schema": {"schema": …}}'
    return InputError(
        f'response_format is {brief(asked)}; accepted: {schema}, {{"type": "json_object"}} and {{"type": "text"}}'
    )


def _asked(found: Mapping[str, Any], passed: tuple[str, ...], sampling: Sampling) -> tuple[Turns, Sampling]:
    """The prompt or conversation and how it is answered, of an object that may hold `passed` besides."""
    asks = [name for name in ("prompt", "messages") if name in found]
    odd = [key for key in found if key not in ("prompt", "messages", *SAMPLING, *passed)]
    if odd or len(asks) != 1:
        accepted = f"prompt or messages, and {', '.join((*SAMPLING, *passed))}"
        raise InputError(f"keys {jsonl.shown(odd or found)}; accepted: {accepted}")
    turns: Any = found[asks[0]]
    if not isinstance(turns, str | list if asks == ["prompt"] else list) or turns == []:
        raise InputError(f"{asks[0]} is {brief(turns)}; a list of messages is accepted, and as prompt a text")
    if isinstance(turns, list):
        chat.check(turns)
    return turns, _sampling(found, sampling)


def _sampling(found: Mapping[str, Any], sampling: Sampling) -> Sampling:
    """`sampling` with what a row says itself; what it says is null it does not say."""
    said = {name: found[name] for name in SAMPLING if found.get(name) is not None}
    named = {ALIASES.get(name, name): value for name, value in said.items()}
    if len(named) < len(said):
        raise InputError(f"the same is said twice: {', '.join(name for name in said if name.startswith('max_'))}")
    if isinstance(named.get("stop"), str):
        named["stop"] = [named["stop"]]
    if isinstance(bias := named.get("logit_bias"), dict):  # as OpenAI writes it, tokens being the keys
        named["logit_bias"] = [[int(token) if token.isdecimal() else token, value] for token, value in bias.items()]
    for name, value in named.items():
        if isinstance(value, dict) or (isinstance(value, int) and abs(value) > LARGEST):
            raise InputError(f"{name} is {brief(value)}; a number of at most {LARGEST}, or text, is accepted")
    try:
        return Config.from_json(sampling.to_json() | named)
    except RecursionError:
        raise InputError("nested too deeply") from None
    except InputError as error:
        raise InputError(str(error).replace(f"{sampling.to_json()[TAG]}: ", "sampling: ")) from None
