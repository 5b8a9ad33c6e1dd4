"""A language model behind OpenAI-compatible endpoints: vLLM, SGLang, llama.cpp, our own server, or hosted ones.

Holds what is asked for and what the answers mean. Connections and errors are `endpoint`'s, the choice between several
`fleet`'s, retries and order `caller`'s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from allyouneed.core.errors import InputError, RemoteError, about, unknown
from allyouneed.generate.caller import Caller
from allyouneed.generate.endpoint import Endpoint
from allyouneed.generate.fleet import Fleet
from allyouneed.generate.language_model import (
    AccessError,
    Completion,
    Message,
    Sampling,
    Turns,
    sampling_from,
    samplings_of,
)
from allyouneed.generate.remote_queue import RemoteQueue

Answered = TypeVar("Answered")
Request = tuple[str, dict[str, Any]]  # a path, and what is sent there

PENALTIES = ("frequency_penalty", "presence_penalty")
EXTRAS = ("top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens")  # vLLM's names; OpenAI refuses them
EMBEDDED_AT_ONCE = 64  # texts per request
NO_ECHO = {400, 404, 422, 500, 501}  # how servers refuse `echo`; llama.cpp does it with a 500


class RemoteModel:
    """Satisfies `LanguageModel` over HTTP.

    Args:
        base_url: `http(s)://host[:port][/path]`; without a path `/v1` is meant. Several, in a list or with commas
            between, are a fleet that serves one model.
        model: its name there; None: the first that the endpoint lists, or all of the fleet do.
        api_key: None: the environment's OPENAI_API_KEY.
        concurrency: requests under way at once, at each endpoint.
        timeout: seconds without a byte from the server.
        retries: further tries, ever further apart, after connection errors, 408, 409, 429 and 5xx; a fleet's other
            endpoints are tried before.
        sleep: how to wait between tries.

    Every method raises `AccessError` for a refused key or an unknown model, and `RemoteError` for what
    else goes wrong at the other end. When one request of many fails for good, the error names its index and holds in
    `done` what came back for others.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str | None = None,
        api_key: str | None = None,
        *,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        urls = base_url.split(",") if isinstance(base_url, str) else base_url
        endpoints = [Endpoint(url, api_key, concurrency=concurrency, timeout=timeout) for url in urls]
        service = endpoints[0] if len(endpoints) == 1 else Fleet(endpoints)
        self.caller = Caller(service, retries=retries, sleep=sleep)
        self.name = model or self._first_model()

    def models(self) -> list[str]:
        """The names that the endpoint lists, or all endpoints of the fleet."""
        return self.caller.models()

    def complete(self, prompts: Sequence[Turns], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """One completion per prompt, in order; conversations by the server's chat template."""
        pairs = zip(prompts, samplings_of(sampling, len(prompts)), strict=True)
        requests = {}
        for i, pair in enumerate(pairs):  # all are made before one is sent: what is wrong with one costs nothing
            with about(f"request {i}"):
                requests[i] = _request(*pair)
        answers = self.caller.map(self._answer, requests)
        return [answers[i] for i in requests]

    def queue(self) -> RemoteQueue[Request]:
        """Answers prompts as they come, as many at once as the endpoints should be given."""
        return RemoteQueue(self.caller, _request, self._answer)

    def generate(self, prompts: Sequence[str], **sampling: object) -> list[str]:
        """The completions' texts; keywords are fields of `Sampling`."""
        return [completion.text for completion in self.complete(prompts, sampling_from(sampling))]

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Pieces of the completion's text as they come."""
        return self._stream(*_request(prompt, sampling), lambda choice: choice["text"])

    def chat(self, messages: Sequence[Message], **sampling: object) -> str:
        """The assistant's answer, through the server's chat template."""
        return self._answer(_request(messages, sampling_from(sampling))).text

    def chat_stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """Pieces of the assistant's answer as they come."""
        return self._stream(*_request(messages, sampling), lambda choice: choice["delta"].get("content"))

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """Summed natural log-probability of each continuation given its prompt.

        Prompt and continuation are tokenised together; the tokens beyond the prompt's own number are the
        continuation's, and spaces that end a prompt count with it. That number is asked for: the `text_offset` that
        servers send adds up the lengths of decoded tokens, so that a begin token, or a character split into several
        tokens, shifts it.

        Raises:
            RemoteError: the endpoint does not return the log-probabilities of a prompt.
        """
        if len(prompts) != len(continuations):
            raise InputError(f"score: {len(prompts)} prompts but {len(continuations)} continuations")
        heads = [prompt.rstrip() for prompt in prompts]
        if "" in heads:
            raise InputError(f"score: prompt {heads.index('')} is empty; an endpoint scores only what follows a token")
        wholes = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
        lengths = self._once(self._length, heads)
        logprobs = self._once(self._logprobs, wholes)
        return [sum(logprobs[whole][lengths[head] :], 0.0) for head, whole in zip(heads, wholes, strict=True)]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32 vectors of unit length."""
        parts = {i: list(texts[i : i + EMBEDDED_AT_ONCE]) for i in range(0, len(texts), EMBEDDED_AT_ONCE)}
        answers = self.caller.map(self._embed, parts)
        vectors = np.concatenate([answers[i] for i in parts]) if parts else np.zeros((0, 0), np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def close(self) -> None:
        """Close the connections."""
        self.caller.close()

    def _answer(self, request: Request) -> Completion:
        path, body = request
        return self._ask(path, body, _completion if "prompt" in body else _chat_completion)

    def _first_model(self) -> str:
        try:
            names = self.models()
            if not names:
                raise InputError(f"{self.caller.name} lists no model; name one")
        except Exception:
            self.close()
            raise
        return names[0]

    def _ask(self, path: str, body: dict[str, Any], read: Callable[[Any], Answered]) -> Answered:
        try:
            return self.caller.post(path, {"model": self.name, **body}, read)
        except RemoteError as error:
            raise self._explained(error) from None

    def _stream(self, path: str, body: dict[str, Any], read: Callable[[Any], str | None]) -> Iterator[str]:
        def piece(event: Any) -> str:
            return "".join(read(choice) or "" for choice in event["choices"][:1])  # an event may only count tokens

        try:
            yield from filter(None, self.caller.stream(path, {"model": self.name, "stream": True, **body}, piece))
        except RemoteError as error:
            raise self._explained(error) from None

    def _explained(self, error: RemoteError) -> Exception:
        """404 means an unknown model, unless the endpoint lists it."""
        if error.status != 404:
            return error
        try:
            names = self.models()
        except (RemoteError, InputError):
            return error
        return error if self.name in names else AccessError(str(unknown("model", self.name, names)))

    def _once(self, ask: Callable[[str], Answered], texts: Sequence[str]) -> dict[str, Answered]:
        """What `ask` says of each text, equal ones asked once."""
        first: dict[str, int] = {}
        for i, text in enumerate(texts):
            first.setdefault(text, i)
        answers = self.caller.map(ask, {i: text for text, i in first.items()})
        return {text: answers[i] for text, i in first.items()}

    def _length(self, text: str) -> int:
        """How many tokens the server reads `text` as."""
        return self._ask("completions", {"prompt": text, "max_tokens": 1}, lambda a: int(a["usage"]["prompt_tokens"]))

    def _logprobs(self, text: str) -> list[float]:
        """The log-probability of each token of `text`; the first, which nothing predicts, counts as 0."""
        # One token is generated too: to some servers a limit of 0 is none.
        body = {"prompt": text, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
        try:
            return self._ask("completions", body, _prompt_logprobs)
        except RemoteError as error:
            if error.status in NO_ECHO:
                raise RemoteError(f"this endpoint cannot score, it refuses echo with logprobs: {error}") from None
            raise

    def _embed(self, texts: list[str]) -> np.ndarray:
        def vectors(answer: Any) -> np.ndarray:
            found = {entry["index"]: entry["embedding"] for entry in answer["data"]}
            return np.array([found[i] for i in range(len(texts))], dtype=np.float32).reshape(len(texts), -1)

        return self._ask("embeddings", {"input": texts, "encoding_format": "float"}, vectors)


def _request(prompt: Turns, sampling: Sampling) -> Request:
    if isinstance(prompt, str):
        return "completions", {"prompt": prompt, **_fields(sampling)}
    return "chat/completions", {"messages": list(prompt), **_fields(sampling)}


def _fields(sampling: Sampling) -> dict[str, Any]:
    """The request's fields; those that only some servers know are left out where they change nothing."""
    body: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.json_schema:
        schema = {"name": "answer", "schema": json.loads(sampling.json_schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if sampling.regex:
        raise InputError("regex: endpoints have no common field for it, and would pass over it; give a json_schema")
    extras = {name: getattr(sampling, name) for name in (*PENALTIES, *EXTRAS)}
    return body | {name: value for name, value in extras.items() if value != getattr(Sampling, name)}


def _completion(answer: Any) -> Completion:
    return _completed(answer, answer["choices"][0]["text"])


def _chat_completion(answer: Any) -> Completion:
    return _completed(answer, answer["choices"][0]["message"]["content"] or "")


def _completed(answer: Any, text: str) -> Completion:
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    return Completion(
        text=text,
        finish_reason=choice.get("finish_reason") or "stop",
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
    )


def _prompt_logprobs(answer: Any) -> list[float]:
    length, found = answer["usage"]["prompt_tokens"], answer["choices"][0].get("logprobs") or {}
    values = found.get("token_logprobs", [])[:length]
    if len(values) < length or None in values[1:]:  # llama.cpp passes over `echo` and answers for the new token only
        raise RemoteError(
            f"this endpoint cannot score: {len(values)} log-probabilities came for a prompt of {length} tokens"
        )
    return [0.0, *map(float, values[1:])]
