"""What all routes share: the models by name, the settings, the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from allyouneed.core.errors import unknown
from allyouneed.serve.driver import Generation
from allyouneed.serve.errors import ApiError
from allyouneed.serve.metrics import Metrics
from allyouneed.serve.served import Served
from allyouneed.serve.settings import Settings


@dataclass(frozen=True)
class Service:
    """The first of the models answers where none is named."""

    models: Mapping[str, Served]
    settings: Settings
    metrics: Metrics

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

    def watched(self, generation: Generation) -> Generation:
        """`generation`, whose prompt is counted and whose news will be."""
        self.metrics.read.inc(sum(len(job.request.ids) for job in generation.jobs))
        generation.watch = self.metrics.watch
        return generation


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Here = Annotated[Service, Depends(_service)]
