"""A server from its parts: models, an engine, settings."""

from __future__ import annotations

from fastapi import FastAPI

from allyouneed.core.errors import InputError
from allyouneed.generate.local import LocalModel
from allyouneed.generate.local_encoder import LocalEncoder
from allyouneed.serve.app import create_app
from allyouneed.serve.driver import Driver
from allyouneed.serve.metrics import Metrics
from allyouneed.serve.served import Served
from allyouneed.serve.settings import Settings


def assemble(lm: LocalModel | LocalEncoder, settings: Settings, embedder: LocalEncoder | None = None) -> FastAPI:
    """The application that serves `lm`, whose engine it takes over, each of its adapters as a model of its own
    (`name:adapter`), and beside it an encoder.

    Raises:
        InputError: `settings.context` is more than the model, or all blocks of its cache, hold.
    """
    metrics = Metrics()
    models: dict[str, Served] = {}
    for one in (lm, *([embedder] if embedder else [])):
        if isinstance(one, LocalEncoder):
            models[one.name] = Served(one, one.name, None, one.reading.most, settings.timeout)
        else:
            driver = Driver(one.engine, metrics.take)
            served = Served(one, one.name, driver, _context(one, settings), settings.timeout)
            adapted = [served.with_adapter(name) for name in one.adapters]
            models |= {each.name: each for each in (served, *adapted)}
    return create_app(models, settings, metrics)


def _context(lm: LocalModel, settings: Settings) -> int | None:
    """The most tokens of one request."""
    limit, room = lm.module.limit, lm.engine.room
    if settings.context is None or room is None:
        return settings.context or room
    if limit is not None and settings.context > limit:
        raise InputError(f"--context {settings.context}: {lm.name} holds {limit} tokens at most")
    if settings.context > room:
        raise InputError(f"--context {settings.context}: the blocks of the cache hold {room} tokens; raise --blocks")
    return settings.context
