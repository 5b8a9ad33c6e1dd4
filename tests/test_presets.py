"""The published sizes: they build on the meta device with as many parameters as their papers print."""

from __future__ import annotations

import pytest
import torch

from allyouneed.core.errors import InputError
from allyouneed.models import (
    bert,
    bloom,
    gpt,
    gpt2,
    gpt3,
    gpt_neo,
    gpt_neox,
    llama,
    llama2,
    mixtral,
    recurrent,
    rwkv,
    switch,
    t5,
    transformer,
)
from allyouneed.nn.kernels import Flash
from allyouneed.nn.moe import active_parameters
from allyouneed.papers import alibi, chinchilla, flash_attention, scaling_laws

# GPT-2: the released checkpoints' counts, which correct the paper's table 2 (117M … 1542M)
GPT2 = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}
# BERT: the released uncased checkpoints' counts, encoder and pooler, then with the heads of pre-training
BERT = {"base": (109_482_240, 110_106_428), "large": (335_141_888, 336_226_108)}
# LLaMA: table 2
LLAMA = {"7B": 6.7e9, "13B": 13.0e9, "33B": 32.5e9, "65B": 65.2e9}
# Llama 2: the released checkpoints' counts, 34B that of Code Llama with Llama 2's vocabulary
LLAMA2 = {"7B": 6_738_415_616, "13B": 13_015_864_320, "34B": 33_743_970_304, "70B": 68_976_648_192}
# GPT-3: table 2.1
GPT3 = {
    "125M": 125e6,
    "350M": 350e6,
    "760M": 760e6,
    "1.3B": 1.3e9,
    "2.7B": 2.7e9,
    "6.7B": 6.7e9,
    "13B": 13.0e9,
    "175B": 175.0e9,
}
# Pythia: table 1's non-embedding parameters, and those of the released checkpoints as their project lists them
PYTHIA = {
    "70M": (18_915_328, 70_426_624),
    "160M": (85_056_000, 162_322_944),
    "410M": (302_311_424, 405_334_016),
    "1B": (805_736_448, 1_011_781_632),
    "1.4B": (1_208_602_624, 1_414_647_808),
    "2.8B": (2_517_652_480, 2_775_208_960),
    "6.9B": (6_444_163_072, 6_857_302_016),
    "12B": (11_327_027_200, 11_846_072_320),
}
# Bloom and GPT-Neo: the released checkpoints' counts
BLOOM = {
    "560M": 559_214_592,
    "1.1B": 1_065_314_304,
    "1.7B": 1_722_408_960,
    "3B": 3_002_557_440,
    "7.1B": 7_069_016_064,
    "176B": 176_247_271_424,
}
GPT_NEO = {"125M": 125_198_592, "1.3B": 1_315_575_808, "2.7B": 2_651_307_520}
# T5: the released checkpoints' counts
T5 = {
    ("small", "1.0"): 60_506_624,
    ("base", "1.0"): 222_903_552,
    ("large", "1.0"): 737_668_096,
    ("3B", "1.0"): 2_851_598_336,
    ("11B", "1.0"): 11_307_321_344,
    ("small", "1.1"): 76_961_152,
    ("base", "1.1"): 247_577_856,
    ("large", "1.1"): 783_150_080,
    ("3B", "1.1"): 2_849_757_184,
    ("11B", "1.1"): 11_135_332_352,
}
# Mixtral: parameters, and those that a token passes, as its authors' announcements give them
MIXTRAL = {"8x7B": (46.7e9, 12.9e9), "8x22B": (140.6e9, 39.1e9)}
# Switch: Fedus et al. 2021, table 9
SWITCH = {"base": 7e9, "large": 26e9, "xxl": 395e9, "c": 1571e9}
# Mixtures of 2017: Shazeer et al., table 7: ops a timestep and parameters without embedding and head in millions, all
# parameters in billions
MIXTURES = {
    "MoE-4": (8.4, 8.4, 0.8),
    "MoE-32": (8.4, 37.8, 0.9),
    "MoE-256": (8.6, 272.9, 1.1),
    "MoE-256-h": (8.4, 272.9, 1.1),
    "MoE-1024-h": (8.5, 1079.0, 1.9),
    "MoE-4096-h": (8.9, 4303.4, 5.1),
    "MoE-34M": (33.8, 4313.9, 6.0),
}
# The Transformer: Vaswani et al. 2017, table 3
TRANSFORMER = {"base": 65e6, "big": 213e6}
# RWKV-4: table 2
RWKV = {"169M": 1.693e8, "430M": 4.304e8, "1.5B": 1.515e9, "3B": 2.985e9, "7B": 7.393e9, "14B": 1.415e10}


def test_gpt():
    assert gpt.sized().num_parameters() == 116_534_784  # the released model's; the paper prints no count


@pytest.mark.parametrize("name", GPT2)
def test_gpt2(name):
    assert gpt2.sized(name).num_parameters() == GPT2[name]


@pytest.mark.parametrize("name", BERT)
def test_bert(name):
    config = bert.sized(name)
    assert (bert.encoder_of(config).num_parameters(), config.num_parameters()) == BERT[name]


@pytest.mark.parametrize("name", LLAMA)
def test_llama(name):
    assert abs(llama.sized(name).num_parameters() / LLAMA[name] - 1) < 0.01


@pytest.mark.parametrize("name", LLAMA2)
def test_llama2(name):
    config = llama2.sized(name)
    assert config.num_parameters() == LLAMA2[name]
    assert config.context == 4096 and (config.blocks[0].mixer.num_kv_heads < config.blocks[0].mixer.num_heads) == (
        name in ("34B", "70B")
    )


