"""The Transformer of 2017 (Vaswani et al.): encoder and decoder, norms after each branch, sinusoids, one embedding."""

from __future__ import annotations

from allyouneed.core.errors import unknown
from allyouneed.models import marian
from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.nn.initialise import Xavier
from allyouneed.nn.positions import AnyPositions, Sinusoidal

# layers of each stack, heads, dim, hidden dim, dropout (table 3)
SIZES = {"base": (6, 8, 512, 2048, 0.1), "big": (6, 16, 1024, 4096, 0.3)}


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
    """A Transformer of any size; `num_layers` is that of each stack, `head_dim` the paper's d_k and d_v.

    Its equations have no biases in attention, and sines and cosines take turns.
    """
    config = marian.architecture(
        vocab_size=vocab_size,
        context=context,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        positions=positions or Sinusoidal.Config(),
        bias=False,
        head_bias=False,
        dropout=dropout,
    )
    stacks = {name: getattr(config, name).replace(initialise=Xavier()) for name in ("encoder", "decoder")}
    return config.replace(**stacks)


def sized(name: str = "base") -> EncoderDecoder.Config:
    """One of the two published sizes; English and German share 37000 tokens (sec. 5.1)."""
    if name not in SIZES:
        raise unknown("size of the Transformer", name, SIZES)
    num_layers, num_heads, dim, hidden_dim, dropout = SIZES[name]
    return architecture(dim=dim, num_layers=num_layers, num_heads=num_heads, hidden_dim=hidden_dim, dropout=dropout)
