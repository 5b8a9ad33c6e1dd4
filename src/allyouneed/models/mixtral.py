"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): LLaMA with grouped heads, each feed-forward network replaced by eight,
of which every token passes two.
"""

from __future__ import annotations

from typing import Any

from allyouneed.core.errors import unknown
from allyouneed.models import llama
from allyouneed.models.checkpoints.family import ACTIVATIONS, Family, activation_name, one_kind_of_block
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, same, stacked
from allyouneed.models.decoder import Decoder
from allyouneed.nn.moe import GatedExperts, MoE
from allyouneed.nn.routers import TopK

# layers, heads, key–value heads, dim, hidden dim, experts, vocabulary, context (table 1; 8x22B: its released config)
SIZES = {
    "8x7B": (32, 32, 8, 4096, 14336, 8, 32000, 32768),
    "8x22B": (56, 48, 8, 6144, 16384, 8, 32768, 65536),
}


def architecture(
    *,
    vocab_size: int = 32000,
    context: int = 32768,
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden_dim: int,
    num_experts: int = 8,
    k: int = 2,
    activation: str = "silu",
    base: float = 1e6,
    eps: float = 1e-5,
    tied: bool = False,
) -> Decoder.Config:
    """A Mixtral of any size: LLaMA's frame around `num_experts` SwiGLU networks, `k` a token; no token is dropped."""
    config = llama.architecture(
        vocab_size=vocab_size,
        context=context,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        base=base,
        eps=eps,
        tied=tied,
    )
    experts = GatedExperts.Config(num_experts=num_experts, hidden_dim=hidden_dim, activation=activation)
    channel = MoE.Config(router=TopK.Config(k=k), experts=experts)
    return config.replace(blocks=(config.blocks[0].replace(channel=channel),))


def sized(name: str = "8x7B") -> Decoder.Config:
    """One of the two published sizes: 46.7 billion parameters of which a token passes 12.9, or 140.6 and 39.2."""
    if name not in SIZES:
        raise unknown("size of Mixtral", name, SIZES)
    num_layers, num_heads, num_kv_heads, dim, hidden_dim, num_experts, vocab_size, context = SIZES[name]
    return architecture(
        vocab_size=vocab_size,
        context=context,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        hidden_dim=hidden_dim,
        num_experts=num_experts,
    )


def _read(fields: Fields) -> Decoder.Config:
    fields.expect("sliding_window", None)
    fields.expect("router_jitter_noise", 0.0)
    dim, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    return architecture(
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("max_position_embeddings", 131072),
        dim=dim,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", dim // num_heads or 1),
        hidden_dim=fields.integer("intermediate_size"),
        num_experts=fields.integer("num_local_experts", 8),
        k=fields.integer("num_experts_per_tok", 2),
        activation=ACTIVATIONS[fields.choice("hidden_act", ACTIVATIONS, "silu")],
        base=llama.rope_base(fields, 1e6),
        eps=fields.number("rms_norm_eps", 1e-5),
        tied=fields.boolean("tie_word_embeddings", False),
    )


def _write(config: Decoder.Config) -> dict[str, Any]:
    block = one_kind_of_block(config)
    mixer, router, experts = block.mixer, block.channel.router, block.channel.experts
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim_of(config.dim),
        "intermediate_size": experts.hidden_dim,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": router.k,
        "hidden_act": activation_name(experts.activation),
        "rope_theta": config.positions.base,  # type: ignore[union-attr]
        "rope_parameters": {"rope_type": "default", "rope_theta": config.positions.base},  # type: ignore[union-attr]
        "rms_norm_eps": block.norm.eps,
        "tie_word_embeddings": config.tied,
    }


def _rules(config: Decoder.Config) -> tuple[Rule, ...]:
    theirs, channel = "model.layers.{i}.block_sparse_moe", config.blocks[0].channel
    assert isinstance(channel, MoE.Config)
    banks = [
        rule
        for ours, name in (("gate", "w1"), ("out", "w2"), ("up", "w3"))
        for rule in stacked(
            f"blocks.{{i}}.channel.experts.{ours}.weight",
            f"{theirs}.experts.{{e}}.{name}.weight",
            channel.experts.num_experts,
        )
    ]
    return (
        *llama.frame_rules(config),
        same("blocks.{i}.channel.router.weight", f"{theirs}.gate.weight"),
        *banks,
    )


EXAMPLE = architecture(
    vocab_size=53, context=48, dim=24, num_layers=2, num_heads=6, num_kv_heads=2, hidden_dim=33, num_experts=5
)

HUGGING_FACE = Family("mixtral", "MixtralForCausalLM", _read, _write, _rules, EXAMPLE)
