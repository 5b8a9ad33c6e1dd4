"""GPT-Neo (Black et al. 2021): GPT-2 with dense and locally banded attention in turn, as GPT-3 has it."""

from __future__ import annotations

from typing import Any

from allyouneed import core
from allyouneed.core.errors import unknown
from allyouneed.models import gpt2
from allyouneed.models.checkpoints.family import ACTIVATIONS, Family, activation_name
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, both, head, same
from allyouneed.models.decoder import Decoder

# layers, heads, dim of the released checkpoints
SIZES = {"125M": (12, 12, 768), "1.3B": (24, 16, 2048), "2.7B": (32, 20, 2560)}


def architecture(*, window: int = 256, scale: float | None = None, **sizes: Any) -> Decoder.Config:
    """GPT-2's `sizes`, every second layer seeing only the last `window` tokens."""
    config = gpt2.architecture(**sizes)
    block = config.blocks[0]
    dense = block.replace(mixer=block.mixer.replace(scale=scale))
    banded = dense.replace(mixer=dense.mixer.replace(window=window))
    return config.replace(blocks=(dense, banded))


def sized(name: str = "125M") -> Decoder.Config:
    """One of the three released sizes."""
    if name not in SIZES:
        raise unknown("size of GPT-Neo", name, SIZES)
    num_layers, num_heads, dim = SIZES[name]
    # the authors left out the division by √head_dim; the weights absorb it
    return _without_bias(architecture(context=2048, dim=dim, num_layers=num_layers, num_heads=num_heads, scale=1.0))


def _read(fields: Fields) -> Decoder.Config:
    dim, num_layers = fields.integer("hidden_size"), fields.integer("num_layers")
    config = architecture(
        window=fields.integer("window_size", 256),
        scale=1.0,
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("max_position_embeddings", 2048),
        dim=dim,
        num_layers=num_layers,
        num_heads=fields.integer("num_heads"),
        hidden_dim=fields.integer("intermediate_size", 4 * dim),
        activation=ACTIVATIONS[fields.choice("activation_function", ACTIVATIONS, "gelu_new")],
        eps=fields.number("layer_norm_epsilon", 1e-5),
        tied=fields.boolean("tie_word_embeddings", True),
    )
    config = gpt2.with_dropout(
        config,
        branches=fields.number("resid_dropout", 0.0, most=1.0),
        attention=fields.number("attention_dropout", 0.0, most=1.0),
        embeddings=fields.number("embed_dropout", 0.0, most=1.0),
    )
    fields.expect("attention_types", [[["global", "local"], num_layers // 2]])
    return _without_bias(config)


def _without_bias(config: Decoder.Config) -> Decoder.Config:
    """None on queries, keys and values, unlike GPT-2."""
    return config.replace(blocks=tuple(b.replace(mixer=b.mixer.replace(bias=False)) for b in config.blocks))


def _write(config: Decoder.Config) -> dict[str, Any]:
    dense: Any
    banded: Any
    dense, banded = config.blocks
    if config.num_layers % 2:
        raise core.InputError("this layout has as many banded layers as dense ones")
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.dim,
        "num_layers": config.num_layers,
        "attention_types": [[["global", "local"], config.num_layers // 2]],
        "num_heads": dense.mixer.num_heads,
        "window_size": banded.mixer.window,
        "intermediate_size": dense.channel.hidden_dim,
        "activation_function": activation_name(dense.channel.activation),
        "layer_norm_epsilon": dense.norm.eps,
        "tie_word_embeddings": config.tied,
        "resid_dropout": dense.dropout,
        "attention_dropout": dense.mixer.dropout,
        "embed_dropout": config.dropout,
    }


def _rules(config: Decoder.Config) -> tuple[Rule, ...]:
    theirs = "transformer.h.{i}"
    return (
        same("embedding.weight", "transformer.wte.weight"),
        same("positions.embedding.weight", "transformer.wpe.weight"),
        *both("blocks.{i}.mixer_norm", f"{theirs}.ln_1"),
        *(same(f"blocks.{{i}}.mixer.{name}.weight", f"{theirs}.attn.attention.{name}_proj.weight") for name in "qkv"),
        *both("blocks.{i}.mixer.out", f"{theirs}.attn.attention.out_proj"),
        *both("blocks.{i}.channel_norm", f"{theirs}.ln_2"),
        *both("blocks.{i}.channel.up", f"{theirs}.mlp.c_fc"),
        *both("blocks.{i}.channel.out", f"{theirs}.mlp.c_proj"),
        *both("norm", "transformer.ln_f"),
        head("lm_head.weight", tied=config.tied),
    )


EXAMPLE = _read(
    Fields(
        {
            "vocab_size": 53,
            "max_position_embeddings": 48,
            "hidden_size": 20,
            "num_layers": 2,
            "num_heads": 5,
            "window_size": 4,
            "resid_dropout": 0.0,
        },
        "example",
    )
)

HUGGING_FACE = Family("gpt_neo", "GPTNeoForCausalLM", _read, _write, _rules, EXAMPLE)
