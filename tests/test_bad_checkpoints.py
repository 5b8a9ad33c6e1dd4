"""Broken and hostile checkpoints: one clear line that names file and field, in bounded time and memory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import safetensors.torch
import torch
from mutations import mutations, survives

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError
from allyouneed.models import bert, gpt2, gpt_neo, llama, marian
from allyouneed.models.checkpoints import huggingface
from allyouneed.models.checkpoints.loading import load_module, save
from allyouneed.models.decoder import Decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    oracles.llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A model that no other library has, in our own layout."""
    folder = tmp_path_factory.mktemp("own")
    save(llama.EXAMPLE.replace(embedding_scale=2.0).build(), folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == huggingface.OURS
    return folder


def used(folder: Path) -> Decoder:
    """Load and ask for logits: what loads must also compute."""
    module = load_module(folder)
    module(torch.tensor([[1, 2, 3]]))
    return module


@pytest.mark.parametrize("layout", ["folder", "own"])
def test_mutated_config(layout, request):
    folder = request.getfixturevalue(layout)
    path = folder / "config.json"
    data = path.read_bytes()
    outcomes = [
        survives(lambda _: used(folder), path, mutated, named=str(folder)) for mutated in mutations(data, 400, seed=1)
    ]
    path.write_bytes(data)
    assert outcomes.count(False) > 100
    used(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: config.update(num_layers=1), "2 layers"),
        (lambda config: config.update(num_layers=3), "2 layers"),
        (lambda config: config.update(dim="32"), "dim"),
        (lambda config: config.update(tied=1), "tied"),
        (lambda config: config["blocks"][0].update(dropout=-1), "dropout"),
        (lambda config: config.update(blocks=[]), "blocks"),
        (lambda config: config.pop("vocab_size"), "vocab_size"),
        (lambda config: config["norm"].update(epz=1), "epz"),
        (lambda config: config["blocks"][0]["mixer"].update(num_heads=0), "num_heads"),
        (lambda config: config["blocks"][0].update(mixer=config["norm"]), "mixer"),
    ],
)
def test_wrong_fields_of_our_own_layout(own, change, named):
    path = own / "config.json"
    data = path.read_text()
    described = json.loads(data)
    change(described["config"])
    path.write_text(json.dumps(described))
    try:
        with pytest.raises(InputError, match=named) as raised:
            load_module(own)
    finally:
        path.write_text(data)
    assert "config.json" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("layout", ["folder", "own"])
