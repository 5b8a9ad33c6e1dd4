"""LoRA on modules: its equation in float64, which layers patterns mean, choosing and merging, what training keeps."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import gguf
import numpy as np
import oracles
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from torch import Tensor, nn

from allyouneed.adapt import lora
from allyouneed.adapt.layers import Lora, LoraEmbedding, LoraLinear, Whole
from allyouneed.adapt.lora import adapt, disabled, merge, unload, unmerge, use, using
from allyouneed.adapt.packing import KINDS, pack
from allyouneed.adapt.quantise import Quantise, quantise
from allyouneed.adapt.targets import find
from allyouneed.core.errors import InputError
from allyouneed.data.batches import Windows
from allyouneed.models import bert, bloom, gpt2, gpt_neox, llama, t5
from allyouneed.models.heads import Classifier
from allyouneed.nn.packed import PackedEmbedding, PackedLinear
from allyouneed.objectives.next_token import next_token
from allyouneed.train.loop import Training, train

WIDE = llama.architecture(vocab_size=53, context=48, dim=64, num_layers=1, num_heads=2, hidden_dim=64, tied=False)
EVERYTHING = ("q", "k", "v", "out", "gate", "up", "head", "embedding")


def ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, 53, (rows, length), generator=torch.Generator().manual_seed(0))


def made(config: object = llama.EXAMPLE) -> nn.Module:
    return oracles.randomised(config.replace(tied=False))  # type: ignore[attr-defined]


def scattered(module: nn.Module, name: str = "default", seed: int = 0) -> nn.Module:
    """An adapter's matrices all random, so that none is without effect."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora.parameters(module, name).values():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    return module


# The equation


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_its_equation_in_float64(rslora, bias):
    torch.manual_seed(0)
    layer, x = LoraLinear(nn.Linear(33, 21, bias=bias)), torch.randn(2, 5, 33)
    layer.add("a", Lora.Config(rank=4, alpha=6.0, rslora=rslora))
    layer.weights = {"a": 0.5}
    nn.init.normal_(layer.adapters["a"].B)
    A, B, W = (p.double() for p in (layer.adapters["a"].A, layer.adapters["a"].B, layer.base.weight))
    s = 6 / (2 if rslora else 4)
    expected = x.double() @ (W + 0.5 * s * B @ A).T + (layer.base.bias.double() if bias else 0)
    assert (layer(x) - expected).abs().max() <= 5e-6


