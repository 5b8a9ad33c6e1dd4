"""The application: all routes behind the gate, and the driver's life around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from allyouneed.serve import chat, completions, embeddings, errors, responses, tokens
from allyouneed.serve.answers import HealthAnswer
from allyouneed.serve.documents import described
from allyouneed.serve.errors import ApiError
from allyouneed.serve.gate import Gate
from allyouneed.serve.metrics import Metrics
from allyouneed.serve.served import Served
from allyouneed.serve.service import Here, Service
from allyouneed.serve.settings import Settings


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
    errors.install(app)
    for part in (chat, completions, embeddings, responses, tokens):
        app.include_router(part.router)
    app.add_api_route("/health", health, methods=["GET"], **described(HealthAnswer))
    app.add_api_route("/metrics", figures, methods=["GET"], response_class=Response)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    return app


async def health(service: Here) -> JSONResponse:
    """Whether the server answers, and its engines go on."""
    dead = [served.name for served in service.models.values() if served.generates and not served.driver.alive]
    if dead:
        said = f"the engine of {dead[0]} does not go on; restart the server, whose log says why"
        raise ApiError(said, status=503, code="engine_dead")
    answer: HealthAnswer = {"status": "ok"}
    return JSONResponse(answer)


async def figures(service: Here) -> Response:
    """Figures for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _living(models: Mapping[str, Served]) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        drivers = {served.driver for served in models.values() if served.generates}  # adapters share their model's
        for driver in drivers:
            driver.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            for driver in drivers:
                await asyncio.to_thread(driver.close)

    return living
