"""Switch Transformers (Fedus et al. 2021, arXiv:2101.03961): T5 in which the feed-forward network of every other block,
or of every one, is a mixture of experts of which each token passes one.
"""

from __future__ import annotations

from typing import Any

from allyouneed.core.errors import unknown
from allyouneed.models import t5
from allyouneed.models.checkpoints.family import ACTIVATIONS, Family, activation_name
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, same, stacked
from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.models.stack import Stack
from allyouneed.nn.capacity import Capacity, Factor, PerRow
from allyouneed.nn.initialise import FanIn
from allyouneed.nn.moe import Experts, GatedExperts, MoE
from allyouneed.nn.routers import Top1

# layers of each stack, heads, dim, hidden dim, gated, one block in how many is sparse, experts (table 9; of XXL it
# prints 64 experts, but 395 billion parameters, and its released checkpoint has 128)
SIZES = {
    "base": (12, 12, 768, 2048, True, 2, 128),
    "large": (24, 16, 1024, 2816, True, 2, 128),
    "xxl": (24, 64, 4096, 10240, True, 2, 128),
    "c": (15, 32, 2080, 6144, False, 1, 2048),
}


def architecture(
    *,
    num_experts: int = 8,
    every: int = 2,
    decoder_every: int | None = None,
    capacity: Capacity | None = None,
    jitter: float = 0.01,
    activation: str = "relu",
    gated: bool = False,
    dropout: float = 0.0,
    expert_dropout: float | None = None,
    hidden_dim: int,
    **sizes: Any,
) -> EncoderDecoder.Config:
    """A Switch Transformer of any size: of `every` blocks the second is sparse (1: all are).

    Args:
        num_experts: of each sparse block.
        every, decoder_every: in encoder and decoder; None: as the encoder.
        capacity: None: 1.25 times an expert's fair share in training, no limit in evaluation.
        jitter: of what routers read in training (sec. 2.4).
        activation, gated, hidden_dim: of dense networks and experts alike.
        dropout: as of T5; `expert_dropout` in experts' hidden layers, None: the same (sec. 4.1: 0.4 in fine-tuning).
        sizes: the other arguments of `t5.architecture`.
    """
    config = t5.architecture(hidden_dim=hidden_dim, activation=activation, gated=gated, dropout=dropout, **sizes)
    experts = (GatedExperts if gated else Experts).Config(
        num_experts=num_experts,
        hidden_dim=hidden_dim,
        activation=activation,
        dropout=dropout if expert_dropout is None else expert_dropout,
    )
    channel = MoE.Config(router=Top1.Config(capacity=capacity or Factor(), jitter=jitter), experts=experts)

    def sparse(stack: Stack.Config, every: int) -> Stack.Config:
        dense = stack.blocks[0]
        blocks = tuple(dense.replace(channel=channel) if i == 1 % every else dense for i in range(every))
        return stack.replace(blocks=blocks, initialise=FanIn(scale=0.1))

    return config.replace(encoder=sparse(config.encoder, every), decoder=sparse(config.decoder, decoder_every or every))


def sized(name: str = "base") -> EncoderDecoder.Config:
    """One of the four published sizes, of 7, 26, 395 and 1571 billion parameters."""
    if name not in SIZES:
        raise unknown("size of Switch", name, SIZES)
    num_layers, num_heads, dim, hidden_dim, gated, every, num_experts = SIZES[name]
    return architecture(
        num_layers=num_layers,
        num_heads=num_heads,
        dim=dim,
        hidden_dim=hidden_dim,
        gated=gated,
        activation="gelu_tanh" if gated else "relu",
        every=every,
        num_experts=num_experts,
        dropout=0.1,
    )


