"""The Transformer of 2017 (Vaswani et al.): encoder and decoder, norms after each branch, sinusoids, one embedding."""

from __future__ import annotations

from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.models.stack import Stack
from allyouneed.nn.attention import Attention, CrossAttention
from allyouneed.nn.block import Block, CrossBlock, PostNorm
from allyouneed.nn.ffn import MLP
from allyouneed.nn.initialise import Xavier
from allyouneed.nn.norms import NoNorm
from allyouneed.nn.positions import AnyPositions, Sinusoidal

# layers of either stack, dim, hidden dim, heads, dropout (table 3)
SIZES = {"base": (6, 512, 2048, 8, 0.1), "big": (6, 1024, 4096, 16, 0.3)}


def architecture(
    *,
    vocab_size: int = 37000,
    context: int = 512,
    dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    head_dim: int | None = None,
    dropout: float = 0.0,
    positions: AnyPositions | None = None,
) -> EncoderDecoder.Config:
    """A Transformer of any size; `num_layers` is that of either stack, `head_dim` the paper's d_k and d_v."""
    mixer = Attention.Config(num_heads=num_heads, head_dim=head_dim)
    cross = CrossAttention.Config(num_heads=num_heads, head_dim=head_dim)
    channel = MLP.Config(hidden_dim=hidden_dim, activation="relu")
    placement = PostNorm()
    reads = Block.Config(mixer=mixer, channel=channel, placement=placement, dropout=dropout)
    writes = CrossBlock.Config(mixer=mixer, cross=cross, channel=channel, placement=placement, dropout=dropout)

    def stack(block: Block.Config) -> Stack.Config:
        return Stack.Config(
            vocab_size=vocab_size,
            context=context,
            dim=dim,
            num_layers=num_layers,
            blocks=(block,),
            positions=positions or Sinusoidal.Config(),
            embedding_scale=dim**0.5,  # sec. 3.4
            norm=NoNorm.Config(),
            dropout=dropout,
            initialise=Xavier(),
        )

    return EncoderDecoder.Config(encoder=stack(reads), decoder=stack(writes))


def sized(name: str = "base") -> EncoderDecoder.Config:
    """One of the two published sizes."""
    num_layers, dim, hidden_dim, num_heads, dropout = SIZES[name]
    return architecture(dim=dim, num_layers=num_layers, num_heads=num_heads, hidden_dim=hidden_dim, dropout=dropout)
