"""The encoder: a stack that sees both ways, and BERT's heads on it.

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed.models.stack import Stack
from allyouneed.nn.ffn import ACTIVATIONS
from allyouneed.nn.flops import Reading, product
from allyouneed.nn.sight import last, whole_rows, within_segments


class Encoder(Stack):
    """Every token sees every other of its document (Devlin et al. 2019, sec. 3)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Stack.Config):
        """`types` is how many kinds of tokens have an embedding of their own (BERT: first and second sentence, 2);
        `pooled` adds the layer that makes one vector of a document's first token.
        """

        types: int = 0
        pooled: bool = False

    config: Config
    causal: ClassVar[bool] = False  # true in a subclass that is to be the same model without its later tokens

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.types = nn.Embedding(config.types, config.dim) if config.types else None
        self.pooler = nn.Linear(config.dim, config.dim) if config.pooled else None
        config.initialise.apply(self, config.num_layers)

    def forward(self, ids: Tensor, segments: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> (B, T, dim).

        Args:
            ids, segments, types: as of `hidden`.
        """
        return self.hidden(ids, segments, types)

    def hidden(self, ids: Tensor, segments: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> (B, T, dim), whatever heads a subclass has on it.

        Args:
            ids: token ids.
            segments: (B, T), the number of each token's document within its row, 0 for padding; None: one a row.
            types: (B, T), the kind of each token; None: all of kind 0.
        """
        if segments is None:
            sight = whole_rows(self.positions, ids, causal=self.causal)
        else:
            sight = within_segments(self.positions, segments, causal=self.causal)
        x = self.embed(ids, sight)
        if self.types is not None:
            x = x + self.types(torch.zeros_like(ids) if types is None else types)
        return self.follow(x, sight)

    def pool(self, hidden: Tensor) -> Tensor:
        """tanh(W h₀ + b) of each row's first token: (B, T, dim) -> (B, dim)."""
        assert self.pooler is not None, "this encoder has no pooler"
        return torch.tanh(self.pooler(hidden[:, 0]))

    def repool(self, pooled: bool) -> None:
        """With a pooler, a new one if there was none, or without, in place."""
        if pooled != (self.pooler is not None):
            self.pooler = nn.Linear(self.config.dim, self.config.dim, device=self.device) if pooled else None
            if self.pooler is not None:
                self.config.initialise.apply(self.pooler, self.config.num_layers)
            self.config = self.config.replace(pooled=pooled)

    def summary(self, hidden: Tensor, segments: Tensor) -> Tensor:
        """One vector of each row, that of its first token, pooled where there is a pooler; of a causal encoder that of
        its last token, the only one that has seen all: (B, T, dim) -> (B, dim).
        """
        seen = last(hidden, segments)[:, None] if self.causal else hidden[:, :1]
        return seen[:, 0] if self.pooler is None else self.pool(seen)

    def retie(self) -> None:
        """Nothing is shared."""


@dataclass(frozen=True)
class MaskedOutput:
    """`logits` (B, T, V) of the token at each place; `pairs` (B, 2), is the second sentence the next one: yes, no."""

    logits: Tensor
    pairs: Tensor


class MaskedModel(Encoder):
    """An encoder that tells masked tokens and whether one sentence follows the other (Devlin et al. 2019, 3.1)."""

    borrowed: ClassVar[tuple[str, ...]] = ("embedding",)  # layers whose weight the head computes with as well

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """As of the encoder; the head's transformation has the activation and the norm of the blocks."""

        pooled: bool = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        block: Any = config.blocks[0]
        self.transform, self.transform_norm = nn.Linear(config.dim, config.dim), block.norm.build(config.dim)
        self.activation = ACTIVATIONS[block.channel.activation]
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.pairs = nn.Linear(config.dim, 2)
        config.initialise.apply(self, config.num_layers)

    def forward(self, ids: Tensor, segments: Tensor | None = None, types: Tensor | None = None) -> MaskedOutput:  # type: ignore[override]
        """Token ids (B, T) -> logits of tokens and pairs."""
        hidden = self.hidden(ids, segments, types)
        return MaskedOutput(self.tell(hidden), self.pairs(self.pool(hidden)))

    def flops(self, reading: Reading) -> int:
        """Of the blocks, the head at every place, and what is made of each row's first token."""
        assert self.pooler is not None
        told = product(self.transform, reading.tokens) + 2 * self.embedding.weight.numel() * reading.tokens
        return super().flops(reading) + told + product(self.pooler, reading.rows) + product(self.pairs, reading.rows)

    def tell(self, hidden: Tensor) -> Tensor:
        """The logits of the tokens at some places, the head being the transposed embedding: (…, dim) -> (…, V)."""
        x = self.transform_norm(self.activation(self.transform(hidden)))
        return F.linear(x, self.embedding.weight, self.bias)
