"""RWKV-4 (Peng et al. 2023): trained in parallel as a Transformer is, run as a recurrent net, its state of one size."""

from __future__ import annotations

from typing import Any

from allyouneed.core.errors import unknown
from allyouneed.models.checkpoints.family import Family, one_kind_of_block
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, both, head, same
from allyouneed.models.decoder import Decoder
from allyouneed.nn.initialise import RWKV4
from allyouneed.nn.norms import LayerNorm
from allyouneed.nn.positions import Positions
from allyouneed.nn.rwkv import ChannelMix, RWKVBlock

# layers, dim (table 2)
SIZES = {
    "169M": (12, 768),
    "430M": (24, 1024),
    "1.5B": (24, 2048),
    "3B": (32, 2560),
    "7B": (32, 4096),
    "14B": (40, 5120),
}


def architecture(
    *,
    vocab_size: int = 50277,
    context: int = 1024,
    dim: int,
    num_layers: int,
    hidden_dim: int | None = None,
    eps: float = 1e-5,
    tied: bool = False,
) -> Decoder.Config:
    """An RWKV-4 of any size, with a norm on the embeddings (sec. 3.4); `hidden_dim` None: 4·dim.

    `context` is the length of the rows in training; it reads texts of any.
    """
    norm = LayerNorm.Config(eps=eps)
    block = RWKVBlock.Config(channel=ChannelMix.Config(hidden_dim=hidden_dim or 4 * dim), norm=norm)
    return Decoder.Config(
        vocab_size=vocab_size,
        context=context,
        dim=dim,
        num_layers=num_layers,
        blocks=(block,),
        positions=Positions.Config(),
        embedding_norm=norm,
        norm=LayerNorm.Config(),
        tied=tied,
        initialise=RWKV4(),
    )


def sized(name: str = "169M") -> Decoder.Config:
    """One of the six published sizes."""
    if name not in SIZES:
        raise unknown("size of RWKV-4", name, SIZES)
    num_layers, dim = SIZES[name]
    return architecture(dim=dim, num_layers=num_layers)


def _read(fields: Fields) -> Decoder.Config:
    """`rescale_every` is let be: it halves the stream against the overflow of 16-bit floats, and the norms undo it (but
    for their ε, which weighs more beside a smaller stream).
    """
    dim = fields.integer("hidden_size")
    fields.expect("attention_hidden_size", dim)
    return architecture(
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("context_length", 1024),
        dim=dim,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_dim=fields.integer("intermediate_size", 4 * dim),
        eps=fields.number("layer_norm_epsilon", 1e-5),
        tied=fields.boolean("tie_word_embeddings", False),
    )


def _write(config: Decoder.Config) -> dict[str, Any]:
    block = one_kind_of_block(config)
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.context,
        "hidden_size": config.dim,
        "attention_hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": block.channel.hidden_dim,
        "layer_norm_epsilon": block.norm.eps,
        "tie_word_embeddings": config.tied,
    }


def _vector(ours: str, theirs: str) -> Rule:
    """One number a channel, stored as (1, 1, dim)."""
    return Rule((ours,), theirs, lambda t: (t.flatten(),), lambda parts: parts[0][None, None].contiguous())


def _rules(config: Decoder.Config) -> tuple[Rule, ...]:
    theirs, time, channel = "rwkv.blocks.{i}", "rwkv.blocks.{i}.attention", "rwkv.blocks.{i}.feed_forward"
    matrices = {"r": "receptance", "k": "key", "v": "value", "out": "output"}
    return (
        same("embedding.weight", "rwkv.embeddings.weight"),
        *both("embedding_norm", "rwkv.blocks.0.pre_ln"),
        *both("blocks.{i}.mixer_norm", f"{theirs}.ln1"),
        same("blocks.{i}.mixer.log_decay", f"{time}.time_decay"),
        same("blocks.{i}.mixer.bonus", f"{time}.time_first"),
        *(_vector(f"blocks.{{i}}.mixer.mix_{x}", f"{time}.time_mix_{matrices[x]}") for x in "rkv"),
        *(same(f"blocks.{{i}}.mixer.{x}.weight", f"{time}.{name}.weight") for x, name in matrices.items()),
        *both("blocks.{i}.channel_norm", f"{theirs}.ln2"),
        *(_vector(f"blocks.{{i}}.channel.mix_{x}", f"{channel}.time_mix_{matrices[x]}") for x in "rk"),
        *(same(f"blocks.{{i}}.channel.{x}.weight", f"{channel}.{matrices[x]}.weight") for x in "rk"),
        same("blocks.{i}.channel.out.weight", f"{channel}.value.weight"),
        *both("norm", "rwkv.ln_out"),
        head("head.weight", tied=config.tied),
    )


EXAMPLE = architecture(vocab_size=53, context=48, dim=24, num_layers=2, hidden_dim=33)

HUGGING_FACE = Family("rwkv", "RwkvForCausalLM", _read, _write, _rules, EXAMPLE)
