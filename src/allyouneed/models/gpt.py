"""GPT (Radford et al. 2018): the 2017 decoder without its encoder – norms after each branch, learned positions."""

from __future__ import annotations

from typing import Any

from allyouneed.core.errors import unknown
from allyouneed.models import gpt2
from allyouneed.models.checkpoints.family import Family, one_kind_of_block
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, head, same
from allyouneed.models.decoder import Decoder
from allyouneed.nn.block import PostNorm
from allyouneed.nn.norms import NoNorm

# transformers' names of activations in this family, where "gelu" is its approximation
SIZES = {"117M": (12, 12, 768)}
ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu"}


def architecture(
    *,
    vocab_size: int = 40478,
    context: int = 512,
    dim: int,
    num_layers: int,
    num_heads: int,
    activation: str = "gelu_tanh",
    eps: float = 1e-5,
    tied: bool = True,
    dropout: float = 0.0,
) -> Decoder.Config:
    """A GPT of any size; `dropout` is that of embeddings, branches and attention weights alike."""
    config = gpt2.architecture(
        vocab_size=vocab_size,
        context=context,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        activation=activation,
        eps=eps,
        tied=tied,
        dropout=dropout,
    )
    block = config.blocks[0].replace(placement=PostNorm())
    return config.replace(blocks=(block,), norm=NoNorm.Config())


def sized(name: str = "117M") -> Decoder.Config:
    """The one published size (sec. 4.1).

    Raises:
        InputError: no such size.
    """
    if name not in SIZES:
        raise unknown("size of GPT", name, SIZES)
    num_layers, num_heads, dim = SIZES[name]
    return architecture(dim=dim, num_layers=num_layers, num_heads=num_heads, dropout=0.1)


def _read(fields: Fields) -> Decoder.Config:
    config = architecture(
        vocab_size=fields.integer("vocab_size", 40478),
        context=fields.integer("n_positions", 512),
        dim=fields.integer("n_embd", 768),
        num_layers=fields.integer("n_layer", 12),
        num_heads=fields.integer("n_head", 12),
        activation=ACTIVATIONS[fields.choice("afn", ACTIVATIONS, "gelu")],
        eps=fields.number("layer_norm_epsilon", 1e-5),
        tied=fields.boolean("tie_word_embeddings", True),
    )
    return gpt2.with_dropout(
        config,
        branches=fields.number("resid_pdrop", 0.1, most=1.0),
        attention=fields.number("attn_pdrop", 0.1, most=1.0),
        embeddings=fields.number("embd_pdrop", 0.1, most=1.0),
    )


def _write(config: Decoder.Config) -> dict[str, Any]:
    block = one_kind_of_block(config)
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.dim,
        "n_layer": config.num_layers,
        "n_head": block.mixer.num_heads,
        "afn": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[block.channel.activation],
        "layer_norm_epsilon": block.norm.eps,
        "tie_word_embeddings": config.tied,
        "resid_pdrop": block.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": block.mixer.dropout,
    }


def _rules(config: Decoder.Config) -> tuple[Rule, ...]:
    return (
        same("embedding.weight", "transformer.tokens_embed.weight"),
        same("positions.embedding.weight", "transformer.positions_embed.weight"),
        *gpt2.block_rules(),
        head("lm_head.weight", tied=config.tied),
    )


EXAMPLE = architecture(vocab_size=53, context=48, dim=20, num_layers=2, num_heads=5)

HUGGING_FACE = Family("openai-gpt", "OpenAIGPTLMHeadModel", _read, _write, _rules, EXAMPLE)
