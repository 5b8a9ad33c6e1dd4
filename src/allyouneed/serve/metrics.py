"""Figures for Prometheus: how much is asked, how long it takes, what the engine's blocks do."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from allyouneed.serve.driver import News

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """One server's figures, in a registry of their own.

    >>> "allyouneed_requests_running 0.0" in Metrics().text().decode()
    True
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "allyouneed_"
        self.answers = Counter(
            f"{name}http_answers", "Answers by route and status", ["route", "status"], registry=registry
        )
        self.made = Counter(f"{name}generated_tokens", "Tokens made", registry=registry)
        self.read = Counter(f"{name}prompt_tokens", "Tokens of prompts accepted", registry=registry)
        self.ended = Counter(f"{name}finished_requests", "Requests by how they ended", ["reason"], registry=registry)
        self.first = Histogram(f"{name}time_to_first_token_seconds", "From arrival", buckets=SECONDS, registry=registry)
        self.between = Histogram(
            f"{name}time_between_tokens_seconds", "Mean of a pass", buckets=SECONDS, registry=registry
        )
        self.engine: dict[str, Gauge] = {}
        for figure in ("requests_running", "requests_waiting"):
            self._gauge(figure)

    def watch(self, news: News, seconds: float, first: bool) -> None:
        """Count what a request made."""
        self.made.inc(len(news.steps))
        if first:
            self.first.observe(seconds)
        else:
            self.between.observe(seconds / len(news.steps))

    def end(self, reason: str) -> None:
        """Count a request that ended: as its last step says, "enough" where no more was wanted, or "given up"."""
        self.ended.labels(reason).inc()

    def take(self, engine: Any) -> None:
        """Note the engine's own figures; called in the thread that owns it."""
        self._gauge("requests_running").set(engine.running)
        self._gauge("requests_waiting").set(engine.waiting)
        statistics = engine.statistics()
        for name in type(statistics).__dataclass_fields__:
            self._gauge(f"engine_{name}").set(getattr(statistics, name))

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str) -> Gauge:
        if name not in self.engine:
            self.engine[name] = Gauge(f"allyouneed_{name}", name.replace("_", " "), registry=self.registry)
        return self.engine[name]
