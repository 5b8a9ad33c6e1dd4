"""What the routes take: OpenAI's fields, and vLLM's beside them where they say more.

`null` counts as absent. A field that nobody knows is kept as an extra: `extras` finds it, so that it is told of.
Fields with a meaning that is not honoured here stand in `UNSUPPORTED` and are refused, unless they ask for what happens
anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from allyouneed.core.errors import brief
from allyouneed.serve.errors import ApiError

MOST_STOPS = 16
MOST_BIASES = 1024
MOST_CHOICES = 128  # of `n` and `best_of`
MOST_PROMPTS = 512
MOST_TEXTS = 2048  # of one request for embeddings, OpenAI's own limit
TOKENS = 1 << 31

Ids = Annotated[list[Annotated[int, Field(ge=0, le=TOKENS)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
JsonObject = dict[str, Any]


class Fields(BaseModel):
    """Base of everything taken: types are not guessed, infinities are none."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Fields):
    """How a stream is told."""

    include_usage: bool | None = None


class SamplingFields(Fields):
    """How tokens are chosen, on every route that makes text."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None


class TextFields(SamplingFields):
    """What chat and plain completions have in common beyond that."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)] | None = (
        None
    )
    min_tokens: Annotated[int, Field(ge=0, le=TOKENS)] | None = None
    ignore_eos: bool | None = None
    stream_options: StreamOptions | None = None


class FunctionCall(Fields):
    """Which function a model called; `arguments` is JSON as text."""

    name: str
    arguments: str


class ToolCall(Fields):
    """One call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Part(Fields):
    """One part of a message's content."""

    type: str
    text: str | None = None


class ChatMessage(Fields):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=128)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Fields):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Fields):
    """A tool of the one kind there is here."""

    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    """A function's name."""

    name: str


class NamedTool(Fields):
    """The function that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Fields):
    """The schema that an answer keeps to."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Fields):
    """What an answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatFields(TextFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: JsonObject | None = None


class CompletionFields(TextFields):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[Texts, Field(max_length=MOST_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(fail_fast=True, max_length=MOST_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=TOKENS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None


class EmbeddingFields(Fields):
    """POST /v1/embeddings."""

    input: (
        str
        | Annotated[Texts, Field(min_length=1, max_length=MOST_TEXTS)]
        | Annotated[Ids, Field(min_length=1)]
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MOST_TEXTS)]
    )
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=TOKENS)] | None = None
    user: str | None = None


class TokenizeFields(Fields):
    """POST /tokenize: a prompt, or messages as the model would read them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    add_special_tokens: bool | None = None


class DetokenizeFields(Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids


# Fields of OpenAI's with a meaning that is not honoured here: the values that ask for nothing, and the mend.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "only text is made here"),
    "modalities": ((["text"],), "only text is made here"),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "prediction": ((), "leave it out; `--draft` speeds up all requests"),
    "web_search_options": ((), "leave it out; nothing is searched here"),
    "reasoning_effort": (("none",), "leave it out; set what the model's template knows by chat_template_kwargs"),
    "reasoning": (({}, {"effort": "none"}), "leave it out"),
    "image_url": ((), "only text is read here"),
    "input_audio": ((), "only text is read here"),
    "file": ((), "only text is read here"),
    "verbosity": (("medium",), "leave it out; ask for it in the prompt"),
    "store": ((False,), "leave it out; answers are not kept"),
    "service_tier": (("auto", "default"), "leave it out"),
    "suffix": (("",), "leave it out; nothing is filled into a gap here"),
    "moderation": ((), "leave it out"),
    "background": ((False,), "leave it out; answers are not kept"),
    "previous_response_id": ((), "send the conversation as input; answers are not kept"),
    "conversation": ((), "send the conversation as input; answers are not kept"),
    "max_tool_calls": ((), "leave it out; tools are called by the client"),
    "context_management": (([],), "leave it out; nothing is ever cut short"),
    "use_beam_search": ((False,), "leave it out"),
    "stop_token_ids": (([],), "use stop"),
    "bad_words": (([],), "use logit_bias"),
    "allowed_token_ids": ((), "use response_format or logit_bias"),
    "include_stop_str_in_output": ((False,), "leave it out; stop strings are never sent"),
    "skip_special_tokens": ((True,), "leave it out"),
    "add_special_tokens": ((True,), "send the prompt as ids, which /tokenize gives"),
    "prompt_logprobs": ((0,), "use /v1/completions with echo and logprobs"),
    "truncate_prompt_tokens": ((), "shorten the prompt; nothing is ever cut short"),
    "add_generation_prompt": ((True,), "leave it out"),
    "continue_final_message": ((False,), "use /v1/completions"),
    "guided_json": ((), "use response_format"),
    "guided_regex": ((), "use response_format"),
    "guided_choice": ((), "use response_format"),
    "guided_grammar": ((), "use response_format"),
    "structured_outputs": ((), "use response_format"),
}


SERVED = frozenset({*ChatFields.model_fields, *CompletionFields.model_fields, "input", "instructions"}) | {
    "max_output_tokens",
    "text",
    "truncation",
}  # what some route that makes text honours: on another it must not pass for something that nobody knows
NOTHING: dict[str, tuple[Any, ...]] = {  # values with which such a field asks for nothing, beside False, [] and {}
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "min_tokens": (0,),
    "stream_options": ({"include_obfuscation": False},),
}


def extras(fields: Fields, path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields that nobody knows, with where they stand, however deep.

    >>> [name for name, _ in extras(ChatMessage(role="user", content="Hi", weight=1), "messages[0].")]
    ['messages[0].weight']
    """
    for name, value in (fields.model_extra or {}).items():
        yield f"{path}{name}", _without_nulls(value)
    for name in type(fields).model_fields:
        value = getattr(fields, name)
        for i, one in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(one, Fields):
                yield from extras(one, f"{path}{name}[{i}]." if isinstance(value, list) else f"{path}{name}.")


def ignored(fields: Fields) -> list[str]:
    """The fields that are passed over.

    Raises:
        ApiError: one of them has a meaning that is not honoured here.
    """
    found = []
    for path, value in extras(fields):
        name = path.rpartition(".")[2]
        harmless, mend = UNSUPPORTED.get(name, ((value,), ""))
        if value not in harmless:
            raise ApiError(f"{path}: {brief(value)} is not supported here; {mend}", param=path)
        if isinstance(fields, SamplingFields) and path in SERVED and not _asks_nothing(name, value):
            raise ApiError(f"{path}: is a field of another route, and does nothing here; leave it out", param=path)
        if name not in UNSUPPORTED:
            found.append(path)
    return found


def _asks_nothing(name: str, value: Any) -> bool:
    return value is False or value in ([], {}) or value in NOTHING.get(name, ())


def _without_nulls(value: Any) -> Any:
    """A value of JSON whose fields are all there."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return value
