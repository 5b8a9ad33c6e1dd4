"""The application: all routes behind the gate, and the driver's life around them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from allyouneed.serve import chat, completions, embeddings, errors, responses, tokens
from allyouneed.serve.answers import HealthAnswer
from allyouneed.serve.documents import described
from allyouneed.serve.gate import Gate
from allyouneed.serve.metrics import Metrics
from allyouneed.serve.served import Served
from allyouneed.serve.service import Here, Service
from allyouneed.serve.settings import Settings

LONG = 1 << 18  # bytes of a body that is parsed aside


class StrictRequest(Request):
    """A request whose body is UTF-8 and holds whole characters only, also those that JSON spells as escapes."""

    async def json(self) -> Any:
        """The value of the body."""
        body = await self.body()
        return await asyncio.to_thread(_parsed, body) if len(body) > LONG else _parsed(body)


class StrictRoute(APIRoute):
    """A route for such requests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's function, handed a `StrictRequest`."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


def create_app(models: Mapping[str, Served], settings: Settings, metrics: Metrics) -> FastAPI:
    """The application. It starts the models' drivers with itself and stops them at its end."""
    app = FastAPI(
        title="allyouneed",
        summary="An OpenAI-compatible server for language models.",
        lifespan=_living(models),
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = Service(models, settings, metrics)
    app.router.route_class = StrictRoute
    errors.install(app)
    for part in (chat, completions, embeddings, responses, tokens):
        part.router.route_class = StrictRoute
        app.include_router(part.router)
    app.add_api_route("/health", health, methods=["GET"], **described(HealthAnswer))
    app.add_api_route("/metrics", figures, methods=["GET"], response_class=Response)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    return app


async def health() -> JSONResponse:
    """Whether the server answers."""
    answer: HealthAnswer = {"status": "ok"}
    return JSONResponse(answer)


async def figures(service: Here) -> Response:
    """Figures for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _living(models: Mapping[str, Served]) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        drivers = [served.driver for served in models.values() if served.generates]
        for driver in drivers:
            driver.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            for driver in drivers:
                await asyncio.to_thread(driver.close)

    return living


def _parsed(body: bytes) -> Any:
    """The JSON value of a body.

    Raises:
        HTTPException: the body is no UTF-8, or nested too deeply, or spells half a character.
        json.JSONDecodeError: it is no JSON.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is no UTF-8: byte {error.start}") from None
    except UnicodeEncodeError:
        raise HTTPException(400, "the body spells half a surrogate pair, which is no character") from None
    except (RecursionError, ValueError):
        raise HTTPException(400, "the body is nested too deeply, or holds a number too long") from None
    return value