def _read(fields: Fields) -> EncoderDecoder.Config:
    fields.expect("router_bias", False)
    fields.expect("router_dtype", "float32")
    fields.expect("tie_word_embeddings", True)  # else transformers has three embeddings, each by itself
    num_layers = fields.integer("num_layers")
    num_decoder_layers = fields.integer("num_decoder_layers", num_layers)
    num_buckets = fields.integer("relative_attention_num_buckets", 32, least=4)
    return architecture(
        vocab_size=fields.integer("vocab_size"),
        dim=fields.integer("d_model"),
        num_layers=num_layers,
        num_decoder_layers=num_decoder_layers,
        num_heads=fields.integer("num_heads"),
        head_dim=fields.integer("d_kv"),
        hidden_dim=fields.integer("d_ff"),
        activation=ACTIVATIONS[fields.choice("dense_act_fn", ACTIVATIONS, "relu")],
        num_buckets=num_buckets,
        max_distance=fields.integer("relative_attention_max_distance", 128, least=num_buckets // 2 + 1),
        eps=fields.number("layer_norm_epsilon", 1e-6),
        dropout=fields.number("dropout_rate", 0.1, most=1.0),
        num_experts=fields.integer("num_experts", 8),
        every=num_layers // fields.integer("num_sparse_encoder_layers", 3, most=num_layers),
        decoder_every=num_decoder_layers // fields.integer("num_sparse_decoder_layers", 3, most=num_decoder_layers),
        capacity=PerRow(places=fields.integer("expert_capacity", 64)),
        jitter=fields.number("router_jitter_noise", 0.01, most=1.0),
    )


def _write(config: EncoderDecoder.Config) -> dict[str, Any]:
    encoder, decoder = config.encoder, config.decoder
    block: Any = encoder.blocks[1 % len(encoder.blocks)]
    channel, positions = block.channel, encoder.positions
    return {
        "vocab_size": config.vocab_size,
        "d_model": encoder.dim,
        "num_layers": encoder.num_layers,
        "num_decoder_layers": decoder.num_layers,
        "num_sparse_encoder_layers": encoder.num_layers // len(encoder.blocks),
        "num_sparse_decoder_layers": decoder.num_layers // len(decoder.blocks),
        "num_heads": block.mixer.num_heads,
        "d_kv": block.mixer.head_dim_of(encoder.dim),
        "d_ff": channel.experts.hidden_dim,
        "dense_act_fn": activation_name(channel.experts.activation),
        "num_experts": channel.experts.num_experts,
        "expert_capacity": channel.router.capacity.places,
        "router_jitter_noise": channel.router.jitter,
        "router_bias": False,
        "router_dtype": "float32",
        "relative_attention_num_buckets": positions.num_buckets,  # type: ignore[union-attr]
        "relative_attention_max_distance": positions.max_distance,  # type: ignore[union-attr]
        "layer_norm_epsilon": block.norm.eps,
        "tie_word_embeddings": True,
        "dropout_rate": block.dropout,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,  # the authors begin with padding
    }


def _rules(config: EncoderDecoder.Config) -> tuple[Rule, ...]:
    return (
        *t5.shared_rules(config),
        *t5.frame_rules("encoder", "i"),
        *_channel_rules("encoder", config.encoder),
        *t5.frame_rules("decoder", "j"),
        *_channel_rules("decoder", config.decoder),
    )


def _channel_rules(stack: str, config: Stack.Config) -> list[Rule]:
    """Dense and sparse blocks have different names, so that each has its own rules."""
    found: list[Rule] = []
    for layer in range(config.num_layers):
        ours, theirs = f"{stack}.blocks.{layer}.channel", f"{stack}.block.{layer}.layer.{1 + (stack == 'decoder')}.mlp"
        channel = config.blocks[layer % len(config.blocks)].channel
        if isinstance(channel, MoE.Config):
            found.append(same(f"{ours}.router.weight", f"{theirs}.router.classifier.weight"))
            for part, name in (("up", "wi"), ("out", "wo")):
                bank, one = f"{ours}.experts.{part}.weight", f"{theirs}.experts.expert_{{e}}.{name}.weight"
                found += stacked(bank, one, channel.experts.num_experts)
        else:
            found += [
                same(f"{ours}.{p}.weight", f"{theirs}.{name}.weight") for p, name in (("up", "wi"), ("out", "wo"))
            ]
    return found


EXAMPLE = architecture(
    vocab_size=53,
    dim=20,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=3,
    head_dim=6,
    hidden_dim=33,
    num_buckets=8,
    max_distance=12,
    num_experts=3,
    every=2,
    decoder_every=3,
    capacity=PerRow(places=64),
)

HUGGING_FACE = Family(
    "switch_transformers", "SwitchTransformersForConditionalGeneration", _read, _write, _rules, EXAMPLE
)