def test_gradients_are_those_of_the_equation_and_reach_adapters_and_input_only():
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(13, 7).requires_grad_(False))
    layer.add("a", Lora.Config(rank=3, alpha=6.0))
    nn.init.normal_(layer.adapters["a"].B)
    layer.weights = {"a": 0.7}
    x, gradient = torch.randn(4, 5, 13, requires_grad=True), torch.randn(4, 5, 7)
    layer(x).backward(gradient)
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.adapters["a"].A, layer.adapters["a"].B)]
    W, b = layer.base.weight.double(), layer.base.bias.double()
    exact = leaves[0] @ W.T + b + 0.7 * 2 * leaves[0] @ leaves[1].T @ leaves[2].T
    expected = torch.autograd.grad(exact, leaves, gradient.double())
    for found, other in zip((x, layer.adapters["a"].A, layer.adapters["a"].B), expected, strict=True):
        assert (found.grad - other).abs().max() <= 1e-5 * other.abs().max()
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_gradcheck():
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(5, 4)).double()
    layer.add("a", Lora.Config(rank=2))
    layer.add("b", Lora.Config(rank=3, alpha=1.0))
    layer.double().weights = {"a": 1.0, "b": -0.5}
    for p in layer.adapters.parameters():
        nn.init.normal_(p)
    names = [name for name, _ in layer.adapters.named_parameters()]

    def f(x: Tensor, *values: Tensor) -> Tensor:
        given = {f"adapters.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(layer, given, (x,))

    inputs = [torch.randn(3, 5, dtype=torch.double, requires_grad=True)]
    inputs += [p.detach().clone().requires_grad_() for p in layer.adapters.parameters()]
    assert torch.autograd.gradcheck(f, inputs)


def test_a_table_is_its_rows_plus_those_of_the_product():
    torch.manual_seed(0)
    layer = LoraEmbedding(nn.Embedding(11, 6))
    layer.add("a", Lora.Config(rank=3, alpha=6.0))
    assert torch.equal(layer(torch.arange(11)), layer.base.weight)  # A begins as zeros
    layer.weights = {"a": 1.0}
    nn.init.normal_(layer.adapters["a"].A)
    A, B = layer.adapters["a"].A, layer.adapters["a"].B
    expected = layer.base.weight + 2 * (B @ A).T
    assert torch.allclose(layer(torch.arange(11).view(1, 11))[0], expected, atol=1e-5)


def test_dropout_is_of_what_the_adapter_reads_and_of_nothing_in_evaluation():
    torch.manual_seed(0)
    layer, x = LoraLinear(nn.Linear(400, 3)), torch.ones(2000, 400)
    layer.add("a", Lora.Config(rank=1, dropout=0.25))
    layer.weights = {"a": 1.0}
    nn.init.ones_(layer.adapters["a"].A), nn.init.ones_(layer.adapters["a"].B)
    added = layer(x) - layer.base(x)
    assert added[:, 0].mean().item() == pytest.approx(400, rel=0.01) and added[:, 0].std() > 5
    assert torch.allclose(layer.eval()(x) - layer.base(x), torch.full((2000, 3), 400.0), rtol=1e-4)


def test_packed_layers_are_bases_too():
    torch.manual_seed(0)
    raw = gguf.quants.quantize(np.random.default_rng(0).standard_normal((24, 64), np.float32), Kind.Q4_1)
    packed = PackedLinear.from_blocks(raw, Kind.Q4_1, in_features=64)
    plain = nn.Linear(64, 24, bias=False)
    plain.weight.data = packed.dequantised()
    layers = [LoraLinear(packed), LoraLinear(plain)]
    x = torch.randn(3, 64)
    found = []
    for layer in layers:
        layer.add("a", Lora.Config(rank=4), torch.Generator().manual_seed(1))
        nn.init.constant_(layer.adapters["a"].B, 0.3)
        layer.weights = {"a": 1.0}
        y = layer(x)
        y.square().sum().backward()
        found.append((y, layer.adapters["a"].A.grad))
    assert torch.allclose(*(y for y, _ in found), atol=1e-4) and torch.allclose(*(g for _, g in found), rtol=1e-4)
    with pytest.raises(
        InputError, match="0: a PackedLinear has no plain weight to merge into; load the model unpacked"
    ):
        model = nn.Sequential(packed)
        adapt(model, Lora.Config(targets=("0",)))
        merge(model)


# Which layers


@pytest.mark.parametrize(
    ("targets", "kinds"),
    [
        (("q", "v"), {"q", "v"}),
        (("mixer.q",), {"q"}),
        (("blocks.1.mixer.q", "channel.out"), {"q", "channel.out"}),
        (r"blocks\.\d\.mixer\.[qk]", {"q", "k"}),
        ("all-linear", {"q", "k", "v", "out", "channel.out", "gate", "up"}),
        (("head", "embedding"), {"head", "embedding"}),
    ],
)
def test_patterns(targets, kinds):
    module = made()
    found = find(module, targets)
    assert {"channel.out" if name.endswith("channel.out") else name.split(".")[-1] for name in found} == kinds
    many = 1 if "blocks.1.mixer.q" in targets else 2
    per_kind = {kind: 1 if kind in ("head", "embedding") else (many if kind == "q" else 2) for kind in kinds}
    assert len(found) == sum(per_kind.values())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q", "query"), r"unknown target \(it matches no linear layer or embedding\) 'query'; known: "),
        (("gat",), "did you mean 'gate'"),
        (r"blocks\.7\..*", "matches no linear layer"),
        ("[", r"target '\[' is no regular expression"),
        ((), r"targets=\(\); name at least one layer"),
        (("mixer_norm",), "matches no linear layer"),
    ],
)
def test_patterns_that_mean_nothing(targets, message):
    module = made()
    with pytest.raises(InputError, match=message):
        adapt(module, Lora.Config(targets=targets))
    assert not lora.adapted(module) and all(p.requires_grad for p in module.parameters())


