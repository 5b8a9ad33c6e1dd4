"""T5 (Raffel et al. 2020): encoder and decoder with norms before each branch, biases of distance, and no other bias.

Two shapes: 1.0, the paper's – ReLU, the head tied to the embedding, its input scaled by 1/√dim – and 1.1, the authors'
later one: gated GELU (Shazeer 2020) and a head of its own.
"""

from __future__ import annotations

from typing import Any

from allyouneed.core.errors import unknown
from allyouneed.models.checkpoints.family import ACTIVATIONS, HEAD_STORED, Family, activation_name, one_kind_of_block
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, again, head, same
from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.models.stack import Stack
from allyouneed.nn.attention import Attention, CrossAttention
from allyouneed.nn.block import Block, CrossBlock
from allyouneed.nn.ffn import MLP, GatedMLP
from allyouneed.nn.initialise import FanIn
from allyouneed.nn.norms import RMSNorm
from allyouneed.nn.positions import RelativeBias, RelativeBiasBothWays

# layers of each stack, heads, size of a head, dim, hidden dim (sec. 3.1.1 and 3.7)
SIZES = {
    "small": (6, 8, 64, 512, 2048),
    "base": (12, 12, 64, 768, 3072),
    "large": (24, 16, 64, 1024, 4096),
    "3B": (24, 32, 128, 1024, 16384),
    "11B": (24, 128, 128, 1024, 65536),
}
# the same of 1.1, as its checkpoints have it; the two largest are XL and XXL
SIZES_1_1 = {
    "small": (8, 6, 64, 512, 1024),
    "base": (12, 12, 64, 768, 2048),
    "large": (24, 16, 64, 1024, 2816),
    "3B": (24, 32, 64, 2048, 5120),
    "11B": (24, 64, 64, 4096, 10240),
}


def architecture(
    *,
    vocab_size: int = 32128,
    context: int = 512,
    dim: int,
    num_layers: int,
    num_decoder_layers: int | None = None,
    num_heads: int,
    head_dim: int = 64,
    hidden_dim: int,
    activation: str = "relu",
    gated: bool = False,
    num_buckets: int = 32,
    max_distance: int = 128,
    eps: float = 1e-6,
    tied: bool = True,
    scaled: bool = True,
    dropout: float = 0.0,
) -> EncoderDecoder.Config:
    """A T5 of any size: by default 1.0; with `gated`, activation gelu_tanh and neither `tied` nor `scaled`, 1.1.

    `dropout` falls on embeddings, attention weights, hidden layers, branches and what the last norms give (sec. 2.1).
    """
    heads: dict[str, Any] = {"num_heads": num_heads, "head_dim": head_dim, "scale": 1.0, "dropout": dropout}
    channel = (GatedMLP if gated else MLP).Config(
        hidden_dim=hidden_dim, activation=activation, bias=False, dropout=dropout
    )
    parts: dict[str, Any] = {
        "mixer": Attention.Config(**heads),
        "channel": channel,
        "norm": RMSNorm.Config(eps=eps),
        "dropout": dropout,
    }
    stack: dict[str, Any] = {
        "vocab_size": vocab_size,
        "context": context,
        "dim": dim,
        "norm": RMSNorm.Config(eps=eps),
        "dropout": dropout,
        "norm_dropout": dropout,
        "initialise": FanIn(),
    }
    distances = {"num_buckets": num_buckets, "max_distance": max_distance}
    return EncoderDecoder.Config(
        encoder=Stack.Config(
            **stack,
            num_layers=num_layers,
            blocks=(Block.Config(**parts),),
            positions=RelativeBiasBothWays.Config(**distances),
        ),
        decoder=Stack.Config(
            **stack,
            num_layers=num_layers if num_decoder_layers is None else num_decoder_layers,
            blocks=(CrossBlock.Config(**parts, cross=CrossAttention.Config(**heads)),),
            positions=RelativeBias.Config(**distances),
        ),
        tied=tied,
        head_scale=dim**-0.5 if scaled else 1.0,
    )


def sized(name: str = "base", *, version: str = "1.0") -> EncoderDecoder.Config:
    """One of the five published sizes; pre-trained with `version` 1.1, whose dropout is 0 until it is fine-tuned."""
    sizes = {"1.0": SIZES, "1.1": SIZES_1_1}
    for what, given, known in (("version of T5", version, sizes), ("size of T5", name, SIZES)):
        if given not in known:
            raise unknown(what, given, known)
    num_layers, num_heads, head_dim, dim, hidden_dim = sizes[version][name]
    size: dict[str, Any] = {
        "dim": dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "hidden_dim": hidden_dim,
    }
    if version == "1.0":
        return architecture(**size, dropout=0.1)
    return architecture(**size, activation="gelu_tanh", gated=True, tied=False, scaled=False)


def published() -> dict[str, EncoderDecoder.Config]:
    """Every size of both versions."""
    return {f"{version} {name}": sized(name, version=version) for version in ("1.0", "1.1") for name in SIZES}


# what `feed_forward_proj` may be: our activation, and whether it gates; transformers takes gated-gelu for the tanh form
_CHANNELS = {name: (ours, False) for name, ours in ACTIVATIONS.items()} | {
    f"gated-{name}": ("gelu_tanh" if name == "gelu" else ours, True) for name, ours in ACTIVATIONS.items()
}


