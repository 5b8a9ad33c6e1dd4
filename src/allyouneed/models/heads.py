"""Heads: what a stack tells of a text beside its tokens – a class, the right choice, a span, a label a token.

A batch (`data.labelled`) holds N readings a row: one text, a pair read both ways round, or one for each choice.
Shapes: B rows, N readings, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.models.decoder import Decoder
from allyouneed.models.encoder import Encoder
from allyouneed.models.recurrent import RecurrentModel

AnyReader = Decoder.Config | Encoder.Config | RecurrentModel.Config


class Head(core.Configured, nn.Module):
    """A model and one linear layer on the vectors it makes of tokens. Subclasses say on which, and what is told.

    `forward` gives logits (B, L, C): L answers a row out of C each, −inf where there is nothing to choose.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`labels` are the names of the classes; `dropout` stands before the layer (Radford et al. 2018, sec. 4.1);
        `pad_id` is what transformers knows padding by, where rows are more than one.
        """

        model: AnyReader
        labels: tuple[str, ...] = ()
        bias: bool = True
        dropout: float = 0.1
        pad_id: int | None = None

        def num_parameters(self) -> int:
            """Counted on the meta device, so that any size can be asked for."""
            with torch.device("meta"):
                return sum(p.numel() for p in self.build().parameters())

        @property
        def layers(self) -> dict[str, int]:
            """As of the model."""
            assert not isinstance(self.model, RecurrentModel.Config), "a recurrent model has no numbered blocks"
            return self.model.layers

    config: Config

    def __init__(self, config: Config, model: Any = None) -> None:
        """`model`, where it is given, is the one of `config.model` that has been trained before."""
        super().__init__()
        self.config = config
        self.model = config.model.build() if model is None else model
        self.layer = nn.Linear(config.model.dim, self.outputs, bias=config.bias)
        nn.init.normal_(self.layer.weight, std=0.02)
        if config.bias:
            nn.init.zeros_(self.layer.bias)

    @property
    def outputs(self) -> int:
        """What the layer gives for each vector it is handed."""
        return len(self.config.labels)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """A batch of `ids`, `segments` and, for an encoder, `types` (B, N, T) -> logits (B, L, C)."""
        return self.tell(self.hidden(batch), batch)

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model makes of each token: (B, N, T, dim)."""
        kinds = {"types": batch["types"].flatten(0, 1)} if "types" in batch and isinstance(self.model, Encoder) else {}
        hidden: Tensor = self.model.hidden(batch["ids"].flatten(0, 1), batch["segments"].flatten(0, 1), **kinds)
        return hidden.unflatten(0, batch["ids"].shape[:2])

    def tell(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, L, C) from the vectors of all tokens (B, N, T, dim)."""
        raise AssertionError("a subclass says what is told")

    def summaries(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """One vector for each reading: (B, N, dim)."""
        found: Tensor = self.model.summary(hidden.flatten(0, 1), batch["segments"].flatten(0, 1))
        return found.unflatten(0, hidden.shape[:2])

    def told(self, vectors: Tensor) -> Tensor:
        """The layer on vectors, some of whose numbers are dropped in training: (…, dim) -> (…, outputs)."""
        logits: Tensor = self.layer(F.dropout(vectors, self.config.dropout, self.training))
        return logits

    def retie(self) -> None:
        """Make shared tensors one again."""
        self.model.retie()


class Classifier(Head):
    """One class for all readings of a row, whose vectors are added up: a text, a pair, or a pair both ways round
    (Radford et al. 2018, sec. 3.3). Logits (B, 1, C).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Head.Config):
        """As of every head."""

    def tell(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, N, T, dim) -> (B, 1, C)."""
        return self.told(self.summaries(hidden, batch).sum(1, keepdim=True))


class Chooser(Head):
    """Which of a row's readings is the right one (Radford et al. 2018, sec. 3.3). Logits (B, 1, N)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Head.Config):
        """As of every head; choices have no names."""

    @property
    def outputs(self) -> int:
        """One number for each reading."""
        return 1

    def tell(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, N, T, dim) -> (B, 1, N)."""
        told = self.told(self.summaries(hidden, batch))[..., 0]
        return told.masked_fill((batch["segments"] == 0).all(-1), float("-inf"))[:, None]


class Tagger(Head):
    """A label for each token (Devlin et al. 2019, sec. 5.3). Logits (B, T, C)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Head.Config):
        """As of every head."""

    def tell(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, 1, T, dim) -> (B, T, C)."""
        return self.told(hidden[:, 0])


class SpanReader(Head):
    """Where an answer begins and where it ends (Devlin et al. 2019, sec. 4.2). Logits (B, 2, T)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Head.Config):
        """As of every head; places have no names."""

    @property
    def outputs(self) -> int:
        """Beginning and end."""
        return 2

    def tell(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, 1, T, dim) -> (B, 2, T)."""
        told = self.told(hidden[:, 0]).transpose(1, 2)
        return told.masked_fill(batch["segments"] == 0, float("-inf"))
