"""Adapters in PEFT's files, against `peft` itself on `transformers`' models: theirs read, ours written, both merged;
what is refused; and an adapter's folder as a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracles
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from allyouneed import cli
from allyouneed.adapt import lora
from allyouneed.adapt.layers import Lora
from allyouneed.core.errors import InputError
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.models import gpt2
from allyouneed.models.checkpoints import huggingface
from allyouneed.models.checkpoints.adapters import load_adapter, merge_adapter, save_adapter
from allyouneed.models.checkpoints.loading import load_module, load_tokenizer, save
from allyouneed.nn.quantised import QuantisedLinear

TOLERANCE = 1e-5
# their layers by PEFT's patterns, ours by the same patterns in our names
CASES = {
    "llama, queries and values": (oracles.llama, ["q_proj", "v_proj"], ("q", "v")),
    "llama, all linear": (oracles.llama, "all-linear", "all-linear"),
    "llama, a regex": (oracles.llama, r".*\.[12]\.mlp\.(up|down)_proj", r"blocks\.[12]\.channel\.(up|out)"),
    "llama, embedding and head": (oracles.llama, ["embed_tokens", "lm_head"], ("embedding", "head")),
    "gpt2, fused": (oracles.gpt2, ["c_attn"], ("q", "k", "v")),
    "gpt2, all linear": (oracles.gpt2, "all-linear", "all-linear"),
    "gpt2, positions": (oracles.gpt2, ["wpe", "c_fc"], ("positions.embedding", "up")),
    "gpt_neox, fused": (oracles.gpt_neox, ["query_key_value", "dense"], ("q", "k", "v", "mixer.out")),
    "gpt_neox, the head too": (oracles.gpt_neox, ["lm_head", "dense_4h_to_h"], ("head", "channel.out")),
    "bloom, fused": (oracles.bloom, ["query_key_value"], ("q", "k", "v")),
    "bloom, all linear": (oracles.bloom, "all-linear", "all-linear"),
    "mixtral, attention": (oracles.mixtral, ["q_proj", "o_proj"], ("q", "mixer.out")),
    "bert": (oracles.bert, ["query", "dense"], ("q", "mixer.out", "up", "channel.out", "pooler", "transform")),
    "t5": (oracles.t5, ["q", "v", "wo"], ("q", "v", "channel.out")),
    "t5 1.1, all linear": (oracles.t5_1_1, "all-linear", "all-linear"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[Any, Path]:
    """The base models, saved by transformers."""
    found = {}
    for make in {case[0] for case in CASES.values()}:
        found[make] = tmp_path_factory.mktemp(make.__name__)
        make().save_pretrained(found[make])
    return found


def ids(length: int = 23) -> Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of a model of theirs or ours, in float64, so that nothing hides behind rounding."""
    model, x = model.double().eval(), ids()
    if isinstance(model, huggingface.EncoderDecoder):
        return model(x, x[:, :9]).logits
    if isinstance(model, huggingface.Decoder | huggingface.MaskedModel):
        return model(x).logits
    model.config._experts_implementation = "eager"  # Mixtral's grouped product takes no float64
    given = {"decoder_input_ids": x[:, :9]} if getattr(model.config, "is_encoder_decoder", False) else {}
    found = model(x, **given)
    return found.prediction_logits if "prediction_logits" in found else found.logits


