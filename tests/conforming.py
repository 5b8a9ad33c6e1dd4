"""Requests made up from our own OpenAPI document, right ones and wrong ones, and whether the answers keep to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import hypothesis
import requests
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

ASK = [{"role": "user", "content": "Hi"}]
GROUND = {  # a request that is right but for what is made up beside it
    "POST /v1/chat/completions": {
        "messages": ASK,
        "model": None,
        "tools": None,
        "max_tokens": 8,
        "max_completion_tokens": None,
    },
    "POST /v1/completions": {"prompt": "Hi", "model": None, "max_tokens": 8, "best_of": None},
    "POST /v1/responses": {"input": "Hi", "model": None, "tools": None, "max_output_tokens": 8},
    "POST /v1/embeddings": {"input": "Hi", "model": None},
    "POST /tokenize": {"messages": ASK, "prompt": None, "model": None},
}
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
KEYS = {"message", "type", "param", "code"}


@dataclass
class Conformance:
    """How many answers of each status came from each route, and what was wrong."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(self.answers.values())


def conform(url: str, least: int, seed: int = 0) -> Conformance:
    """Send at least so many requests to the server at `url`, and about as many to each route: right ones, wrong ones,
    and, so that the engine is reached, a right one with fields made up beside its own.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found, before = Conformance(), -1
    with requests.Session() as session:
        while before < found.requests < least:
            before = found.requests
            _round(schema, max(6, least // 20), seed, session, found)
            seed += 2
    assert found.requests >= least, f"{found.requests} requests were made up, no more"
    return found


def _round(schema, each, seed, session, found) -> None:
    """`each` requests of each kind to each route, or as many as there are."""
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:
            _explore(operation, mode, each, seed, session, found, {})
        if operation.label in GROUND:
            ground = GROUND[operation.label]
            _explore(operation, GenerationMode.POSITIVE, each, seed + 1, session, found, ground)


def _explore(operation, mode, each, seed, session, found, ground) -> None:
    try:
        strategy = operation.as_strategy(generation_mode=mode)
    except Exception as error:  # a route without parameters has no wrong requests
        assert mode is GenerationMode.NEGATIVE, error
        return

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=each,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def send(case) -> None:
        if ground and isinstance(case.body, dict):
            case.body |= ground
        response = case.call(session=session, timeout=60)
        found.answers[operation.label, response.status_code] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except BaseException as error:
            found.failures.append(f"{operation.label} {response.status_code}: {str(error)[:800]}")
        if response.status_code >= 400 and set(response.json()["error"]) != KEYS:
            found.failures.append(f"{operation.label} {response.status_code}: {response.text[:300]}")

    try:
        send()
    except hypothesis.errors.Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE
