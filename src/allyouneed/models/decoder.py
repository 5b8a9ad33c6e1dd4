"""The decoder: embeddings, blocks, a norm and a head. GPT-2, LLaMA, Bloom and GPT-Neo are configurations of it.

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.nn.block import Block
from allyouneed.nn.caches import Cache
from allyouneed.nn.initialise import Normal
from allyouneed.nn.norms import LayerNorm, NoNorm, Norm
from allyouneed.nn.positions import Alibi, Learned, Positions, RelativeBias, Rotary, Sinusoidal
from allyouneed.nn.sight import whole_rows, within_segments

AnyPositions = (
    Positions.Config | Learned.Config | Sinusoidal.Config | Rotary.Config | Alibi.Config | RelativeBias.Config
)


@dataclass(frozen=True)
class Output:
    """`logits` (B, T, V): the unnormalised log-probabilities of each next token."""

    logits: Tensor


class Decoder(core.Configured, nn.Module):
    """A causal language model: token t is predicted from the tokens before it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`blocks` are laid in turn, again and again, until there are `num_layers` (GPT-3 alternates two kinds)."""

        vocab_size: int
        context: int  # the longest sequence it is meant for; only learned positions cannot go beyond
        dim: int
        num_layers: int
        blocks: tuple[Block.Config, ...]
        positions: AnyPositions = field(default_factory=Rotary.Config)
        embedding_scale: float = 1.0  # what embeddings are multiplied by (Vaswani et al. 2017, sec. 3.4: √dim)
        embedding_norm: Norm = field(default_factory=NoNorm.Config)
        norm: Norm = field(default_factory=LayerNorm.Config)
        tied: bool = True  # the head is the transposed embedding (Press & Wolf 2017)
        dropout: float = 0.0  # of the embeddings
        initialise: Normal = field(default_factory=Normal)

        def num_parameters(self) -> int:
            """Counted on the meta device, so that any size can be asked for."""
            with torch.device("meta"):
                return sum(p.numel() for p in self.build().parameters())

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        if not config.blocks or config.num_layers < 0:
            raise core.InputError(f"blocks={config.blocks}, num_layers={config.num_layers}; at least one kind of block")
        mixer = config.blocks[0].mixer
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = config.positions.build(
            dim=config.dim, num_heads=mixer.num_heads, head_dim=mixer.head_dim_of(config.dim), context=config.context
        )
        self.embedding_norm = config.embedding_norm.build(config.dim)
        kinds = config.blocks
        self.blocks = nn.ModuleList(kinds[i % len(kinds)].build(config.dim) for i in range(config.num_layers))
        self.norm = config.norm.build(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        config.initialise.apply(self, config.num_layers)

    def forward(self, ids: Tensor, segments: Tensor | None = None, cache: Cache | None = None) -> Output:
        """Token ids (B, T) -> logits.

        Args:
            ids: token ids.
            segments: (B, T), the number of each token's document within its row, counted from 1, 0 for padding; None:
                each row is one document. Says the same of left-padded, right-padded and packed rows.
            cache: what came before; new tokens are written to it after each row's last. The caller then says with
                `cache.advance` how many of them to keep. With `segments` they are alternative continuations.
        """
        return Output(self.head(self.hidden(ids, segments, cache)))

    def hidden(self, ids: Tensor, segments: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the head sees: (B, T) -> (B, T, dim)."""
        if cache is not None:
            sight = cache.sight(self.positions, ids.shape[1], segments)
        elif segments is not None:
            sight = within_segments(self.positions, segments)
        else:
            sight = whole_rows(self.positions, ids)
        x = self.embedding(ids)
        if self.config.embedding_scale != 1.0:
            x = self.config.embedding_scale * x
        x = self.embedding_norm(self.positions.embed(x, sight.queries))
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, sight, None if cache is None else cache.layers[i])
        return self.norm(x)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens."""
        mixer = self.config.blocks[0].mixer
        return Cache(
            num_layers=self.config.num_layers,
            batch=batch,
            num_kv_heads=mixer.num_kv_heads or mixer.num_heads,
            capacity=capacity,
            head_dim=mixer.head_dim_of(self.config.dim),
            dtype=next(self.parameters()).dtype,
            device=self.device,
        )
