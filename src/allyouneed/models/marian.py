"""Marian (Junczys-Dowmunt et al. 2018): the Transformer of 2017 as its translators keep it – norms after each branch
and none at the end, sinusoidal positions, one embedding for source, target and head.
"""

from __future__ import annotations

from typing import Any

from allyouneed.models.checkpoints.family import ACTIVATIONS, Family, activation_name, one_kind_of_block
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, again, both, head, same
from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.models.stack import Stack
from allyouneed.nn.attention import Attention, CrossAttention
from allyouneed.nn.block import Block, CrossBlock, PostNorm
from allyouneed.nn.ffn import MLP
from allyouneed.nn.norms import NoNorm
from allyouneed.nn.positions import AnyPositions, SinesThenCosines


def architecture(
    *,
    vocab_size: int,
    context: int = 512,
    dim: int,
    num_layers: int,
    num_decoder_layers: int | None = None,
    num_heads: int,
    num_decoder_heads: int | None = None,
    head_dim: int | None = None,
    hidden_dim: int,
    decoder_hidden_dim: int | None = None,
    activation: str = "relu",
    positions: AnyPositions | None = None,
    bias: bool = True,
    scaled: bool = True,
    tied: bool = True,
    head_bias: bool = True,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    hidden_dropout: float = 0.0,
) -> EncoderDecoder.Config:
    """A Marian of any size: post-norm, biases everywhere, embeddings multiplied by √dim where `scaled`.

    `positions` None: sines in the first half of the dimensions, cosines in the second. `dropout` is that of embeddings
    and branches.
    """
    stack: dict[str, Any] = {
        "vocab_size": vocab_size,
        "context": context,
        "dim": dim,
        "positions": positions or SinesThenCosines.Config(),
        "embedding_scale": dim**0.5 if scaled else 1.0,
        "norm": NoNorm.Config(),
        "dropout": dropout,
    }
    heads: dict[str, Any] = {"head_dim": head_dim, "bias": bias, "out_bias": bias, "dropout": attention_dropout}
    parts: dict[str, Any] = {"placement": PostNorm(), "dropout": dropout}
    channel = MLP.Config(hidden_dim=hidden_dim, activation=activation, dropout=hidden_dropout)
    theirs = num_decoder_heads or num_heads
    reader = Block.Config(**parts, mixer=Attention.Config(**heads, num_heads=num_heads), channel=channel)
    writer = CrossBlock.Config(
        **parts,
        mixer=Attention.Config(**heads, num_heads=theirs),
        cross=CrossAttention.Config(**heads, num_heads=theirs),
        channel=channel.replace(hidden_dim=decoder_hidden_dim or hidden_dim),
    )
    return EncoderDecoder.Config(
        encoder=Stack.Config(**stack, num_layers=num_layers, blocks=(reader,)),
        decoder=Stack.Config(
            **stack, num_layers=num_layers if num_decoder_layers is None else num_decoder_layers, blocks=(writer,)
        ),
        tied=tied,
        head_bias=head_bias,
    )


def _read(fields: Fields) -> EncoderDecoder.Config:
    vocab_size = fields.integer("vocab_size")
    for name, only in (
        ("share_encoder_decoder_embeddings", True),
        ("decoder_vocab_size", vocab_size),
        ("normalize_before", False),  # these three stand in old files only
        ("normalize_embedding", False),
        ("add_final_layer_norm", False),
    ):
        fields.expect(name, only)
    return architecture(
        vocab_size=vocab_size,
        context=fields.integer("max_position_embeddings", 1024),
        dim=fields.integer("d_model"),
        num_layers=fields.integer("encoder_layers"),
        num_decoder_layers=fields.integer("decoder_layers"),
        num_heads=fields.integer("encoder_attention_heads"),
        num_decoder_heads=fields.integer("decoder_attention_heads"),
        hidden_dim=fields.integer("encoder_ffn_dim"),
        decoder_hidden_dim=fields.integer("decoder_ffn_dim"),
        activation=ACTIVATIONS[fields.choice("activation_function", ACTIVATIONS, "gelu")],
        scaled=fields.boolean("scale_embedding", False),
        tied=fields.boolean("tie_word_embeddings", True),
        dropout=fields.number("dropout", 0.1, most=1.0),
        attention_dropout=fields.number("attention_dropout", 0.0, most=1.0),
        hidden_dropout=fields.number("activation_dropout", 0.0, most=1.0),
    )


def _write(config: EncoderDecoder.Config) -> dict[str, Any]:
    encoder, decoder = config.encoder, config.decoder
    reader, writer = one_kind_of_block(encoder), one_kind_of_block(decoder)
    return {
        "vocab_size": config.vocab_size,
        "decoder_vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "d_model": encoder.dim,
        "encoder_layers": encoder.num_layers,
        "decoder_layers": decoder.num_layers,
        "encoder_attention_heads": reader.mixer.num_heads,
        "decoder_attention_heads": writer.mixer.num_heads,
        "encoder_ffn_dim": reader.channel.hidden_dim,
        "decoder_ffn_dim": writer.channel.hidden_dim,
        "activation_function": activation_name(reader.channel.activation),
        "scale_embedding": encoder.embedding_scale != 1.0,
        "tie_word_embeddings": config.tied,
        "share_encoder_decoder_embeddings": True,
        "dropout": reader.dropout,
        "attention_dropout": reader.mixer.dropout,
        "activation_dropout": reader.channel.dropout,
        "is_encoder_decoder": True,
        # Marian's vocabularies begin with the end token and end with padding, from which targets begin
        "eos_token_id": 0,
        "forced_eos_token_id": 0,
        "pad_token_id": config.vocab_size - 1,
        "decoder_start_token_id": config.vocab_size - 1,
    }


def _rules(config: EncoderDecoder.Config) -> tuple[Rule, ...]:
    return (
        same("encoder.embedding.weight", "model.shared.weight"),
        again("encoder.embedding.weight", "model.encoder.embed_tokens.weight"),
        again("encoder.embedding.weight", "model.decoder.embed_tokens.weight"),
        *_stack_rules("encoder", "i", {"mixer": "self_attn"}),
        *_stack_rules("decoder", "j", {"mixer": "self_attn", "cross": "encoder_attn"}),
        head("lm_head.weight", tied=config.tied, embedding="encoder.embedding.weight"),
        Rule(("head.bias",), "final_logits_bias", lambda t: t.unbind(), lambda parts: parts[0][None]),
    )


def _stack_rules(stack: str, sign: str, branches: dict[str, str]) -> list[Rule]:
    ours, theirs = f"{stack}.blocks.{{{sign}}}", f"model.{stack}.layers.{{{sign}}}"
    found: list[Rule] = []
    for name, their_name in branches.items():
        found += both(f"{ours}.{name}_norm", f"{theirs}.{their_name}_layer_norm")
        for part in ("q", "k", "v", "out"):
            found += both(f"{ours}.{name}.{part}", f"{theirs}.{their_name}.{part}_proj")
    return [
        *found,
        *both(f"{ours}.channel_norm", f"{theirs}.final_layer_norm"),
        *both(f"{ours}.channel.up", f"{theirs}.fc1"),
        *both(f"{ours}.channel.out", f"{theirs}.fc2"),
    ]


EXAMPLE = architecture(
    vocab_size=53,
    context=48,
    dim=24,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    num_decoder_heads=6,
    hidden_dim=33,
    decoder_hidden_dim=35,
    activation="silu",
)

HUGGING_FACE = Family("marian", "MarianMTModel", _read, _write, _rules, EXAMPLE)
