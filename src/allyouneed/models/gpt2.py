"""GPT-2 (Radford et al. 2019): layer norm before each branch and once more at the end, learned positions, tied head."""

from __future__ import annotations

from typing import Any

from allyouneed.core.errors import unknown
from allyouneed.models.checkpoints.family import ACTIVATIONS, Family, activation_name, one_kind_of_block
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, both, head, same, thirds, transposed, transposed_thirds
from allyouneed.models.decoder import Decoder
from allyouneed.nn.attention import Attention
from allyouneed.nn.block import Block
from allyouneed.nn.ffn import MLP
from allyouneed.nn.norms import LayerNorm
from allyouneed.nn.positions import Learned

# layers, heads, dim (table 2; the head count follows from heads of 64)
SIZES = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280), "1558M": (48, 25, 1600)}


def architecture(
    *,
    vocab_size: int = 50257,
    context: int = 1024,
    dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int | None = None,
    activation: str = "gelu_tanh",
    eps: float = 1e-5,
    tied: bool = True,
    dropout: float = 0.0,
) -> Decoder.Config:
    """A GPT-2 of any size; `dropout` is that of embeddings, branches and attention weights alike."""
    block = Block.Config(
        mixer=Attention.Config(num_heads=num_heads, bias=True, out_bias=True, dropout=dropout),
        channel=MLP.Config(hidden_dim=hidden_dim or 4 * dim, activation=activation),
        norm=LayerNorm.Config(eps=eps),
        dropout=dropout,
    )
    return Decoder.Config(
        vocab_size=vocab_size,
        context=context,
        dim=dim,
        num_layers=num_layers,
        blocks=(block,),
        positions=Learned.Config(),
        norm=LayerNorm.Config(eps=eps),
        tied=tied,
        dropout=dropout,
    )


def sized(name: str = "124M") -> Decoder.Config:
    """One of the four published sizes.

    Raises:
        InputError: no such size.
    """
    if name not in SIZES:
        raise unknown("size of GPT-2", name, SIZES)
    num_layers, num_heads, dim = SIZES[name]
    return architecture(dim=dim, num_layers=num_layers, num_heads=num_heads, dropout=0.1)


def _read(fields: Fields) -> Decoder.Config:
    for name, only in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        fields.expect(name, only)
    dim = fields.integer("n_embd", 768)
    config = architecture(
        vocab_size=fields.integer("vocab_size", 50257),
        context=fields.integer("n_positions", 1024),
        dim=dim,
        num_layers=fields.integer("n_layer", 12),
        num_heads=fields.integer("n_head", 12),
        hidden_dim=fields.integer("n_inner", 4 * dim),
        activation=ACTIVATIONS[fields.choice("activation_function", ACTIVATIONS, "gelu_new")],
        eps=fields.number("layer_norm_epsilon", 1e-5),
        tied=fields.boolean("tie_word_embeddings", True),
    )
    return with_dropout(
        config,
        branches=fields.number("resid_pdrop", 0.1, most=1.0),
        attention=fields.number("attn_pdrop", 0.1, most=1.0),
        embeddings=fields.number("embd_pdrop", 0.1, most=1.0),
    )


def with_dropout(config: Decoder.Config, *, branches: float, attention: float, embeddings: float) -> Decoder.Config:
    """`config` with its three rates of dropout set."""
    blocks = [b.replace(dropout=branches, mixer=b.mixer.replace(dropout=attention)) for b in config.blocks]
    return config.replace(blocks=tuple(blocks), dropout=embeddings)


def _write(config: Decoder.Config) -> dict[str, Any]:
    block = one_kind_of_block(config)
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.dim,
        "n_layer": config.num_layers,
        "n_head": block.mixer.num_heads,
        "n_inner": block.channel.hidden_dim,
        "activation_function": activation_name(block.channel.activation),
        "layer_norm_epsilon": block.norm.eps,
        "tie_word_embeddings": config.tied,
        "resid_pdrop": block.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": block.mixer.dropout,
    }


QKV = [f"blocks.{{i}}.mixer.{name}" for name in "qkv"]


def _rules(config: Decoder.Config) -> tuple[Rule, ...]:
    return (
        same("embedding.weight", "transformer.wte.weight"),
        same("positions.embedding.weight", "transformer.wpe.weight"),
        *block_rules(),
        *both("norm", "transformer.ln_f"),
        head("lm_head.weight", tied=config.tied),
    )


def block_rules() -> tuple[Rule, ...]:
    """The names of a block's tensors, which GPT and GPT-2 share."""
    theirs = "transformer.h.{i}"
    return (
        *both("blocks.{i}.mixer_norm", f"{theirs}.ln_1"),
        transposed_thirds((f"{name}.weight" for name in QKV), f"{theirs}.attn.c_attn.weight"),
        thirds((f"{name}.bias" for name in QKV), f"{theirs}.attn.c_attn.bias"),
        transposed("blocks.{i}.mixer.out.weight", f"{theirs}.attn.c_proj.weight"),
        same("blocks.{i}.mixer.out.bias", f"{theirs}.attn.c_proj.bias"),
        *both("blocks.{i}.channel_norm", f"{theirs}.ln_2"),
        transposed("blocks.{i}.channel.up.weight", f"{theirs}.mlp.c_fc.weight"),
        same("blocks.{i}.channel.up.bias", f"{theirs}.mlp.c_fc.bias"),
        transposed("blocks.{i}.channel.out.weight", f"{theirs}.mlp.c_proj.weight"),
        same("blocks.{i}.channel.out.bias", f"{theirs}.mlp.c_proj.bias"),
    )


EXAMPLE = architecture(vocab_size=53, context=48, dim=20, num_layers=2, num_heads=5, hidden_dim=33)

HUGGING_FACE = Family("gpt2", "GPT2LMHeadModel", _read, _write, _rules, EXAMPLE)


def _read_gguf(fields: Fields) -> Decoder.Config:
    return architecture(
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("gpt2.context_length"),
        dim=fields.integer("gpt2.embedding_length"),
        num_layers=fields.integer("gpt2.block_count"),
        num_heads=fields.integer("gpt2.attention.head_count"),
        hidden_dim=fields.integer("gpt2.feed_forward_length"),
        eps=fields.number("gpt2.attention.layer_norm_epsilon", 1e-5),
        tied=fields.boolean("tied"),
    )


def _rules_gguf(config: Decoder.Config) -> tuple[Rule, ...]:
    return (
        same("embedding.weight", "token_embd.weight"),
        same("positions.embedding.weight", "position_embd.weight"),
        *both("blocks.{i}.mixer_norm", "blk.{i}.attn_norm"),
        thirds((f"{name}.weight" for name in QKV), "blk.{i}.attn_qkv.weight"),
        thirds((f"{name}.bias" for name in QKV), "blk.{i}.attn_qkv.bias"),
        *both("blocks.{i}.mixer.out", "blk.{i}.attn_output"),
        *both("blocks.{i}.channel_norm", "blk.{i}.ffn_norm"),
        *both("blocks.{i}.channel.up", "blk.{i}.ffn_up"),
        *both("blocks.{i}.channel.out", "blk.{i}.ffn_down"),
        *both("norm", "output_norm"),
        head("output.weight", tied=config.tied),
    )


GGUF = Family("gpt2", "", _read_gguf, lambda config: {}, _rules_gguf, EXAMPLE)