@pytest.mark.parametrize("name", GPT3)
def test_gpt3(name):
    assert abs(gpt3.sized(name).num_parameters() / GPT3[name] - 1) < 0.025
    windows = [block.mixer.window for block in gpt3.sized(name).blocks]
    assert windows == [None, 256]


@pytest.mark.parametrize("name", BLOOM)
def test_bloom(name):
    assert bloom.sized(name).num_parameters() == BLOOM[name]


@pytest.mark.parametrize("name", GPT_NEO)
def test_gpt_neo(name):
    assert gpt_neo.sized(name).num_parameters() == GPT_NEO[name]


@pytest.mark.parametrize("name", PYTHIA)
def test_pythia(name):
    config, (without_embeddings, whole) = gpt_neox.sized(name), PYTHIA[name]
    assert config.num_parameters() == whole
    assert whole - 2 * config.vocab_size * config.dim == without_embeddings


def test_pythia_has_eight_sizes():
    with pytest.raises(InputError, match=r"'1\.4B'"):
        gpt_neox.sized("1.3B")


@pytest.mark.parametrize("name", T5, ids=" ".join)
def test_t5(name):
    assert t5.sized(name[0], version=name[1]).num_parameters() == T5[name]


@pytest.mark.parametrize("name", MIXTRAL)
def test_mixtral(name):
    with torch.device("meta"):
        model = mixtral.sized(name).build()
    total, active = MIXTRAL[name]
    assert abs(mixtral.sized(name).num_parameters() / total - 1) < 0.002
    assert abs(active_parameters(model) / active - 1) < 0.003


@pytest.mark.parametrize("name", SWITCH)
def test_switch(name):
    assert abs(switch.sized(name).num_parameters() / SWITCH[name] - 1) < (0.06 if name in ("base", "large") else 0.002)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_2017(name):
    config, (ops, inner, total) = recurrent.mixture(name), MIXTURES[name]
    with torch.device("meta"):
        model = config.build()
    outer = model.embedding.weight.numel() + model.head.weight.numel()
    parameters = config.num_parameters()
    assert abs((parameters - outer) / 1e6 / inner - 1) < 0.002
    assert abs(parameters / 1e9 - total) < (0.06 if name != "MoE-34M" else 0.1)
    # one multiplication and addition is one op: of each weight that a token passes; of a hierarchy's second level those
    # of its two groups, which is where the count of active parameters, that knows no groups, is too high
    router, active = model.layers.between.router, active_parameters(model) - outer
    if hasattr(router, "primary"):
        second = router.weight.numel() + router.noise.numel()
        active -= second - second * router.config.k // router.config.groups
    assert abs(active / 1e6 / ops - 1) < 0.01


@pytest.mark.parametrize("name", TRANSFORMER)
def test_transformer(name):
    assert abs(transformer.sized(name).num_parameters() / TRANSFORMER[name] - 1) < 0.035


@pytest.mark.parametrize("name", RWKV)
def test_rwkv(name):
    config = rwkv.sized(name)
    assert config.num_parameters() == pytest.approx(RWKV[name], rel=4e-4)  # as many digits as the table prints
    dim, layers = config.dim, config.num_layers  # sec. 4's formula
    assert config.num_parameters() == 2 * config.vocab_size * dim + 13 * dim**2 * layers + dim * (11 * layers + 4)


def test_kaplan_s_largest():
    """1.5 billion without embeddings, 12 · layers · dim² (Kaplan et al. 2020, sec. 1.3 and 3), and norms and biases."""
    model = scaling_laws.PAPER.sizes["paper"].largest.model
    assert (model.num_layers, model.dim) == (48, 1600)
    assert abs(model.num_parameters(embeddings=False) / (12 * 48 * 1600**2) - 1) < 1e-3
    assert abs(model.num_parameters(embeddings=False) / 1.5e9 - 1) < 0.02


# Hoffmann et al. 2022, table 4. Their relative positions (Dai et al. 2019) multiply a matrix of dim² a layer, which our
# parts do not have: with it the counts are the names'
@pytest.mark.parametrize(
    ("name", "built", "whole"), [("Chinchilla 70B", 64.7e9, 70e9), ("Gopher 280B", 258.2e9, 280e9)]
)
def test_chinchilla_and_gopher(name, built, whole):
    config = chinchilla.sized(name)
    assert abs(config.num_parameters() / built - 1) < 0.001
    assert abs((config.num_parameters() + config.num_layers * config.dim**2) / whole - 1) < 0.005


def test_flash_attention():
    config = flash_attention.PAPER.sizes["paper"]
    assert (
        config.model.num_parameters() == GPT2["355M"]
        and config.model.with_kernel(config.trained).blocks[0].mixer.kernel == Flash()
    )


def test_alibi():
    assert abs(alibi.LARGE.num_parameters() / 1.3e9 - 1) < 0.05


def test_gpt2_residual_branches_begin_small():
    torch.manual_seed(0)
    model = gpt2.architecture(vocab_size=99, dim=256, num_layers=8, num_heads=4).build()
    block = model.blocks[3]
    assert abs(block.mixer.q.weight.std().item() - 0.02) < 1e-3
    for linear in (block.mixer.out, block.channel.out):
        assert abs(linear.weight.std().item() - 0.02 / 16**0.5) < 3e-4  # 1/√(2 · 8 layers)
        assert linear.bias.abs().max() == 0
