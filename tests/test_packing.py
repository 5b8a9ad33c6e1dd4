"""Weights packed while they are loaded: in GGUF's formats, as near as these come, and computed with as they stand."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters import CONFIGS, MIXES, with_adapters
from gguf import GGMLQuantizationType as Kind
from serving import tokenizer
from torch import Tensor, nn

import allyouneed as ayn
from allyouneed.adapt.lora import use
from allyouneed.adapt.packing import KINDS, pack
from allyouneed.adapt.quantise import Quantise, quantise
from allyouneed.core.errors import InputError
from allyouneed.generate.reading import Piece
from allyouneed.models import gpt2, llama, mixtral
from allyouneed.models.checkpoints.adapters import save_adapter
from allyouneed.models.decoder import Decoder
from allyouneed.models.lowering import lowered
from allyouneed.nn import native
from allyouneed.nn.moe import StackedLinear
from allyouneed.nn.packed import PackedEmbedding, PackedLinear


def model(*, tied: bool = True) -> Decoder:
    torch.manual_seed(0)
    config = llama.architecture(
        vocab_size=tokenizer().vocab_size, context=64, dim=64, num_layers=2, num_heads=4, hidden_dim=96, tied=tied
    )
    built: Decoder = config.build().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built


def unpacked(module: Decoder) -> Decoder:
    """The same numbers in plain layers."""
    found = copy.deepcopy(module)
    found.embedding = nn.Embedding.from_pretrained(found.embedding(torch.arange(found.config.vocab_size)))
    for name, part in list(found.named_modules()):
        if isinstance(part, PackedLinear):
            plain = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
            plain.weight.data = part.dequantised()
            if part.bias is not None:
                plain.bias.data = part.bias
            found.set_submodule(name, plain)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_every_weight_is_within_half_a_step_and_logits_follow(kind: str, tied: bool) -> None:
    plain, module = model(tied=tied), model(tied=tied)
    assert pack(module, kind) == []
    for name, part in module.named_modules():
        if isinstance(part, PackedLinear):
            within_half_a_step(plain.get_submodule(name).weight, part.dequantised(), part.kind)
            assert part.kind == (Kind.Q8_0 if tied and name == "head" else KINDS[kind])
    ids = torch.arange(30)[None]
    assert (module(ids).logits - unpacked(module)(ids).logits).abs().max() <= 2e-5
    assert lowered(module) is not None or native.library() is None
    assert (module.head.blocks.data_ptr() == module.embedding.blocks.data_ptr()) == tied


def within_half_a_step(wanted: Tensor, found: Tensor, kind: Kind) -> None:
    """In blocks of 32 a step is the largest size over 127 (Q8_0), or the range over 15 (Q4_1); scales are halves."""
    blocks = wanted.unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1) / 127 if kind is Kind.Q8_0 else (blocks.amax(-1) - blocks.amin(-1)) / 15
    slack = blocks.abs().amax(-1) * 2**-10
    assert ((found.unflatten(-1, (-1, 32)) - blocks).abs() <= (step * 0.5 + slack)[..., None]).all()


def test_bits_a_weight() -> None:
    for kind, bits in (("int8", 8.5), ("int4", 5.0)):
        module = model()
        pack(module, kind)
        layer = module.blocks[0].mixer.q
        assert 8 * layer.blocks.numel() / (layer.in_features * layer.out_features) == bits


def test_biases_stay_and_positions_do() -> None:
    config = gpt2.architecture(vocab_size=61, context=32, dim=64, num_layers=1, num_heads=2)
    module = config.build().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    pack(module, "int8")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert (module(ids).logits - unpacked(module)(ids).logits).abs().max() <= 1e-3
    assert type(module.positions.embedding) is nn.Embedding and isinstance(module.embedding, PackedEmbedding)


def test_layers_whose_rows_are_no_whole_blocks_stay() -> None:
    module = (
        llama.architecture(vocab_size=53, context=48, dim=32, num_layers=1, num_heads=2, hidden_dim=40).build().eval()
    )
    assert pack(module, "int4") == ["blocks.0.channel.out"]
    module(torch.tensor([[1, 2]]))
    with pytest.raises(InputError, match="packed already"):
        pack(module, "int8")
    with pytest.raises(InputError, match="rows of no layer are whole blocks of 32"):
        pack(nn.Sequential(nn.Linear(24, 3)), "int8")
    with pytest.raises(InputError, match="unknown kind of packed weights 'int5'"):
        pack(model(), "int5")


def test_half_precision_is_packed_from_and_computed_in_float32() -> None:
    module = model().bfloat16()
    pack(module, "int8")
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert module(torch.tensor([[1, 2]])).logits.dtype == torch.float32


def test_loaded_so(tmp_path) -> None:
    ayn.save(model(), tmp_path, tokenizer())
    loaded, plain = ayn.load(tmp_path, quantize="int8"), ayn.load(tmp_path)
    assert isinstance(loaded.module.blocks[0].mixer.q, PackedLinear)
    found, wanted = (lm.score(["The quick"], [" brown fox"])[0] for lm in (loaded, plain))
    assert found == pytest.approx(wanted, abs=0.3) and found != wanted
    with pytest.raises(InputError, match="weights are packed already"):
        ayn.load("smollm2-135m-instruct", quantize="int4")
    with pytest.raises(InputError, match="unknown kind of weights 'int5'; did you mean"):
        ayn.load(tmp_path, quantize="int5")


def test_a_folder_of_16_bits_is_stored_in_4_as_if_it_had_32(tmp_path) -> None:
    """It is never held in 32, only what is left over."""
    half, held = model().bfloat16(), []
    for name, module in (("half", half), ("whole", copy.deepcopy(half).float())):
        ayn.save(module, tmp_path / name, tokenizer())
        lm = ayn.load(tmp_path / name, quantize="nf4")
        assert {p.dtype for p in lm.module.parameters()} == {torch.float32}
        held.append({name: x.clone() for name, x in lm.module.state_dict().items()})
    assert held[0].keys() == held[1].keys() and all(torch.equal(x, held[1][name]) for name, x in held[0].items())


@pytest.mark.parametrize("kind", ["int4", "nf4", "fp4"])
def test_adapters_over_weights_in_few_bits(kind, tmp_path) -> None:
    """Rows of several in one pass say what each says alone."""
    ayn.save(model(), tmp_path / "base", tokenizer())
    made = with_adapters(model())
    for name in CONFIGS:
        save_adapter(made, tmp_path / name, name, base=str(tmp_path / "base"))
    folders = {name: tmp_path / name for name in CONFIGS}
    lm = ayn.load(tmp_path / "base", quantize=kind, adapters=folders)
    assert (lowered(lm.module) is None) == (kind != "int4" or native.library() is None)
    pieces = [Piece([5, 6, 7], [i], 0, wanted=3, adapters=mix) for i, mix in enumerate(MIXES)]
    rows = lm.engine.reader.read(pieces).split(3)
    for one, mix in zip(rows, MIXES, strict=True):
        use(lm.module, dict(mix))
        with torch.no_grad():
            assert (one - lm.module(torch.tensor([[5, 6, 7]])).logits[0]).abs().max() <= 2e-5


def test_what_cannot_be_packed_is_refused_or_named() -> None:
    module = model()
    with torch.no_grad():
        module.blocks[1].mixer.k.weight[3, 3] = float("nan")
    with pytest.raises(InputError, match=r"blocks\.1\.mixer\.k: weights that are not finite"):
        pack(module, next(iter(KINDS)))
    module = model()
    quantise(module, Quantise.Config())
    with pytest.raises(InputError, match=r"weights are quantised already \(nf4\)"):
        pack(module, next(iter(KINDS)))
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "hidden_dim": 64, "num_experts": 3}
    experts = mixtral.architecture(vocab_size=53, context=48, **sizes).build().eval()
    left = pack(experts, next(iter(KINDS)))
    assert left and all(type(experts.get_submodule(name)) is not PackedLinear for name in left)
    assert {name for name, part in experts.named_modules() if isinstance(part, StackedLinear)} <= set(left)


def test_what_stays_in_float32_is_said_while_loading(tmp_path) -> None:
    config = llama.architecture(
        vocab_size=tokenizer().vocab_size, context=48, dim=32, num_layers=1, num_heads=2, hidden_dim=40
    )
    ayn.save(config.build(), tmp_path, tokenizer())
    module = ayn.load(tmp_path).module
    assert pack(copy.deepcopy(module), next(iter(KINDS)))
    with pytest.warns(UserWarning, match="stay in float32"):
        ayn.load(tmp_path, quantize=next(iter(KINDS)))
