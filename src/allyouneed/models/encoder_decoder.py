"""Encoder and decoder: one stack reads the source both ways, the other writes the target and looks at what was read.

Shapes: B rows, M tokens of source, T tokens of target, V = vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from allyouneed import core
from allyouneed.models.decoder import Output
from allyouneed.models.stack import Stack
from allyouneed.nn.caches import Cache
from allyouneed.nn.flops import Reading, product
from allyouneed.nn.sight import Memory, whole_rows, within_segments


class EncoderDecoder(core.Configured, nn.Module):
    """p(target | source), token by token (Vaswani et al. 2017, sec. 3.1; Raffel et al. 2020, sec. 2.1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """Both stacks share one embedding, and where `tied` the head does too."""

        encoder: Stack.Config
        decoder: Stack.Config
        tied: bool = True
        head_scale: float = 1.0  # what the decoder's output is multiplied by before the head (T5, tied: 1/√dim)
        head_bias: bool = False

        def num_parameters(self) -> int:
            """Counted on the meta device, so that any size can be asked for."""
            with torch.device("meta"):
                return sum(p.numel() for p in self.build().parameters())

        @property
        def layers(self) -> dict[str, int]:
            """How many layers each sign stands for in the names of tensors."""
            return {"i": self.encoder.num_layers, "j": self.decoder.num_layers}

        @property
        def context(self) -> int:
            """The longest target it is meant for."""
            return self.decoder.context

        @property
        def vocab_size(self) -> int:
            """Of source and target alike."""
            return self.decoder.vocab_size

    def __init__(self, config: Config) -> None:
        super().__init__()
        if (config.encoder.vocab_size, config.encoder.dim) != (config.decoder.vocab_size, config.decoder.dim):
            raise core.InputError("encoder and decoder share an embedding: vocab_size and dim must be the same")
        self.config = config
        self.encoder, self.decoder = config.encoder.build(), config.decoder.build()
        self.head = nn.Linear(config.decoder.dim, config.decoder.vocab_size, bias=config.head_bias)
        self.retie()
        config.encoder.initialise.apply(self.encoder, config.encoder.num_layers)
        config.decoder.initialise.apply(self.decoder, config.decoder.num_layers)

    def retie(self) -> None:
        """Make embeddings and head share one tensor, also after one of them was replaced."""
        self.decoder.embedding.weight = self.encoder.embedding.weight
        if self.config.tied:
            self.head.weight = self.encoder.embedding.weight

    def forward(
        self,
        source: Tensor,
        ids: Tensor,
        source_segments: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Output:
        """Source ids (B, M) and target ids (B, T) -> logits (B, T, V) of each next target token.

        Args:
            source: what is read.
            ids: what has been written, beginning with the start token.
            source_segments: (B, M), 1, or 0 for padding.
            segments: (B, T), the same for the target.
        """
        memory = self.remember(source, source_segments)
        if segments is None:
            sight = whole_rows(self.decoder.positions, ids, memory=memory)
        else:
            sight = within_segments(self.decoder.positions, segments, memory=memory)
        return Output(self.predict(self.decoder.read(ids, sight)))

    def remember(self, source: Tensor, segments: Tensor | None = None) -> Memory:
        """What the decoder sees of a source (B, M)."""
        if segments is None:
            return Memory(self.encoder.read(source, whole_rows(self.encoder.positions, source, causal=False)))
        states = self.encoder.read(source, within_segments(self.encoder.positions, segments, causal=False))
        return Memory(states, segments)

    def predict(self, hidden: Tensor) -> Tensor:
        """(…, dim) -> logits (…, V)."""
        logits: Tensor = self.head(self.config.head_scale * hidden)
        return logits

    def flops(self, source: Reading, target: Reading) -> int:
        """FLOPs of the matrix products of one forward pass; the target's memory is the source."""
        written = replace(target, memory=source)
        return self.encoder.flops(source) + self.decoder.flops(written) + product(self.head, target.tokens)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


class Answering:
    """The decoder of a model, as what the engine generates with: what the encoder read is each request's memory.

    >>> # Engine(Answering(model), eos_ids).add(Request(ids=[start], sampling=..., memory=model.remember(source)))
    """

    answers = True

    def __init__(self, model: EncoderDecoder) -> None:
        self.model, self.config, self.device = model, model.config, model.device
        self.limit = model.decoder.limit

    def new_cache(self, batch: int, capacity: int, memory: Memory | None = None) -> Cache:
        """An empty cache for a target of each row of the memory."""
        return self.model.decoder.new_cache(batch, capacity, memory)

    def hidden(
        self,
        ids: Tensor,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, dim)."""
        assert cache is not None and segments is None
        decoder = self.model.decoder
        hidden = decoder.read(ids, cache.sight(decoder.positions, ids.shape[1], counts=counts), cache)
        cache.advance(ids.shape[1] if counts is None else counts)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """(…, dim) -> logits (…, V)."""
        return self.model.predict(hidden)


@torch.inference_mode()
def cross_weights(module: EncoderDecoder, source: Tensor, ids: Tensor) -> Tensor:
    """How much each place of the target looks at each of the source in the last layer, mean of its heads.

    Source ids (B, M) and target ids (B, T) as `forward` has them, without padding -> (B, T, M), rows of which add up
    to 1.
    """
    cross, seen = module.decoder.blocks[-1].cross, []
    hook = cross.register_forward_pre_hook(
        lambda part, given: seen.append(part.weights(given[0], given[1].memory.states))
    )
    with hook:
        module(source, ids)
    return torch.cat(seen).mean(1)
