"""A stack: embeddings, blocks and a last norm. Decoders, encoders and both sides of a translator are stacks.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.core.outline import outlined
from allyouneed.nn.block import AnyBlock, Block
from allyouneed.nn.caches import Cache, Rows
from allyouneed.nn.flops import Reading
from allyouneed.nn.initialise import Initialise, Normal
from allyouneed.nn.kernels import AnyKernel
from allyouneed.nn.norms import LayerNorm, NoNorm, Norm
from allyouneed.nn.positions import AnyPositions, Learned, Rotary
from allyouneed.nn.sight import Memory, Sight

VOCABULARY = ("embedding.", "positions.", "types.", "head.")  # where names of such tensors begin, in all stacks


class Stack(core.Configured, nn.Module):
    """From token ids to a vector a token; who sees whom is said by the caller."""

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`blocks` are laid in turn, again and again, until there are `num_layers` (GPT-3 alternates two kinds)."""

        vocab_size: int
        context: int  # the longest sequence it is meant for; only learned positions cannot go beyond
        dim: int
        num_layers: int
        blocks: tuple[AnyBlock, ...]
        positions: AnyPositions = field(default_factory=Rotary.Config)
        embedding_scale: float = 1.0  # what embeddings are multiplied by (Vaswani et al. 2017, sec. 3.4: √dim)
        embedding_norm: Norm = field(default_factory=NoNorm.Config)
        norm: Norm = field(default_factory=LayerNorm.Config)
        dropout: float = 0.0  # of the embeddings
        norm_dropout: float = 0.0  # of what the last norm gives (Raffel et al. 2020, sec. 2.1)
        initialise: Initialise = field(default_factory=Normal)

        def num_parameters(self, *, embeddings: bool = True) -> int:
            """Counted on the meta device, so that any size can be asked for.

            Without `embeddings`, those of vocabulary and positions, the head being one: N of Kaplan et al. 2020
            (sec. 1.3), of which alone their law of size is regular (fig. 6).
            """
            with outlined():
                named = self.build().named_parameters()
            return sum(p.numel() for name, p in named if embeddings or not name.startswith(VOCABULARY))

        def flops(self, rows: int, length: int) -> int:
            """Of one forward pass over so many rows; training takes `nn.flops.TRAINING` times as many."""
            with outlined():
                return int(self.build().flops(Reading.of(rows=rows, length=length)))

        def with_kernel(self, kernel: AnyKernel) -> Self:
            """The same model, attention computed another way; its weights are the same."""
            return self.replace(blocks=tuple(block.with_kernel(kernel) for block in self.blocks))

        @property
        def layers(self) -> dict[str, int]:
            """How many layers each sign stands for in the names of tensors (`models.checkpoints.names`)."""
            return {"i": self.num_layers}

    answers = False  # whether what it writes follows from a memory

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        if not config.blocks or config.num_layers < 0:
            raise core.InputError(f"blocks={config.blocks}, num_layers={config.num_layers}; at least one kind of block")
        heads = (block.heads(config.dim) for block in config.blocks)
        num_heads, head_dim = next(filter(None, heads), (1, config.dim))  # of the first kind that has any
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = config.positions.build(
            dim=config.dim, num_heads=num_heads, head_dim=head_dim, context=config.context
        )
        self.embedding_norm = config.embedding_norm.build(config.dim)
        kinds = config.blocks
        self.blocks = nn.ModuleList(kinds[i % len(kinds)].build(config.dim) for i in range(config.num_layers))
        self.norm = config.norm.build(config.dim)

    def read(self, ids: Tensor, sight: Sight, cache: Cache | None = None) -> Tensor:
        """Token ids (B, T) -> (B, T, dim)."""
        return self.follow(self.embed(ids, sight), sight, cache)

    def embed(self, ids: Tensor, sight: Sight) -> Tensor:
        """Token ids and their positions as vectors: (B, T) -> (B, T, dim)."""
        x = self.embedding(ids)
        if self.config.embedding_scale != 1.0:
            x = self.config.embedding_scale * x
        return self.positions.embed(x, sight.queries)

    def follow(self, x: Tensor, sight: Sight, cache: Cache | None = None) -> Tensor:
        """Embeddings with their positions -> what the blocks make of them: (B, T, dim) -> (B, T, dim)."""
        x = F.dropout(self.embedding_norm(x), self.config.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, sight, None if cache is None else cache.layers[i])
        return F.dropout(self.norm(x), self.config.norm_dropout, self.training)

    def flops(self, reading: Reading) -> int:
        """FLOPs of the matrix products of one forward pass."""
        return sum(cast("Block", block).flops(reading) for block in self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def new_cache(self, batch: int, capacity: int, memory: Memory | None = None) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens; of any number where no layer remembers all."""
        rows, dtype = Rows(batch, self.device), next(self.parameters()).dtype
        layers = [block.new_cache(rows, capacity, dtype) for block in self.blocks]  # type: ignore[operator]
        return Cache(rows, layers, capacity if self._remembers_all else None, memory)

    @property
    def limit(self) -> int | None:
        """The longest text it continues: its context; None, any length, where no layer remembers all."""
        bounded = self._remembers_all or isinstance(self.config.positions, Learned.Config)
        return self.config.context if bounded else None

    @property
    def _remembers_all(self) -> bool:
        return any(block.remembers_all for block in self.blocks)