def _read(fields: Fields) -> EncoderDecoder.Config:
    num_layers, dim = fields.integer("num_layers"), fields.integer("d_model")
    activation, gated = _CHANNELS[fields.choice("feed_forward_proj", _CHANNELS, "relu")]
    num_buckets = fields.integer("relative_attention_num_buckets", 32, least=4)
    shared = fields.boolean("tie_word_embeddings", True)
    scaled = fields.boolean("scale_decoder_outputs", shared)
    return architecture(
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("n_positions", 512),
        dim=dim,
        num_layers=num_layers,
        num_decoder_layers=fields.integer("num_decoder_layers", num_layers),
        num_heads=fields.integer("num_heads"),
        head_dim=fields.integer("d_kv"),
        hidden_dim=fields.integer("d_ff"),
        activation=activation,
        gated=gated,
        num_buckets=num_buckets,
        max_distance=fields.integer("relative_attention_max_distance", 128, least=num_buckets // 2 + 1),
        eps=fields.number("layer_norm_epsilon", 1e-6),
        # transformers 5 writes tie_word_embeddings=true whatever the model is: the weights know
        tied=scaled or not fields.boolean(HEAD_STORED, not shared),
        scaled=scaled,
        dropout=fields.number("dropout_rate", 0.1, most=1.0),
    )


def _write(config: EncoderDecoder.Config) -> dict[str, Any]:
    encoder, decoder = config.encoder, config.decoder
    block, positions = one_kind_of_block(encoder), encoder.positions
    channel = block.channel
    name = activation_name(channel.activation)
    if isinstance(channel, GatedMLP.Config):
        name = "gated-gelu" if channel.activation == "gelu_tanh" else f"gated-{name}"
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "d_model": encoder.dim,
        "num_layers": encoder.num_layers,
        "num_decoder_layers": decoder.num_layers,
        "num_heads": block.mixer.num_heads,
        "d_kv": block.mixer.head_dim_of(encoder.dim),
        "d_ff": channel.hidden_dim,
        "feed_forward_proj": name,
        "relative_attention_num_buckets": positions.num_buckets,  # type: ignore[union-attr]
        "relative_attention_max_distance": positions.max_distance,  # type: ignore[union-attr]
        "layer_norm_epsilon": block.norm.eps,
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.head_scale != 1.0,
        "dropout_rate": block.dropout,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,  # the authors begin with padding
    }


def _rules(config: EncoderDecoder.Config) -> tuple[Rule, ...]:
    return (
        *shared_rules(config),
        *frame_rules("encoder", "i"),
        *_channel_rules("encoder", "i", config.encoder),
        *frame_rules("decoder", "j"),
        *_channel_rules("decoder", "j", config.decoder),
    )


def shared_rules(config: EncoderDecoder.Config) -> tuple[Rule, ...]:
    """The names of embedding and head."""
    return (
        same("encoder.embedding.weight", "shared.weight"),
        again("encoder.embedding.weight", "encoder.embed_tokens.weight"),
        again("encoder.embedding.weight", "decoder.embed_tokens.weight"),
        head("lm_head.weight", tied=config.tied, embedding="encoder.embedding.weight"),
    )


def frame_rules(stack: str, sign: str) -> list[Rule]:
    """The names of all in a stack but its channel parts."""
    ours, theirs = f"{stack}.blocks.{{{sign}}}", f"{stack}.block.{{{sign}}}.layer"
    branches = [("mixer", "SelfAttention")] + [("cross", "EncDecAttention")] * (stack == "decoder")
    found = []
    for place, (name, their_name) in enumerate(branches):
        found += [
            same(f"{ours}.{name}.{part}.weight", f"{theirs}.{place}.{their_name}.{letter}.weight")
            for part, letter in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
        ]
        found.append(same(f"{ours}.{name}_norm.weight", f"{theirs}.{place}.layer_norm.weight"))
    return [
        *found,
        same(f"{ours}.channel_norm.weight", f"{theirs}.{len(branches)}.layer_norm.weight"),
        same(f"{stack}.norm.weight", f"{stack}.final_layer_norm.weight"),
        same(
            f"{stack}.positions.embedding.weight",
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
    ]


def _channel_rules(stack: str, sign: str, config: Stack.Config) -> list[Rule]:
    ours, theirs = f"{stack}.blocks.{{{sign}}}.channel", f"{stack}.block.{{{sign}}}.layer.{1 + (stack == 'decoder')}"
    gated = isinstance(config.blocks[0].channel, GatedMLP.Config)
    names = {"gate": "wi_0", "up": "wi_1", "out": "wo"} if gated else {"up": "wi", "out": "wo"}
    return [same(f"{ours}.{part}.weight", f"{theirs}.DenseReluDense.{name}.weight") for part, name in names.items()]


EXAMPLE = architecture(
    vocab_size=53,
    context=48,
    dim=20,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=3,
    head_dim=6,
    hidden_dim=33,
    num_buckets=8,
    max_distance=12,
)

HUGGING_FACE = Family("t5", "T5ForConditionalGeneration", _read, _write, _rules, EXAMPLE)
