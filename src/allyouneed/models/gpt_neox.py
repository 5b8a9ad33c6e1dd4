"""GPT-NeoX (Black et al. 2022) as Pythia uses it (Biderman et al. 2023, sec. 2.2): attention and MLP side by side on
one residual stream, a quarter of each head turned by rotary positions, and a head of its own.
"""

from __future__ import annotations

from typing import Any

from allyouneed.core.errors import unknown
from allyouneed.models.checkpoints.family import ACTIVATIONS, Family, activation_name, one_kind_of_block
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, both, by_head, head, same
from allyouneed.models.decoder import Decoder
from allyouneed.models.gpt2 import QKV, with_dropout
from allyouneed.nn.attention import Attention
from allyouneed.nn.block import Block, ParallelBlock
from allyouneed.nn.ffn import MLP
from allyouneed.nn.norms import LayerNorm
from allyouneed.nn.positions import Rotary

# layers, heads, dim (Biderman et al. 2023, table 1), and the vocabulary as released: 50277 tokens, padded to a multiple
# of 128 for each of the devices that the embedding was split over
SIZES = {
    "70M": (6, 8, 512, 50304),
    "160M": (12, 12, 768, 50304),
    "410M": (24, 16, 1024, 50304),
    "1B": (16, 8, 2048, 50304),
    "1.4B": (24, 16, 2048, 50304),
    "2.8B": (32, 32, 2560, 50304),
    "6.9B": (32, 32, 4096, 50432),
    "12B": (36, 40, 5120, 50688),
}


def architecture(
    *,
    vocab_size: int = 50304,
    context: int = 2048,
    dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int | None = None,
    activation: str = "gelu",
    base: float = 10000.0,
    rotated: float = 0.25,
    eps: float = 1e-5,
    parallel: bool = True,
    bias: bool = True,
    tied: bool = False,
) -> Decoder.Config:
    """A GPT-NeoX of any size; `rotated` is the share of each head's dimensions that positions turn."""
    block = (ParallelBlock if parallel else Block).Config(
        mixer=Attention.Config(num_heads=num_heads, bias=bias, out_bias=bias),
        channel=MLP.Config(hidden_dim=hidden_dim or 4 * dim, activation=activation),
        norm=LayerNorm.Config(eps=eps),
    )
    return Decoder.Config(
        vocab_size=vocab_size,
        context=context,
        dim=dim,
        num_layers=num_layers,
        blocks=(block,),
        positions=Rotary.Config(base=base, fraction=rotated),
        norm=LayerNorm.Config(eps=eps),
        tied=tied,
    )


def sized(name: str = "70M") -> Decoder.Config:
    """One of Pythia's eight sizes.

    >>> sized("70M").num_parameters()
    70426624

    Raises:
        InputError: no such size.
    """
    if name not in SIZES:
        raise unknown("size of Pythia", name, SIZES)
    num_layers, num_heads, dim, vocab_size = SIZES[name]
    return architecture(vocab_size=vocab_size, dim=dim, num_layers=num_layers, num_heads=num_heads)


def _read(fields: Fields) -> Decoder.Config:
    base, rotated = _rotary(fields)
    dim = fields.integer("hidden_size", 6144)
    config = architecture(
        vocab_size=fields.integer("vocab_size", 50432),
        context=fields.integer("max_position_embeddings", 2048),
        dim=dim,
        num_layers=fields.integer("num_hidden_layers", 44),
        num_heads=fields.integer("num_attention_heads", 64),
        hidden_dim=fields.integer("intermediate_size", 24576),
        activation=ACTIVATIONS[fields.choice("hidden_act", ACTIVATIONS, "gelu")],
        base=base,
        rotated=rotated,
        eps=fields.number("layer_norm_eps", 1e-5),
        parallel=fields.boolean("use_parallel_residual", True),
        bias=fields.boolean("attention_bias", True),
        tied=fields.boolean("tie_word_embeddings", False),
    )
    hidden = fields.number("hidden_dropout", 0.0, most=1.0)
    attention = fields.number("attention_dropout", 0.0, most=1.0)
    return with_dropout(config, branches=hidden, attention=attention, embeddings=hidden)


def _rotary(fields: Fields) -> tuple[float, float]:
    """Base and turned share: transformers 5 writes both into `rope_parameters`; before, they had names of their own."""
    fields.expect("rope_scaling", None)
    rope = Fields(fields.values.get("rope_parameters") or {}, f"{fields.source}: rope_parameters")
    rope.expect("rope_type", "default")
    old_base = fields.number("rotary_emb_base", 10000.0, least=1.0)
    old_share = fields.number("rotary_pct", 0.25, most=1.0)
    share = rope.number("partial_rotary_factor", old_share, most=1.0)
    return rope.number("rope_theta", old_base, least=1.0), share


def _write(config: Decoder.Config) -> dict[str, Any]:
    block, positions = one_kind_of_block(config), config.positions
    rotary: dict[str, Any] = {
        "rope_theta": positions.base,  # type: ignore[union-attr]
        "partial_rotary_factor": positions.fraction,  # type: ignore[union-attr]
    }
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": block.mixer.num_heads,
        "intermediate_size": block.channel.hidden_dim,
        "hidden_act": activation_name(block.channel.activation),
        "rope_parameters": {"rope_type": "default"} | rotary,
        "rotary_emb_base": rotary["rope_theta"],
        "rotary_pct": rotary["partial_rotary_factor"],
        "layer_norm_eps": block.norm.eps,
        "use_parallel_residual": isinstance(block, ParallelBlock.Config),
        "attention_bias": block.mixer.bias,
        "tie_word_embeddings": config.tied,
        "hidden_dropout": block.dropout,
        "attention_dropout": block.mixer.dropout,
    }


def _rules(config: Decoder.Config) -> tuple[Rule, ...]:
    theirs, mixer = "gpt_neox.layers.{i}", one_kind_of_block(config).mixer
    attention: list[Rule] = []
    for kind in ("weight", "bias") if mixer.bias else ("weight",):
        fused = f"{theirs}.attention.query_key_value.{kind}"
        attention.append(by_head((f"{name}.{kind}" for name in QKV), fused, mixer.num_heads))
        attention.append(same(f"blocks.{{i}}.mixer.out.{kind}", f"{theirs}.attention.dense.{kind}"))
    return (
        same("embedding.weight", "gpt_neox.embed_in.weight"),
        *both("blocks.{i}.mixer_norm", f"{theirs}.input_layernorm"),
        *attention,
        *both("blocks.{i}.channel_norm", f"{theirs}.post_attention_layernorm"),
        *both("blocks.{i}.channel.up", f"{theirs}.mlp.dense_h_to_4h"),
        *both("blocks.{i}.channel.out", f"{theirs}.mlp.dense_4h_to_h"),
        *both("norm", "gpt_neox.final_layer_norm"),
        # on disk; in memory transformers now calls it lm_head
        head("embed_out.weight", tied=config.tied),
    )


EXAMPLE = architecture(vocab_size=53, context=48, dim=40, num_layers=2, num_heads=5, hidden_dim=33)

HUGGING_FACE = Family("gpt_neox", "GPTNeoXForCausalLM", _read, _write, _rules, EXAMPLE)