def test_tied_layers_are_refused_before_anything_is_changed():
    module = llama.EXAMPLE.replace(tied=True).build()
    for targets in (("head",), ("embedding",)):
        with pytest.raises(InputError, match=f"{targets[0]} shares its tensor with [a-z]+: leave"):
            adapt(module, Lora.Config(targets=targets))
    with pytest.raises(InputError, match="embedding shares its tensor with the head"):
        adapt(bert.EXAMPLE.build(), Lora.Config(targets=("embedding",)))
    assert adapt(bert.encoder_of(bert.EXAMPLE).build(), Lora.Config(targets=("embedding",))) == [
        "embedding",
        "positions.embedding",
    ]
    assert not lora.adapted(module)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank=0; it must be 1 or more"),
        ({"alpha": 0.0}, "alpha=0.0; it must be above 0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"dropout": 1.0}, "dropout=1.0; from 0 to below 1"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(InputError, match=message):
        Lora.Config(**changes)


def test_names_of_adapters():
    module = made()
    adapt(module, Lora.Config())
    for name, message in (
        ("default", "is there already"),
        ("a.b", "letters, digits"),
        ("pop", "none of PyTorch's own"),
    ):
        with pytest.raises(InputError, match=message):
            adapt(module, Lora.Config(), name)
    with pytest.raises(InputError, match="unknown adapter 'defautl'; did you mean 'default'"):
        use(module, {"defautl": 1.0})


def test_the_same_seed_draws_the_same_matrices_whatever_else_is_adapted():
    torch.manual_seed(5)
    one, other = made(), made()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    adapt(one, Lora.Config(targets=("v",)), seed=3)
    adapt(other, Lora.Config(targets=("q", "v")), seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    for key, p in lora.parameters(one).items():
        assert torch.equal(p, lora.parameters(other)[key]) and p.device == one.device
    again = made()
    adapt(again, Lora.Config(targets=("v",)), seed=4)
    assert not torch.equal(next(iter(lora.parameters(again).values())), next(iter(lora.parameters(one).values())))


# Choosing and merging


@torch.no_grad()
def test_nothing_changes_before_training_and_everything_comes_back():
    module = made()
    before = module(ids()).logits
    adapt(module, Lora.Config(targets=EVERYTHING))
    assert torch.equal(module(ids()).logits, before)
    scattered(module)
    assert (module(ids()).logits - before).abs().max() > 0.1
    with disabled(module):
        assert torch.equal(module(ids()).logits, before)
    assert (module(ids()).logits - before).abs().max() > 0.1
    unload(module)
    assert torch.equal(module(ids()).logits, before) and all(p.requires_grad for p in module.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [llama.EXAMPLE, gpt2.EXAMPLE, gpt_neox.EXAMPLE, bloom.EXAMPLE], ids=lambda c: c.blocks[0].channel.owner
)
def test_merging_is_exact_and_costs_nothing(config):
    module = made(config)
    weights = {name: p.clone() for name, p in module.named_parameters()}
    targets = ("head", "embedding", *{name.split(".")[-1] for name in find(module, "all-linear")})
    adapt(module, Lora.Config(rank=3, alpha=1.5, targets=targets))
    scattered(module)
    expected, scale = module(ids()).logits, 1 / module(ids()).logits.abs().max()
    merge(module)
    assert (module(ids()).logits - expected).abs().max() * scale <= 2e-6
    with pytest.raises(InputError, match="adapter default is merged; unmerge it first"):
        use(module, {})
    unmerge(module)
    for layer in lora.adapted(module):
        layer.weights = {}
    back = dict(unload(module).named_parameters())
    assert max((back[name] - w).abs().max().item() for name, w in weights.items()) <= 1e-6
    assert back.keys() == weights.keys()
    assert not any(isinstance(part, lora.Adapted) for part in module.modules())


@torch.no_grad()
def test_several_adapters_are_a_weighted_sum_of_products():
    module = made()
    plain = {name: p.clone() for name, p in module.named_parameters()}
    adapt(module, Lora.Config(rank=2, targets=("q", "up")), "one")
    adapt(module, Lora.Config(rank=5, alpha=2.0, targets=("up", "v")), "two")
    scattered(module, "one", 1), scattered(module, "two", 2)
    use(module, {"one": 0.3, "two": -1.2})
    both = module(ids()).logits
    deltas = {}
    for key, layer in ((k, x) for k, x in module.named_modules() if isinstance(x, LoraLinear)):
        deltas[key] = sum(
            w * layer.adapters[n].delta() for n, w in {"one": 0.3, "two": -1.2}.items() if n in layer.adapters
        )
    with using(module, {"one": 1.0}):
        assert not torch.allclose(module(ids()).logits, both)
    assert torch.equal(module(ids()).logits, both)
    assert [p.requires_grad for p in lora.parameters(module, "one").values()] == [True] * 8
    use(module, {"two": 1.0})
    assert not any(p.requires_grad for p in lora.parameters(module, "one").values())
    unload(module)
    for key, delta in deltas.items():
        assert torch.equal(module.get_parameter(f"{key}.weight"), plain[f"{key}.weight"])
        module.get_parameter(f"{key}.weight").add_(delta)
    assert (module(ids()).logits - both).abs().max() <= 1e-5 * both.abs().max()


def test_a_layer_trained_whole_has_a_copy_for_each_adapter():
    head = Classifier.Config(model=llama.EXAMPLE, labels=("a", "b"), bias=False, dropout=0.0).build().eval()
    batch = {"ids": ids()[:, None], "segments": torch.ones(2, 1, 9, dtype=torch.long)}

    @torch.no_grad()
    def told() -> Tensor:
        return head(batch)

    before = told()
    found = adapt(head, Lora.Config(whole=("layer",)))
    assert isinstance(head.layer, Whole) and "layer" not in found
    assert torch.equal(told(), before)
    head(batch).sum().backward()
    trained = {name for name, p in head.named_parameters() if p.grad is not None}
    assert "layer.adapters.default.weight" in trained and "layer.base.weight" not in trained
    with torch.no_grad():
        head.layer.adapters["default"].weight.fill_(0.0)
    assert told().abs().max() == 0
    with disabled(head):
        assert torch.equal(told(), before)
    adapt(head, Lora.Config(whole=("layer",)), "other")
    with pytest.raises(InputError, match="bring whole layers, which cannot be weighed"):
        use(head, {"default": 1.0, "other": 1.0})
    with pytest.raises(InputError, match="layer is trained whole by adapter 'default'"):
        adapt(head, Lora.Config(targets=("layer",)), "third")
    use(head, {"default": 1.0})
    merge(head)
    assert unload(head).layer.weight.abs().max() == 0


def test_translators_are_adapted_in_both_stacks():
    module = made(t5.EXAMPLE)
    found = adapt(module, Lora.Config())
    assert len(found) == 2 * (2 + 3 + 3) and {name.split(".")[0] for name in found} == {"encoder", "decoder"}
    assert sum("cross" in name for name in found) == 6


# Training


def batches() -> Windows:
    return Windows(
        torch.randint(0, 53, (400,), generator=torch.Generator().manual_seed(0)), batch_size=4, length=8, seed=0
    )


def learner() -> nn.Module:
    module = made()
    adapt(module, Lora.Config(rank=2, dropout=0.1, targets=("q", "up")))
    return module


def run(module: nn.Module, folder: Path | None = None, **changes: object) -> object:
    training = Training(steps=8, save_every=3, log_every=1).replace(**changes)
    return train(module, next_token, batches(), training, folder=folder, quiet=True)


def test_training_changes_adapters_only_and_its_checkpoint_holds_nothing_else(tmp_path):
    module = learner()
    before = {name: p.clone() for name, p in module.named_parameters()}
    run(module, tmp_path)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(lora.parameters(module))
    folder = tmp_path / "checkpoints/step-00000008"
    assert load_file(folder / "model.safetensors").keys() == changed
    numbers = sum(p.numel() for p in lora.parameters(module).values())
    tensors = (folder / "model.safetensors").stat().st_size + (folder / "optimizer.safetensors").stat().st_size
    assert 3 * 4 * numbers <= tensors <= 3 * 4 * numbers + 200 * 3 * len(changed)  # weights, two moments; and names


def test_resuming_is_bit_for_bit(tmp_path):
    unbroken, resumed = learner(), learner()
    whole = run(unbroken)
    run(learner(), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/step-00000008")
    again = run(resumed, tmp_path)
    for name, p in unbroken.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]


def test_the_checkpoint_of_packed_weights_leaves_them_out(tmp_path):
    module = made(llama.architecture(vocab_size=53, context=48, dim=32, num_layers=1, num_heads=2, hidden_dim=32))
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Linear | nn.Embedding):
            raw = gguf.quants.quantize(part.weight.detach().numpy(), Kind.Q8_0)
            kind = PackedLinear if isinstance(part, nn.Linear) else PackedEmbedding
            module.set_submodule(name, kind.from_blocks(raw, Kind.Q8_0, 32))
    adapt(module, Lora.Config(rank=2))
    first = run(module, tmp_path).history[0]["loss"]
    assert load_file(tmp_path / "checkpoints/step-00000008/model.safetensors").keys() == set(lora.parameters(module))
    assert run(module, None, steps=1).history[0]["loss"] < first


def test_recomputing_and_bf16_train_the_same_adapters():
    plain = run(learner()).history
    again = run(learner(), recompute=True).history
    narrow = run(learner(), precision="bf16").history
    assert [row["loss"] for row in again] == [row["loss"] for row in plain]
    assert [row["loss"] for row in narrow] == pytest.approx([row["loss"] for row in plain], rel=0.02)
    assert narrow[-1]["loss"] != plain[-1]["loss"]


@torch.no_grad()
def test_the_base_may_be_narrower_than_its_adapters():
    layer = LoraLinear(nn.Linear(16, 8).bfloat16())
    layer.add("a", Lora.Config(rank=2))
    layer.weights = {"a": 1.0}
    nn.init.ones_(layer.adapters["a"].B)
    x = torch.randn(5, 16).bfloat16()
    expected = layer.base(x).float() + layer.adapters["a"](x)
    assert layer(x).dtype is torch.bfloat16 and layer.adapters["a"].A.dtype is torch.float32
    assert (layer(x) - expected).abs().max() <= 0.02 * expected.abs().max()


# What adapters must leave as it is


@torch.no_grad()
def test_adapters_of_a_module_in_evaluation_drop_nothing_out():
    module = made().eval()
    adapt(module, Lora.Config(rank=2, dropout=0.5))
    scattered(module)
    assert not any(part.training for part in module.modules())
    assert torch.equal(module(ids()).logits, module(ids()).logits)
    adapt(module.train(), Lora.Config(rank=2, dropout=0.5), "other")
    assert all(part.training for part in module.modules())


def test_tied_layers_are_refused_however_they_are_stored():
    for kind in ("plain", "coded", "packed"):
        module = WIDE.replace(tied=True).build()
        if kind == "coded":
            quantise(module, Quantise.Config(embedding="int8"))
        elif kind == "packed":
            pack(module, next(iter(KINDS)))
        with pytest.raises(InputError, match="head shares its tensor with embedding"):
            adapt(module, Lora.Config(targets=("head",)))


def test_what_cannot_be_used_changes_nothing():
    module = made()
    adapt(module, Lora.Config(rank=2, whole=("head",)), "one")
    adapt(module, Lora.Config(rank=2, whole=("head",)), "two")
    before = [dict(layer.weights) for layer in lora.adapted(module)]
    for weights, message in (
        ({"one": 0.5}, "whole layers"),
        ({"one": float("nan")}, "adapter 'one': weight=nan; a finite number"),
        ({"two": float("inf")}, "weight=inf"),
    ):
        with pytest.raises(InputError, match=message):
            use(module, weights)
        with pytest.raises(InputError, match=message), using(module, weights):
            pass
        assert [layer.weights for layer in lora.adapted(module)] == before


def test_targets_that_mean_no_layer_freeze_nothing():
    module = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(InputError, match="nothing to adapt"):
        adapt(module, Lora.Config(targets="all-linear"))
    assert all(p.requires_grad for p in module.parameters())


def test_unloading_gives_packed_weights_back_to_the_state_dict():
    module = WIDE.build()
    pack(module, next(iter(KINDS)))
    before = module.state_dict().keys()
    adapt(module, Lora.Config(rank=2), "one")
    adapt(module, Lora.Config(rank=2), "two")
    assert len(module.state_dict()) < len(before) + 4
    assert unload(module).state_dict().keys() == before
