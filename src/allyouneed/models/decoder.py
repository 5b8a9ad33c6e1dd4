"""The decoder: a stack that sees no later token, and a head. GPT-2, LLaMA, Bloom and GPT-Neo are configurations of it.

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allyouneed.models.stack import Stack
from allyouneed.nn.caches import Cache
from allyouneed.nn.flops import Reading, product
from allyouneed.nn.sight import last, whole_rows, within_segments


@dataclass(frozen=True)
class Output:
    """`logits` (B, T, V): the unnormalised log-probabilities of each next token."""

    logits: Tensor


class Decoder(Stack):
    """A causal language model: token t is predicted from the tokens before it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Stack.Config):
        """As of the stack, and whether head and embedding are one."""

        tied: bool = True  # the head is the transposed embedding (Press & Wolf 2017)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.retie()
        config.initialise.apply(self, config.num_layers)

    def retie(self) -> None:
        """Make the head share the embedding's tensor, also after either was replaced."""
        if self.config.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        ids: Tensor,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
    ) -> Output:
        """Token ids (B, T) -> logits.

        Args:
            ids: token ids.
            segments: (B, T), the number of each token's document within its row, counted from 1, 0 for padding; None:
                each row is one document. Says the same of left-padded, right-padded and packed rows.
            cache: what came before; the new tokens are kept in it after each row's last. With `segments` they are
                alternative continuations, of which nothing is kept.
            counts: (B), how many tokens of each row are kept, where rows are padded on the right; None: all.
        """
        return Output(self.head(self.hidden(ids, segments, cache, counts)))

    def hidden(
        self,
        ids: Tensor,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """What the head sees: (B, T) -> (B, T, dim)."""
        if cache is None:
            part = self.positions
            return self.read(ids, whole_rows(part, ids) if segments is None else within_segments(part, segments))
        hidden = self.read(ids, cache.sight(self.positions, ids.shape[1], segments, counts), cache)
        if segments is None:
            cache.advance(ids.shape[1] if counts is None else counts)
        return hidden

    def flops(self, reading: Reading) -> int:
        """Of the blocks and the head."""
        return super().flops(reading) + product(self.head, reading.tokens)

    def summary(self, hidden: Tensor, segments: Tensor) -> Tensor:
        """One vector of each row, that of its last token, the only one that has seen all: (B, T, dim) -> (B, dim)."""
        return last(hidden, segments)

    def grow(self, vocab_size: int) -> None:
        """Room for further tokens, in place: their embeddings are drawn with the mean and spread of those there are."""
        more = vocab_size - self.config.vocab_size
        if more <= 0:
            return
        layers: list[nn.Embedding | nn.Linear] = [self.embedding, *([] if self.config.tied else [self.head])]
        for layer in layers:
            known = layer.weight.data
            drawn = known.mean(0) + known.std(0) * torch.randn(more, known.shape[1], device=known.device)
            layer.weight = nn.Parameter(torch.cat((known, drawn.to(known.dtype))))
        self.embedding.num_embeddings = self.head.out_features = vocab_size
        self.config = self.config.replace(vocab_size=vocab_size)
        self.retie()
