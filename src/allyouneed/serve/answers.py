"""What chat and plain completions answer: OpenAI's objects as typed dictionaries, whole and in chunks of a stream."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(TypedDict):
    """Tokens of prompts that were read before, for whom it may be."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class FunctionAnswer(TypedDict):
    """The function called; in a chunk, what of it is new."""

    name: NotRequired[str]
    arguments: str


class CallAnswer(TypedDict):
    """A tool call; `index` stands in chunks, where later ones have neither id nor type."""

    index: NotRequired[int]
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionAnswer


class TopLogprob(TypedDict):
    """A token that might have come; in `token`, U+FFFD stands for bytes that are no whole character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came, with those that might have."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """The log-probabilities of a message's tokens, before any filter."""

    content: list[TokenLogprob]
    refusal: None


class MessageAnswer(TypedDict):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[CallAnswer]]


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: MessageAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswer(TypedDict):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None


class Delta(TypedDict):
    """What is new in a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[CallAnswer]]


class ChunkChoice(TypedDict):
    """What is new in one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    """One event of a streamed chat completion; the last one, with `usage`, has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
    system_fingerprint: None


class TextLogprobs(TypedDict):
    """The log-probabilities of a text's tokens; of a prompt's first there is none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(TypedDict):
    """One completion, or what is new in it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextAnswer(TypedDict):
    """POST /v1/completions, whole or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]
    system_fingerprint: None


class Vector(TypedDict):
    """One text's vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(TypedDict):
    """POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Vector]
    model: str
    usage: EmbeddingUsage


class ModelAnswer(TypedDict):
    """A model that can be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(TypedDict):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelAnswer]


class TokensAnswer(TypedDict):
    """POST /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int | None


class PromptAnswer(TypedDict):
    """POST /detokenize."""

    prompt: str


class HealthAnswer(TypedDict):
    """GET /health."""

    status: Literal["ok"]


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """Tokens of prompts, those made, their sum; and how many of the first were not read anew."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def identity(prefix: str) -> str:
    """A new name for an answer or a call."""
    return f"{prefix}{uuid.uuid4().hex[:24]}"


def envelope(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What all objects of one answer have in common."""
    return {
        "id": identity(prefix),
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }
