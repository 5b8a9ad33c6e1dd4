"""Broken and hostile checkpoints: one clear line that names file and field, in bounded time and memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
from mutations import mutations, survives

from allyouneed.core.errors import InputError
from allyouneed.models.checkpoints.loading import load_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    oracles.llama().save_pretrained(folder)
    return folder


def test_mutated_config(folder):
    path = folder / "config.json"
    data = path.read_bytes()
    outcomes = [
        survives(lambda _: load_module(folder), path, mutated, named=str(folder))
        for mutated in mutations(data, 400, seed=1)
    ]
    path.write_bytes(data)
    assert outcomes.count(False) > 100
    load_module(folder)


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
        [sys.executable, "-m", "allyouneed", *given], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
