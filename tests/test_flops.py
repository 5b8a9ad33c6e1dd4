"""FLOPs as the parts count them are those that PyTorch counts as it computes, product by product."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from allyouneed.models import bert, bloom, gpt, gpt2, gpt_neo, gpt_neox, llama, mixtral, rwkv, switch, t5, transformer
from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.models.stack import Stack
from allyouneed.nn.flops import TRAINING, Reading
from allyouneed.nn.kernels import Tiled
from allyouneed.nn.noisy_routers import Hierarchical, NoisyTopK

ROWS, LENGTH, SOURCE = 3, 21, 13
SMALL = {"vocab_size": 53, "context": 48, "dim": 24, "num_layers": 3, "num_heads": 6}
STACKS = {
    "gpt": gpt.EXAMPLE,
    "gpt2": gpt2.architecture(**SMALL),
    "llama, grouped queries": llama.architecture(**SMALL, num_kv_heads=2, hidden_dim=40),
    "gpt_neo, banded": gpt_neo.architecture(**SMALL, window=5),
    "gpt_neox, parallel": gpt_neox.architecture(**SMALL | {"num_heads": 3}),
    "bloom, ALiBi": bloom.architecture(**SMALL),
    "bert": bert.architecture(**SMALL),
    "bert, encoder alone": bert.encoder_of(bert.architecture(**SMALL)).replace(pooled=False),
}
PAIRS = {"t5": t5.EXAMPLE, "transformer": transformer.architecture(**SMALL, hidden_dim=40)}


def counted(module: nn.Module, *ids: torch.Tensor, training: bool) -> int:
    """On the meta device, where attention is made of products that the counter knows."""
    with FlopCounterMode(display=False) as counter:
        out = module(*ids)
        if training:
            heads = [out] if isinstance(out, torch.Tensor) else list(vars(out).values())
            sum(head.sum() for head in heads).backward()
    return counter.get_total_flops()


def on_meta(config, *shapes: tuple[int, int]) -> tuple[nn.Module, list[torch.Tensor]]:
    with torch.device("meta"):
        return config.build(), [torch.empty(shape, dtype=torch.long) for shape in shapes]


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", STACKS)
def test_a_stack(name, training):
    module, ids = on_meta(STACKS[name], (ROWS, LENGTH))
    ours = module.flops(Reading.of(rows=ROWS, length=LENGTH)) * (TRAINING if training else 1)
    assert ours == counted(module, *ids, training=training)
    assert ours == STACKS[name].flops(ROWS, LENGTH) * (TRAINING if training else 1)


@pytest.mark.parametrize("name", ["mixtral", "rwkv"])
def test_what_depends_on_the_tokens_or_is_computed_by_our_own_kernels(name):
    config = {"mixtral": mixtral.EXAMPLE, "rwkv": rwkv.EXAMPLE}[name]
    module = config.with_kernel(Tiled()).build()  # the CPU's own attention is one operator, unknown to the counter
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    assert config.flops(ROWS, LENGTH) == counted(module, ids, training=False)


def test_experts_of_an_encoder_decoder():
    ids = [torch.zeros(shape, dtype=torch.long) for shape in ((ROWS, SOURCE), (ROWS, LENGTH))]
    stacks = {name: getattr(switch.EXAMPLE, name).with_kernel(Tiled()) for name in ("encoder", "decoder")}
    module = switch.EXAMPLE.replace(**stacks).build().eval()  # nothing is dropped
    readings = [Reading.of(rows=ROWS, length=length) for length in (SOURCE, LENGTH)]
    with torch.no_grad():
        assert module.flops(*readings) == counted(module, *ids, training=False)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", PAIRS)
def test_both_stacks(name, training):
    module, ids = on_meta(PAIRS[name], (ROWS, SOURCE), (ROWS, LENGTH))
    assert isinstance(module, EncoderDecoder)
    ours = module.flops(Reading.of(rows=ROWS, length=SOURCE), Reading.of(rows=ROWS, length=LENGTH))
    assert ours * (TRAINING if training else 1) == counted(module, *ids, training=training)


def test_six_times_parameters_and_tokens_is_what_remains_without_scores():
    """C ≈ 6ND (Kaplan et al. 2020, sec. 2.1): exact but for biases and norms, which multiply nothing."""
    config = llama.architecture(**SMALL, hidden_dim=40, tied=True)
    norms = (2 * config.num_layers + 1) * config.dim
    weights = config.num_parameters() - norms  # the tied head once, the embedding's looking up being free
    module, _ = on_meta(config)
    assert TRAINING * module.flops(Reading(tokens=100)) == 6 * weights * 100
    assert config.num_parameters(embeddings=False) == weights + norms - config.vocab_size * config.dim


@pytest.mark.parametrize("config", [gpt2.architecture(**SMALL), STACKS["bert"], llama.architecture(**SMALL)])
def test_parameters_without_embeddings(config: Stack.Config):
    module, _ = on_meta(config)
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    head = getattr(module, "head", None)
    apart = {id(p): p.numel() for m in [*tables, *([head] if head is not None else [])] for p in m.parameters()}
    assert config.num_parameters() - config.num_parameters(embeddings=False) == sum(apart.values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", [NoisyTopK.Config(k=2), Hierarchical.Config(groups=2, k=2)])
def test_noise_is_a_product_in_training(router, training):
    """Both levels of a hierarchy; with all groups passed, every token passes all of its second level."""
    module = router.build(dim=8, num_experts=4).train(training)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 40, 8)
    assert module.flops(Reading(tokens=40)) == counted(module.choose, x[0], training=False)
    assert module.flops(Reading(tokens=40)) == 2 * 40 * 8 * (1 + training) * (6 if hasattr(module, "primary") else 4)