def test_a_tensor_too_many_is_refused(layout, request, tmp_path):
    """A bias that is passed over would give other logits without a word."""
    folder = request.getfixturevalue(layout)
    shutil.copytree(folder, tmp_path / "copy")
    tensors = safetensors.torch.load_file(folder / "model.safetensors") | {"layers.0.extra.bias": torch.zeros(3)}
    safetensors.torch.save_file(tensors, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.0\.extra\.bias"):
        load_module(tmp_path / "copy")


def test_rates_of_dropout_are_read_by_their_own_names(tmp_path):
    for theirs, module in ((oracles.gpt2(resid_pdrop=0.1, attn_pdrop=0.2, embd_pdrop=0.3), gpt2),):
        theirs.save_pretrained(tmp_path)
        config = load_module(tmp_path).config
        assert config.dropout == 0.3 and config.blocks[0].dropout == 0.1 and config.blocks[0].mixer.dropout == 0.2
        assert config == module.with_dropout(config, branches=0.1, attention=0.2, embeddings=0.3)


def test_what_another_layout_cannot_say_is_kept_in_ours(tmp_path):
    """GPT-Neo's layout has as many banded layers as dense ones."""
    save(gpt_neo.EXAMPLE.replace(num_layers=3).build(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == huggingface.OURS
    assert load_module(tmp_path).config.num_layers == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"hidden_size": "60"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 10**6}, "layers"),
        ({"num_hidden_layers": -3}, "num_hidden_layers"),
        ({"num_attention_heads": 7}, "num_attention_heads|num_heads|shape"),
        ({"num_key_value_heads": 4}, "num_kv_heads"),
        ({"vocab_size": 2**23}, "shape"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ({"hidden_act": "silo"}, "hidden_act"),
        ({"model_type": "llame"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "allyouneed", "config": {"type": "os:system"}}, "config type"),
        ({"model_type": "allyouneed", "config": {"type": "core.config:Config", "x": 1}}, "unknown field"),
        ({"model_type": "allyouneed", "config": 3}, "config"),
    ],
)
def test_wrong_fields(folder, change, named, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=named) as raised:
        load_module(tmp_path)
    assert "\n" not in str(raised.value) and re.search(r"config\.json", str(raised.value))


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "no-such-model", "hi"],
        ["generate", "/no/such/file.gguf", "hi"],
        ["generate", "{folder}", "hi"],
        ["score", "{truncated}", "a", "b"],
        ["train", "new:llame", "python-reference", "--out", "{folder}/out"],
        ["train", "new:llama", "no-such-corpus", "--out", "{folder}/out"],
        ["train", "new:llama", "{jsonl}", "--out", "{folder}/out"],
        ["train", "new:llama", "python-reference", "--out", "{folder}/out", "--set", "stepz=3"],
        ["eval", "no-such-model"],
        ["run", "alibbi"],
        ["run", "alibi", "--set", "training.stepz=3"],
        ["run", "alibi", "--size", "smokey"],
    ],
    ids=" ".join,
)
def test_command_line_says_it_in_one_line(arguments, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(b"GGUF\x03\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\x7f")
    jsonl = tmp_path / "bad.jsonl"
    jsonl.write_text('{"text": "one"}\n{"txet": "two"}\n')
    given = [a.format(folder=tmp_path, truncated=truncated, jsonl=jsonl) for a in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "allyouneed", *given], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr


def _heads() -> dict[str, tuple[Config, str]]:
    """Of every family whose head can be its embedding: such a model, and the name of a head that is stored besides."""
    found = {"bert": (bert.EXAMPLE, "cls.predictions.decoder.weight")}
    for family in (family for families in huggingface.FAMILIES.values() for family in families):
        if hasattr(family.example, "tied"):
            apart = family.rules(family.example.replace(tied=False))
            name = next(rule.theirs for rule in apart if rule.ours == ("head.weight",))
            found[family.model_type] = family.example.replace(tied=True), name
    return found | {"our own layout": (llama.EXAMPLE.replace(embedding_scale=2.0, tied=True), "head.weight")}


HEADS = _heads()


@pytest.mark.parametrize("family", HEADS)
def test_a_head_beside_a_tied_embedding_is_that_embedding_or_refused(family, tmp_path):
    config, name = HEADS[family]
    module = oracles.randomised(config)
    save(module, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    weight = next(tensor for key, tensor in module.named_parameters() if key.endswith("embedding.weight")).detach()
    assert name not in tensors
    safetensors.torch.save_file(tensors | {name: weight.clone()}, file)
    again = load_module(tmp_path)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    for other in (weight + 1, weight[1:]):
        safetensors.torch.save_file(tensors | {name: other.clone()}, file)
        with pytest.raises(InputError, match="one tensor for both") as raised:
            load_module(tmp_path)
        message = str(raised.value)
        assert re.search("set (tied|tie_word_embeddings) to false", message) or family == "bert"  # whose head is tied
        assert f"{name!r} {list(other.shape)}" in message and str(list(weight.shape)) in message
        assert "\n" not in message and str(tmp_path) in message


@pytest.mark.parametrize(
    ("config", "model_type", "architecture", "lacks", "holds"),
    [
        (gpt2.EXAMPLE, "llama", "LlamaForCausalLM", "model.layers.0.", "transformer.h.0."),
        (marian.EXAMPLE, "t5", "T5ForConditionalGeneration", "encoder.block.0.", "final_logits_bias"),
        (llama.EXAMPLE, "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers.0.", "lm_head.weight"),
    ],
)
def test_weights_of_another_family_are_named_before_any_field(config, model_type, architecture, lacks, holds, tmp_path):
    save(config.build(), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(described | {"model_type": model_type, "architectures": [architecture]})
    )
    with pytest.raises(
        InputError, match=rf"not the weights of a {architecture}: lacks '{lacks}.*; holds '{holds}"
    ) as e:
        load_module(tmp_path)
    assert "\n" not in str(e.value) and re.search(r"\[\d+", str(e.value)) and str(e.value).count("but") == 0
