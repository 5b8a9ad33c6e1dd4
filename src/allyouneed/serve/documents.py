"""What our OpenAPI document says of a route's answers, beside what FastAPI reads off its function."""

from __future__ import annotations

from typing import Any

from allyouneed.serve.errors import ErrorAnswer

FAILURES = {
    400: "The request is wrong; `param` names the field.",
    401: "The key is missing or wrong.",
    403: "Without a key the server answers this machine's own names only.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too many requests are under way; `Retry-After` says when to come again.",
    503: "The server is shutting down, or its engine cannot go on.",
    504: "The answer took longer than this server allows.",
}


def described(answer: Any, event: Any = None) -> dict[str, Any]:
    """Arguments of a route that answers with `answer`, or where a stream is asked for with one `event` after another.

    >>> sorted(described(ErrorAnswer)["responses"])[:3]
    [200, 400, 401]
    """
    success: dict[str, Any] = {"model": answer, "description": "The answer."}
    if event is not None:
        said = f"Server-sent events; the data of each is one {event.__name__}, of the last [DONE]."
        success["content"] = {"text/event-stream": {"schema": {"description": said}}}
    failures = {status: {"model": ErrorAnswer, "description": said} for status, said in FAILURES.items()}
    return {"response_model": None, "responses": {200: success, **failures}}