def randomised(model: nn.Module) -> nn.Module:
    """A model of theirs or ours with all that its adapters hold random."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or ".adapters." in name:
                p.normal_(0, 0.2)
    return model


def theirs(base: nn.Module, folder: Path, **how: Any) -> nn.Module:
    """An adapter that PEFT made and saved; the model that has it."""
    model = randomised(peft.get_peft_model(base, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **how})))
    model.save_pretrained(folder)
    return model


def differ(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_we_read_theirs(case, merged, folders, tmp_path):
    make, targets, _ = CASES[case]
    model = theirs(make(), tmp_path, target_modules=targets)
    expected = logits(model)
    ours = huggingface.load(folders[make])
    plain = logits(ours)
    if merged:
        merge_adapter(ours, tmp_path)
        assert not lora.adapted(ours)
    else:
        load_adapter(ours, tmp_path)
    assert differ(logits(ours), expected) <= TOLERANCE < 1e-2 < differ(plain, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_they_read_ours(case, folders, tmp_path):
    make, _, targets = CASES[case]
    ours = huggingface.load(folders[make])
    lora.adapt(ours, Lora.Config(rank=3, alpha=5.0, targets=targets))
    save_adapter(randomised(ours), tmp_path, base=str(folders[make]))
    expected = logits(ours)
    model = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert differ(logits(model), expected) <= TOLERANCE
    assert differ(logits(model.merge_and_unload()), expected) <= TOLERANCE
    again = huggingface.load(folders[make])
    load_adapter(again, tmp_path)
    for key, p in lora.parameters(ours).items():
        assert torch.equal(p.float(), lora.parameters(again)[key].float()), key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "one", "other"), [(oracles.gpt2, "q", "v"), (oracles.gpt_neox, "k", "v"), (oracles.bloom, "q", "k")]
)
def test_a_part_of_a_fused_layer_and_parts_of_unlike_rank(make, one, other, folders, tmp_path):
    ours = huggingface.load(folders[make])
    every = {name: part for name, part in ours.named_modules() if name.endswith((f"mixer.{one}", f"mixer.{other}"))}
    ranks = {name: Lora.Config(rank=2 + (name[-1] == one) + 2 * ("1" in name), alpha=3.0) for name in every}
    lora.attach(ours, ranks)
    save_adapter(randomised(ours), tmp_path, base="base")
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["rank_pattern"] and {described["r"], *described["rank_pattern"].values()} == {5, 9}
    expected = logits(ours)
    assert differ(logits(peft.PeftModel.from_pretrained(make(), tmp_path)), expected) <= TOLERANCE
    again = huggingface.load(folders[make])
    load_adapter(again, tmp_path)
    assert {name: x.adapters["default"].config.rank for name, x in again.named_modules() if name in every} == {
        name: config.rank for name, config in ranks.items()
    }
    assert differ(logits(again), expected) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_what_patterns_say_of_ranks_and_scales(folders, tmp_path):
    how = {"rank_pattern": {r".*\.1\..*q_proj": 5}, "alpha_pattern": {"q_proj": 9, "2.self_attn.v_proj": 1.5}}
    how |= {"use_rslora": True, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2]}
    expected = logits(theirs(oracles.llama(), tmp_path, **how))
    ours = huggingface.load(folders[oracles.llama])
    load_adapter(ours, tmp_path)
    assert len(lora.adapted(ours)) == 4 and differ(logits(ours), expected) <= TOLERANCE
    save_adapter(ours, tmp_path / "again", base="base")
    assert differ(logits(peft.PeftModel.from_pretrained(oracles.llama(), tmp_path / "again")), expected) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_layers_trained_whole(tmp_path):
    name = "LlamaForSequenceClassification"
    oracles.headed(name).save_pretrained(tmp_path / "base")
    model = theirs(oracles.headed(name), tmp_path / "theirs", task_type="SEQ_CLS", target_modules=["q_proj"])
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.mul_(-2)
    model.save_pretrained(tmp_path / "theirs")
    model.double().eval()
    ours = huggingface.load(tmp_path / "base").double()
    x, batch = ids(), {"ids": ids()[:, None], "segments": torch.ones(2, 1, 23, dtype=torch.long)}
    with torch.no_grad():
        load_adapter(ours, tmp_path / "theirs")
        assert differ(ours.double()(batch)[:, 0], model(x).logits) <= TOLERANCE
        save_adapter(ours, tmp_path / "ours", base="base")
        assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["modules_to_save"] == ["score"]
        again = peft.PeftModel.from_pretrained(oracles.headed(name), tmp_path / "ours").double().eval()
        assert differ(again(x).logits, model(x).logits) <= TOLERANCE
        lora.merge(ours)
        assert differ(lora.unload(ours)(batch)[:, 0], model(x).logits) <= TOLERANCE


# What is refused


@pytest.fixture
def adapter(folders, tmp_path) -> Path:
    """One of ours on a LLaMA."""
    ours = huggingface.load(folders[oracles.llama])
    lora.adapt(ours, Lora.Config(rank=2))
    save_adapter(randomised(ours), tmp_path, base=str(folders[oracles.llama]))
    return tmp_path


def changed(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, r"adapter_config\.json: field 'use_dora' is True; accepted: nothing"),
        ({"bias": "lora_only"}, "field 'bias' is 'lora_only'; accepted: one of none"),
        ({"peft_type": "IA3"}, "field 'peft_type' is 'IA3'; accepted: one of LORA"),
        ({"lora_bias": True}, "field 'lora_bias'"),
        ({"target_parameters": ["experts.w"]}, "field 'target_parameters'"),
        ({"init_lora_weights": "pissa"}, "field 'init_lora_weights' is 'pissa'"),
        ({"r": 5}, r"model\.layers\.0\.self_attn\.q_proj is of rank 5 there, but its matrices are of rank 2"),
        ({"r": 0}, "field 'r' is 0"),
        ({"lora_alpha": -1}, "field 'lora_alpha' is -1"),
        ({"rank_pattern": {"(": 3}}, "field 'rank_pattern' is '\\('; accepted: regular expressions"),
        ({"rank_pattern": [3]}, "field 'rank_pattern'"),
        ({"modules_to_save": "lm_head"}, "field 'modules_to_save'"),
    ],
    ids=str,
)
def test_configurations_that_we_do_not_compute(fields, message, adapter, folders):
    ours = huggingface.load(folders[oracles.llama])
    with pytest.raises(InputError, match=message):
        load_adapter(ours, changed(adapter, **fields))
    assert not lora.adapted(ours)


def test_an_adapter_for_another_base(adapter, folders, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    oracles.llama(hidden_size=72, num_attention_heads=6, num_key_value_heads=6).save_pretrained(other)
    shapes = r"layers\.0\.self_attn\.q_proj has A \[2, 60\], B \[60, 2\]; needed: A \[r, 72\], B \[72, r\]"
    for base, message in (
        (other, shapes),
        (folders[oracles.gpt2], r"no layers like 'model\.layers\.0\.self_attn\.q_proj'"),
    ):
        ours = huggingface.load(base)
        with pytest.raises(InputError, match=f"an adapter for another base: .*{message}"):
            load_adapter(ours, adapter)
        assert not lora.adapted(ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector": torch.ones(3)},
            "no matrix of LoRA",
        ),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(97, 60)}, "nor of a layer in modules_to_save"),
        (lambda t: dict(list(t.items())[1:]), r"has B \[60, 2\]; needed: A"),
    ],
)
def test_tensors_that_do_not_belong(change, message, adapter, folders):
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(InputError, match=message):
        load_adapter(huggingface.load(folders[oracles.llama]), adapter)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_embeddings_brings_the_bases_and_they_must_be_the_same(folders, tmp_path):
    theirs(oracles.llama(), tmp_path, target_modules=["embed_tokens"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    (key,) = (key for key in tensors if "base_layer" in key)
    load_adapter(huggingface.load(folders[oracles.llama]), tmp_path)
    save_file(tensors | {key: tensors[key] + 1}, path)
    with pytest.raises(InputError, match=r"another base: model\.embed_tokens brings other numbers"):
        load_adapter(huggingface.load(folders[oracles.llama]), tmp_path)


def test_files_that_are_missing(adapter, folders):
    ours = huggingface.load(folders[oracles.llama])
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        load_adapter(ours, adapter)
    with pytest.raises(InputError, match="no adapter 'other'; there is none"):
        save_adapter(ours, adapter, "other", base="base")


# An adapter as a model


@pytest.fixture
def base(tmp_path) -> Path:
    torch.manual_seed(0)
    config = gpt2.architecture(vocab_size=257, context=64, dim=16, num_layers=1, num_heads=2)
    save(config.build(), tmp_path / "base", byte_tokenizer())
    return tmp_path / "base"


def adapter_of(base: Path, folder: Path, seed: int = 0) -> nn.Module:
    module = load_module(base)
    lora.adapt(module, Lora.Config(rank=2), seed=seed)
    save_adapter(randomised(module), folder, base=str(base))
    return module


@torch.no_grad()
def test_a_folder_with_an_adapter_is_its_base_with_it_merged(base, tmp_path):
    one = adapter_of(base, tmp_path / "one")
    two = adapter_of(tmp_path / "one", tmp_path / "two")
    x = ids()
    for folder, module in ((tmp_path / "one", one), (tmp_path / "two", two)):
        found = load_module(folder)
        assert differ(found(x).logits, module(x).logits) <= TOLERANCE
        assert not lora.adapted(found) and all(p.requires_grad for p in found.parameters())
    assert load_tokenizer(tmp_path / "two").encode("ab") == byte_tokenizer().encode("ab")


def test_a_base_that_is_not_there_or_is_itself(base, tmp_path):
    adapter_of(base, tmp_path / "one")
    with pytest.raises(InputError, match=r"its base: .*nowhere"):
        load_module(changed(tmp_path / "one", base_model_name_or_path="./nowhere"))
    with pytest.raises(InputError, match="the adapter is its own base"):
        load_module(changed(tmp_path / "one", base_model_name_or_path=str(tmp_path / "one")))
    with pytest.raises(InputError, match="does not name its base; merge it into one: allyouneed merge MODEL"):
        load_module(changed(tmp_path / "one", base_model_name_or_path=None))


def test_the_command_merges(base, tmp_path, capsys):
    adapter_of(base, tmp_path / "one")
    assert cli.main(["merge", str(base), str(tmp_path / "one"), str(tmp_path / "merged")]) == 0
    assert "with 2 layers of" in capsys.readouterr().out
    x, merged = ids(), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert differ(merged(x).logits, load_module(tmp_path / "one")(x).logits) <= TOLERANCE
    oracles.llama().save_pretrained(tmp_path / "llama")
    assert cli.main(["merge", str(tmp_path / "llama"), str(tmp_path / "one"), str(tmp_path / "m")]) == 2


# What one file says of layers that are not alike


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "low", "whole"),
    [
        (oracles.gpt2, "c_fc", ["attn.c_proj"]),
        (oracles.gpt2, "c_fc", ["c_attn"]),
        (oracles.gpt_neox, "dense", ["query_key_value"]),
        (oracles.gpt_neox, "dense", ["dense_h_to_4h"]),
        (oracles.bloom, "dense_h_to_4h", ["query_key_value"]),
    ],
)
def test_fused_and_transposed_layers_trained_whole(make, low, whole, folders, tmp_path):
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=[low], modules_to_save=whole))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name or "lora_" in name:
                p.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "theirs")
    expected = logits(model)
    ours = huggingface.load(folders[make])
    load_adapter(ours, tmp_path / "theirs")
    assert any(isinstance(part, lora.Whole) for part in ours.modules())
    assert differ(logits(ours), expected) <= TOLERANCE
    save_adapter(ours, tmp_path / "ours", base="base")
    assert differ(logits(peft.PeftModel.from_pretrained(make(), tmp_path / "ours")), expected) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_a_part_of_a_fused_layer_trained_whole(folders, tmp_path):
    ours = huggingface.load(folders[oracles.gpt2])
    lora.adapt(ours, Lora.Config(rank=2, targets=("up",), whole=("v",)))
    save_adapter(randomised(ours), tmp_path, base="base")
    assert differ(logits(peft.PeftModel.from_pretrained(oracles.gpt2(), tmp_path)), logits(ours)) <= TOLERANCE
    mixed = huggingface.load(folders[oracles.gpt2])
    lora.adapt(mixed, Lora.Config(rank=2, targets=("q",), whole=("v",)))
    with pytest.raises(InputError, match=r"c_attn is trained whole in part, in part by low rank"):
        save_adapter(mixed, tmp_path / "mixed", base="base")


@pytest.mark.filterwarnings("ignore")
def test_scales_of_two_rules_are_kept_and_unlike_dropouts_refused(folders, tmp_path):
    ours = huggingface.load(folders[oracles.llama])
    configs = {"blocks.0.mixer.q": Lora.Config(rank=4, alpha=8.0, rslora=True)}
    configs |= {
        "blocks.0.mixer.v": Lora.Config(rank=4, alpha=8.0),
        "blocks.1.mixer.v": Lora.Config(rank=9, rslora=True),
    }
    lora.attach(ours, configs)
    save_adapter(randomised(ours), tmp_path, base="base")
    again = huggingface.load(folders[oracles.llama])
    load_adapter(again, tmp_path)
    scales = {name: part.scale for name, part in again.named_modules() if isinstance(part, Lora)}
    assert scales == {f"{name}.adapters.default": pytest.approx(config.scale) for name, config in configs.items()}
    expected = logits(ours)
    assert differ(logits(again), expected) <= TOLERANCE
    assert differ(logits(peft.PeftModel.from_pretrained(oracles.llama(), tmp_path)), expected) <= TOLERANCE
    other = huggingface.load(folders[oracles.llama])
    lora.attach(other, {"blocks.0.mixer.q": Lora.Config(dropout=0.1), "blocks.0.mixer.v": Lora.Config()})
    with pytest.raises(InputError, match=r"layers drop out 0\.0, 0\.1; a file says one number"):
        save_adapter(other, tmp_path / "other", base="base")


def test_a_fused_part_that_is_still_zero_is_kept(folders, tmp_path):
    ours = huggingface.load(folders[oracles.gpt2])
    lora.adapt(ours, Lora.Config(rank=4, targets=("q", "v")))
    with torch.no_grad():
        for name, part in ours.named_modules():
            if isinstance(part, Lora) and ".v." in name:
                part.B.normal_()
    save_adapter(ours, tmp_path, base="base")
    again = huggingface.load(folders[oracles.gpt2])
    load_adapter(again, tmp_path)
    for name, part in ours.named_modules():
        if isinstance(part, Lora):
            same = again.get_submodule(name)
            assert torch.equal(part.A, same.A) and torch.equal(part.B, same.B) and part.scale == same.scale


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_trained_whole_or_is_no_number(adapter, folders, tmp_path_factory):
    folder, packed = tmp_path_factory.mktemp("whole"), huggingface.load(folders[oracles.llama])
    theirs(oracles.llama(), folder, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    with pytest.raises(InputError, match=r"modules_to_save: .*input_layernorm.*: no linear layer or embedding"):
        load_adapter(huggingface.load(folders[oracles.llama]), folder)
    theirs(oracles.llama(), folder, target_modules=["q_proj"], modules_to_save=["lm_head"])
    packed.head = QuantisedLinear.of(packed.head, "int8", 32)
    with pytest.raises(InputError, match=r"lm_head needs plain weights, not a QuantisedLinear's"):
        load_adapter(packed, folder)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    save_file(tensors | {key: tensors[key] * torch.nan}, path)
    with pytest.raises(InputError, match=r"tensor '.*lora_A.* holds numbers that are not finite"):
        load_adapter(huggingface.load(folders[oracles.llama]), adapter)


def test_an_adapted_model_is_no_checkpoint(folders, tmp_path):
    ours = huggingface.load(folders[oracles.llama])
    lora.adapt(ours, Lora.Config(rank=2))
    with pytest.raises(InputError, match="the model has adapters; save them as such, or merge and unload them"):
        save(ours, tmp_path)
