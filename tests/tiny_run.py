"""A training run of milliseconds, for the tests of the loop: a model with dropout, batches from a private generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allyouneed.data.batches import Generated
from allyouneed.objectives.next_token import next_token
from allyouneed.train.loop import Trained, Training, train
from allyouneed.train.schedules import Linear

VOCABULARY = 11


@dataclass
class Output:
    logits: Tensor


class Tiny(nn.Module):
    """Looks at the running mean of the embeddings so far; its head is tied to the embedding."""

    def __init__(self, dropout: float = 0.2, dim: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.mix = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Output:
        x = self.embedding(ids)
        counts = torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]
        x = x + self.mix(self.dropout(x.cumsum(1) / counts)).tanh()
        return Output(self.head(self.norm(x)))


def tiny(seed: int = 0, **options: Any) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(**options)


def counting(generator: torch.Generator, rows: int = 8, length: int = 6) -> dict[str, Tensor]:
    """Rows that count upwards from somewhere; some targets are masked, more in some rows than in others."""
    ids = (torch.randint(VOCABULARY, (rows, 1), generator=generator) + torch.arange(length)) % VOCABULARY
    masked = torch.rand(rows, length, generator=generator) < torch.linspace(0, 0.9, rows)[:, None]
    return {"ids": ids, "targets": torch.where(masked, -100, (ids + 1) % VOCABULARY)}


def batches(seed: int = 0, **options: Any) -> Generated:
    return Generated(lambda generator: counting(generator, **options), seed=seed)


def settings(**changes: Any) -> Training:
    return Training(**{"steps": 12, "schedule": Linear(warmup=3), "log_every": 1, "save_every": 3} | changes)


def run(module: nn.Module, folder: Path | None = None, training: Training | None = None, **options: Any) -> Trained:
    data = options.pop("data", None) or batches()
    objective = options.pop("objective", next_token)
    return train(module, objective, data, training or settings(), folder=folder, quiet=True, **options)


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def same(a: nn.Module, b: nn.Module) -> bool:
    there = b.state_dict()
    return all(torch.equal(x, there[name]) for name, x in a.state_dict().items())


class At:
    """A callback that does something at a step."""

    def __init__(self, step: int, what: Callable[[], Any]) -> None:
        self.step, self.what = step, what

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.step:
            self.what()

    def on_end(self) -> None: ...
