"""Bloom (BigScience 2022): a GPT with ALiBi for positions and a layer norm on the embeddings."""

from __future__ import annotations

from typing import Any

from allyouneed.core.errors import unknown
from allyouneed.models import gpt2
from allyouneed.models.checkpoints.family import Family, one_kind_of_block
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, both, by_head, head, same
from allyouneed.models.decoder import Decoder
from allyouneed.nn.norms import LayerNorm
from allyouneed.nn.positions import Alibi

# layers, heads, dim (table 3)
SIZES = {
    "560M": (24, 16, 1024),
    "1.1B": (24, 16, 1536),
    "1.7B": (24, 16, 2048),
    "3B": (30, 32, 2560),
    "7.1B": (30, 32, 4096),
    "176B": (70, 112, 14336),
}


def architecture(
    *,
    vocab_size: int = 250880,
    context: int = 2048,
    dim: int,
    num_layers: int,
    num_heads: int,
    eps: float = 1e-5,
    tied: bool = True,
    dropout: float = 0.0,
) -> Decoder.Config:
    """A Bloom of any size."""
    config = gpt2.architecture(
        vocab_size=vocab_size,
        context=context,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        eps=eps,
        tied=tied,
        dropout=dropout,
    )
    return config.replace(positions=Alibi.Config(), embedding_norm=LayerNorm.Config(eps=eps), dropout=0.0)


def sized(name: str = "176B") -> Decoder.Config:
    """One of the six published sizes."""
    if name not in SIZES:
        raise unknown("size of Bloom", name, SIZES)
    num_layers, num_heads, dim = SIZES[name]
    return architecture(dim=dim, num_layers=num_layers, num_heads=num_heads)


def _read(fields: Fields) -> Decoder.Config:
    fields.expect("apply_residual_connection_post_layernorm", False)
    config = architecture(
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("seq_length", 2048),
        dim=fields.integer("hidden_size"),
        num_layers=fields.integer("n_layer"),
        num_heads=fields.integer("n_head"),
        eps=fields.number("layer_norm_epsilon", 1e-5),
        tied=fields.boolean("tie_word_embeddings", True),
    )
    return gpt2.with_dropout(
        config,
        branches=fields.number("hidden_dropout", 0.0, most=1.0),
        attention=fields.number("attention_dropout", 0.0, most=1.0),
        embeddings=0.0,
    )


def _write(config: Decoder.Config) -> dict[str, Any]:
    block = one_kind_of_block(config)
    return {
        "vocab_size": config.vocab_size,
        "seq_length": config.context,
        "hidden_size": config.dim,
        "n_layer": config.num_layers,
        "n_head": block.mixer.num_heads,
        "layer_norm_epsilon": block.norm.eps,
        "tie_word_embeddings": config.tied,
        "hidden_dropout": block.dropout,
        "attention_dropout": block.mixer.dropout,
    }


def _rules(config: Decoder.Config) -> tuple[Rule, ...]:
    theirs, num_heads = "transformer.h.{i}", one_kind_of_block(config).mixer.num_heads
    fused = [
        by_head(
            (f"blocks.{{i}}.mixer.{name}.{kind}" for name in "qkv"),
            f"{theirs}.self_attention.query_key_value.{kind}",
            num_heads,
        )
        for kind in ("weight", "bias")
    ]
    return (
        same("embedding.weight", "transformer.word_embeddings.weight"),
        *both("embedding_norm", "transformer.word_embeddings_layernorm"),
        *both("blocks.{i}.mixer_norm", f"{theirs}.input_layernorm"),
        *fused,
        *both("blocks.{i}.mixer.out", f"{theirs}.self_attention.dense"),
        *both("blocks.{i}.channel_norm", f"{theirs}.post_attention_layernorm"),
        *both("blocks.{i}.channel.up", f"{theirs}.mlp.dense_h_to_4h"),
        *both("blocks.{i}.channel.out", f"{theirs}.mlp.dense_4h_to_h"),
        *both("norm", "transformer.ln_f"),
        head("lm_head.weight", tied=config.tied),
    )


EXAMPLE = architecture(vocab_size=53, context=48, dim=24, num_layers=2, num_heads=6)

HUGGING_FACE = Family("bloom", "BloomForCausalLM", _read, _write, _rules, EXAMPLE)
