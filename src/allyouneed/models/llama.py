"""LLaMA (Touvron et al. 2023): RMS norm before each branch, rotary positions, SwiGLU, no biases."""

from __future__ import annotations

from typing import Any

from allyouneed.core.errors import unknown
from allyouneed.models.checkpoints.family import ACTIVATIONS, Family, activation_name, one_kind_of_block
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, head, paired, same
from allyouneed.models.decoder import Decoder
from allyouneed.nn.attention import Attention
from allyouneed.nn.block import Block
from allyouneed.nn.ffn import GatedMLP
from allyouneed.nn.norms import RMSNorm
from allyouneed.nn.positions import Rotary

# layers, heads, dim (table 2)
SIZES = {"7B": (32, 32, 4096), "13B": (40, 40, 5120), "33B": (60, 52, 6656), "65B": (80, 64, 8192)}


def architecture(
    *,
    vocab_size: int = 32000,
    context: int = 2048,
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    activation: str = "silu",
    base: float = 10000.0,
    eps: float = 1e-6,
    bias: bool = False,
    tied: bool = False,
) -> Decoder.Config:
    """A LLaMA of any size, with grouped heads where `num_kv_heads` says so (Llama 2).

    `hidden_dim` None: ⅔·4·dim (sec. 2.2), rounded up to a multiple of 256 as in the authors' code.
    """
    block = Block.Config(
        mixer=Attention.Config(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads or num_heads,
            head_dim=None if head_dim is None else _only_if_unusual(head_dim, dim, num_heads),
            bias=bias,
            out_bias=bias,
        ),
        channel=GatedMLP.Config(hidden_dim=hidden_dim or swiglu_hidden_dim(dim), activation=activation),
        norm=RMSNorm.Config(eps=eps),
    )
    return Decoder.Config(
        vocab_size=vocab_size,
        context=context,
        dim=dim,
        num_layers=num_layers,
        blocks=(block,),
        positions=Rotary.Config(base=base),
        norm=RMSNorm.Config(eps=eps),
        tied=tied,
    )


def swiglu_hidden_dim(dim: int, multiple: int = 256) -> int:
    """⅔·4·dim rounded up to a multiple, so that three matrices cost what two did.

    >>> swiglu_hidden_dim(4096)
    11008
    """
    return -(-int(8 * dim / 3) // multiple) * multiple


def sized(name: str = "7B") -> Decoder.Config:
    """One of the four published sizes.

    Raises:
        InputError: no such size.
    """
    if name not in SIZES:
        raise unknown("size of LLaMA", name, SIZES)
    num_layers, num_heads, dim = SIZES[name]
    return architecture(dim=dim, num_layers=num_layers, num_heads=num_heads)


def _read(fields: Fields) -> Decoder.Config:
    fields.expect("mlp_bias", False)
    dim, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    return architecture(
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("max_position_embeddings", 2048),
        dim=dim,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", dim // num_heads or 1),
        hidden_dim=fields.integer("intermediate_size"),
        activation=ACTIVATIONS[fields.choice("hidden_act", ACTIVATIONS, "silu")],
        base=rope_base(fields),
        eps=fields.number("rms_norm_eps", 1e-6),
        bias=fields.boolean("attention_bias", False),
        tied=fields.boolean("tie_word_embeddings", False),
    )


def rope_base(fields: Fields, default: float = 10000.0) -> float:
    """The base of rotary positions. transformers 5 writes `rope_parameters`; before, `rope_theta` stood alone with an
    optional `rope_scaling`.
    """
    fields.expect("rope_scaling", None)
    rope = Fields(fields.values.get("rope_parameters") or {}, f"{fields.source}: rope_parameters")
    rope.expect("rope_type", "default")
    rope.expect("partial_rotary_factor", 1.0)
    return rope.number("rope_theta", fields.number("rope_theta", default, least=1.0), least=1.0)


def _only_if_unusual(head_dim: int, dim: int, num_heads: int) -> int | None:
    return None if head_dim * num_heads == dim else head_dim


def _write(config: Decoder.Config) -> dict[str, Any]:
    block = one_kind_of_block(config)
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": block.mixer.num_heads,
        "num_key_value_heads": block.mixer.num_kv_heads,
        "head_dim": block.mixer.head_dim_of(config.dim),
        "intermediate_size": block.channel.hidden_dim,
        "hidden_act": activation_name(block.channel.activation),
        "rope_theta": config.positions.base,  # type: ignore[union-attr]
        "rope_parameters": {"rope_type": "default", "rope_theta": config.positions.base},  # type: ignore[union-attr]
        "rms_norm_eps": block.norm.eps,
        "attention_bias": block.mixer.bias,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied,
    }


