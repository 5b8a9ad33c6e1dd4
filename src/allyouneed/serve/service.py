"""What all routes share: the models by name, the settings, the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated
from weakref import WeakSet

from fastapi import Depends, Request

from allyouneed.core.errors import InputError, unknown
from allyouneed.serve.driver import Generation
from allyouneed.serve.errors import ApiError, busy, refused
from allyouneed.serve.metrics import Metrics
from allyouneed.serve.served import Served
from allyouneed.serve.settings import Settings


@dataclass(frozen=True)
class Service:
    """The first of the models answers where none is named."""

    models: Mapping[str, Served]
    settings: Settings
    metrics: Metrics
    generations: WeakSet[Generation] = field(default_factory=WeakSet)  # those that are under way, and maybe some more

    def find(self, name: str | None) -> Served:
        """The model of that name.

        Raises:
            ApiError: there is none.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ApiError(str(unknown("model", name, self.models)), status=404, param="model", code="model_not_found")
        return self.models[name]

    def find_embedder(self, name: str | None) -> Served:
        """The model of that name; where none is named, one that was trained to make vectors, if there is one."""
        encoders = [served for served in self.models.values() if not served.generates]
        return encoders[0] if name is None and encoders else self.find(name)

    async def start(self, generation: Generation, prompt: str) -> None:
        """Hand a generation over. What the engine refuses is the fault of the field `prompt`.

        Raises:
            ApiError: it is refused, or as many answers are under way as this server takes.
        """
        under_way = sum(len(one.left) for one in self.generations)
        if under_way >= self.settings.max_requests:
            raise busy(f"{under_way} answers are under way, as many as this server takes; come again soon")
        self.generations.add(generation)
        generation.watch, generation.ended = self.metrics.watch, self.metrics.end
        try:
            await generation.start()
        except InputError as error:
            raise refused(prompt, error) from None
        finally:
            if not generation.started:
                generation.close()
        self.metrics.read.inc(sum({id(job.request.ids): len(job.request.ids) for job in generation.jobs}.values()))


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Here = Annotated[Service, Depends(_service)]
