"""BERT (Devlin et al. 2019): an encoder with learned positions and segment embeddings, norms after each branch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from allyouneed.core.errors import unknown
from allyouneed.models.checkpoints.family import ACTIVATIONS, Family, activation_name, one_kind_of_block
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, again, both, same
from allyouneed.models.encoder import Encoder, MaskedModel
from allyouneed.nn.attention import Attention
from allyouneed.nn.block import Block, PostNorm
from allyouneed.nn.ffn import MLP
from allyouneed.nn.initialise import Normal
from allyouneed.nn.norms import LayerNorm, NoNorm
from allyouneed.nn.positions import Learned

# layers, heads, dim (sec. 3)
SIZES = {"base": (12, 12, 768), "large": (24, 16, 1024)}


def architecture(
    *,
    vocab_size: int = 30522,
    context: int = 512,
    dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int | None = None,
    activation: str = "gelu",
    types: int = 2,
    eps: float = 1e-12,
    dropout: float = 0.0,
) -> MaskedModel.Config:
    """A BERT of any size with its heads for pre-training; `encoder_of` leaves these out.

    `dropout` is that of embeddings, branches and attention weights alike. The vocabulary is the released uncased one.

    >>> architecture(vocab_size=99, dim=8, num_layers=1, num_heads=2).blocks[0].channel.hidden_dim
    32
    """
    block = Block.Config(
        mixer=Attention.Config(num_heads=num_heads, bias=True, out_bias=True, dropout=dropout),
        channel=MLP.Config(hidden_dim=hidden_dim or 4 * dim, activation=activation),
        norm=LayerNorm.Config(eps=eps),
        placement=PostNorm(),
        dropout=dropout,
    )
    return MaskedModel.Config(
        vocab_size=vocab_size,
        context=context,
        dim=dim,
        num_layers=num_layers,
        blocks=(block,),
        positions=Learned.Config(),
        embedding_norm=LayerNorm.Config(eps=eps),
        norm=NoNorm.Config(),
        types=types,
        dropout=dropout,
        initialise=Normal(std=0.02, scale_residual=False),
    )


def sized(name: str = "base") -> MaskedModel.Config:
    """One of the two published sizes: `base` has 110 M parameters, `large` 340 M, as the paper rounds them."""
    if name not in SIZES:
        raise unknown("size of BERT", name, SIZES)
    num_layers, num_heads, dim = SIZES[name]
    return architecture(dim=dim, num_layers=num_layers, num_heads=num_heads, dropout=0.1)  # appendix A.2


def encoder_of(config: Encoder.Config) -> Encoder.Config:
    """The same encoder, pooled, without the heads of pre-training."""
    return Encoder.Config(**{field.name: getattr(config, field.name) for field in fields(Encoder.Config)})


def encoder_from(model: MaskedModel) -> Encoder:
    """The encoder of a pre-trained model, its tensors shared with it."""
    encoder: Encoder = encoder_of(model.config).build()
    encoder.load_state_dict({name: model.state_dict()[name] for name in encoder.state_dict()}, assign=True)
    return encoder.train(model.training)


def _read(found: Fields) -> MaskedModel.Config:
    for name, only in (
        ("is_decoder", False),
        ("add_cross_attention", False),
        ("position_embedding_type", "absolute"),
        ("tie_word_embeddings", True),
    ):
        found.expect(name, only)
    dim = found.integer("hidden_size", 768)
    config = architecture(
        vocab_size=found.integer("vocab_size", 30522),
        context=found.integer("max_position_embeddings", 512),
        dim=dim,
        num_layers=found.integer("num_hidden_layers", 12),
        num_heads=found.integer("num_attention_heads", 12),
        hidden_dim=found.integer("intermediate_size", 4 * dim),
        activation=ACTIVATIONS[found.choice("hidden_act", ACTIVATIONS, "gelu")],
        types=found.integer("type_vocab_size", 2),
        eps=found.number("layer_norm_eps", 1e-12),
    )
    (block,), rate = config.blocks, found.number("hidden_dropout_prob", 0.1, most=1.0)
    weights = block.mixer.replace(dropout=found.number("attention_probs_dropout_prob", 0.1, most=1.0))
    return config.replace(
        blocks=(block.replace(dropout=rate, mixer=weights),),
        dropout=rate,
        initialise=Normal(std=found.number("initializer_range", 0.02), scale_residual=False),
    )


def _write(config: Encoder.Config) -> dict[str, Any]:
    block = one_kind_of_block(config)
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": block.mixer.num_heads,
        "intermediate_size": block.channel.hidden_dim,
        "hidden_act": activation_name(block.channel.activation),
        "type_vocab_size": config.types,
        "layer_norm_eps": block.norm.eps,
        "hidden_dropout_prob": block.dropout,
        "attention_probs_dropout_prob": block.mixer.dropout,
        "initializer_range": getattr(config.initialise, "std", 0.02),
    }


def _encoder_rules(prefix: str) -> tuple[Rule, ...]:
    theirs = f"{prefix}encoder.layer.{{i}}"
    return (
        same("embedding.weight", f"{prefix}embeddings.word_embeddings.weight"),
        same("positions.embedding.weight", f"{prefix}embeddings.position_embeddings.weight"),
        same("types.weight", f"{prefix}embeddings.token_type_embeddings.weight"),
        *both("embedding_norm", f"{prefix}embeddings.LayerNorm"),
        *both("blocks.{i}.mixer.q", f"{theirs}.attention.self.query"),
        *both("blocks.{i}.mixer.k", f"{theirs}.attention.self.key"),
        *both("blocks.{i}.mixer.v", f"{theirs}.attention.self.value"),
        *both("blocks.{i}.mixer.out", f"{theirs}.attention.output.dense"),
        *both("blocks.{i}.mixer_norm", f"{theirs}.attention.output.LayerNorm"),
        *both("blocks.{i}.channel.up", f"{theirs}.intermediate.dense"),
        *both("blocks.{i}.channel.out", f"{theirs}.output.dense"),
        *both("blocks.{i}.channel_norm", f"{theirs}.output.LayerNorm"),
        *both("pooler", f"{prefix}pooler.dense"),
    )


def _masked_rules(config: MaskedModel.Config) -> tuple[Rule, ...]:
    return (
        *_encoder_rules("bert."),
        *both("transform", "cls.predictions.transform.dense"),
        *both("transform_norm", "cls.predictions.transform.LayerNorm"),
        same("bias", "cls.predictions.bias"),
        again("embedding.weight", "cls.predictions.decoder.weight"),
        again("bias", "cls.predictions.decoder.bias"),
        *both("pairs", "cls.seq_relationship"),
    )


EXAMPLE = architecture(vocab_size=53, context=48, dim=20, num_layers=2, num_heads=5, hidden_dim=33)

PRETRAINING = Family("bert", "BertForPreTraining", _read, _write, _masked_rules, EXAMPLE)
ENCODER = Family(
    "bert",
    "BertModel",
    lambda found: encoder_of(_read(found)),
    _write,
    lambda config: _encoder_rules(""),
    encoder_of(EXAMPLE),
)