def _rules(config: Decoder.Config) -> tuple[Rule, ...]:
    theirs = "model.layers.{i}.mlp"
    return (
        *frame_rules(config),
        same("blocks.{i}.channel.gate.weight", f"{theirs}.gate_proj.weight"),
        same("blocks.{i}.channel.up.weight", f"{theirs}.up_proj.weight"),
        same("blocks.{i}.channel.out.weight", f"{theirs}.down_proj.weight"),
    )


def frame_rules(config: Decoder.Config) -> tuple[Rule, ...]:
    """The names of all but the channel parts."""
    theirs, mixer = "model.layers.{i}", one_kind_of_block(config).mixer
    attention = [
        same(f"blocks.{{i}}.mixer.{ours}.{kind}", f"{theirs}.self_attn.{name}.{kind}")
        for ours, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj"))
        for kind in (("weight", "bias") if mixer.bias else ("weight",))
    ]
    return (
        same("embedding.weight", "model.embed_tokens.weight"),
        same("blocks.{i}.mixer_norm.weight", f"{theirs}.input_layernorm.weight"),
        *attention,
        same("blocks.{i}.channel_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        same("norm.weight", "model.norm.weight"),
        head("lm_head.weight", tied=config.tied),
    )


EXAMPLE = architecture(vocab_size=53, context=48, dim=24, num_layers=2, num_heads=6, num_kv_heads=2, hidden_dim=33)

HUGGING_FACE = Family("llama", "LlamaForCausalLM", _read, _write, _rules, EXAMPLE)


def _read_gguf(fields: Fields) -> Decoder.Config:
    fields.expect("llama.rope.scaling.type", "none")
    fields.expect("llama.expert_count", 0)
    dim, num_heads = fields.integer("llama.embedding_length"), fields.integer("llama.attention.head_count")
    fields.expect("llama.rope.dimension_count", fields.integer("llama.attention.key_length", dim // num_heads or 1))
    return architecture(
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("llama.context_length"),
        dim=dim,
        num_layers=fields.integer("llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("llama.attention.head_count_kv", num_heads),
        head_dim=fields.integer("llama.attention.key_length", dim // num_heads or 1),
        hidden_dim=fields.integer("llama.feed_forward_length"),
        base=fields.number("llama.rope.freq_base", 10000.0, least=1.0),
        eps=fields.number("llama.attention.layer_norm_rms_epsilon", 1e-6),
        tied=fields.boolean("tied"),
    )


def _rules_gguf(config: Decoder.Config) -> tuple[Rule, ...]:
    mixer = one_kind_of_block(config).mixer
    return (
        same("embedding.weight", "token_embd.weight"),
        same("blocks.{i}.mixer_norm.weight", "blk.{i}.attn_norm.weight"),
        paired("blocks.{i}.mixer.q.weight", "blk.{i}.attn_q.weight", mixer.num_heads),
        paired("blocks.{i}.mixer.k.weight", "blk.{i}.attn_k.weight", mixer.num_kv_heads or mixer.num_heads),
        same("blocks.{i}.mixer.v.weight", "blk.{i}.attn_v.weight"),
        same("blocks.{i}.mixer.out.weight", "blk.{i}.attn_output.weight"),
        same("blocks.{i}.channel_norm.weight", "blk.{i}.ffn_norm.weight"),
        same("blocks.{i}.channel.gate.weight", "blk.{i}.ffn_gate.weight"),
        same("blocks.{i}.channel.up.weight", "blk.{i}.ffn_up.weight"),
        same("blocks.{i}.channel.out.weight", "blk.{i}.ffn_down.weight"),
        same("norm.weight", "output_norm.weight"),
        head("output.weight", tied=config.tied),
    )


GGUF = Family("llama", "", _read_gguf, lambda config: {}, _rules_gguf, EXAMPLE)
