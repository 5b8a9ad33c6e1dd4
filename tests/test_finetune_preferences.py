"""`finetune` by preferences: dpo, ipo and reward on tiny models, what they learn, leave behind and refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import allyouneed
from allyouneed import cli
from allyouneed.data.tokenizer_training import train_wordpiece
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.models import bert, gpt2
from allyouneed.models.checkpoints.loading import load_module, load_tokenizer, save
from allyouneed.models.heads import Classifier
from allyouneed.objectives import preference, reward

ROWS = [
    {"prompt": f"say {n} ", "chosen": "please " * (1 + n % 2), "rejected": "now " * (1 + n % 3), "gap": n % 3}
    for n in range(30)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(0)
    pieces = train_wordpiece(["please say now", "say it"], 60)
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2}
    made = {
        "decoder": (gpt2.architecture(vocab_size=257, context=64, **sizes), byte_tokenizer()),
        "encoder": (bert.encoder_of(bert.architecture(vocab_size=pieces.vocab_size, context=32, **sizes)), pieces),
    }
    folders = {}
    for name, (config, tokenizer) in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        save(config.build(), folders[name], tokenizer)
    return folders


@pytest.fixture
def data(tmp_path) -> Path:
    return written(tmp_path / "data.jsonl", ROWS)


def written(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object, capsys) -> tuple[int, str, str]:
    code = cli.main(["finetune", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize(
    ("method", "more"),
    [("dpo", []), ("dpo", ["--beta", 0.5, "--label-smoothing", 0.1]), ("ipo", ["--beta", 0.5])],
    ids=["dpo", "conservative dpo", "ipo"],
)
def test_preferences_are_learned(method, more, models, data, tmp_path, capsys):
    given = (models["decoder"], data, "--method", method, "--epochs", 6, "--lr", 0.01, "--batch", 9, *more)
    code, told, err = run(*given, "--out", tmp_path / "run", "--json", capsys=capsys)
    assert code == 0, err
    results = json.loads(told)
    assert results["train"] == 27 and results["valid"] == 3 and abs(results["drift_before"]) <= 1e-6
    assert results["accuracy"] == 1.0 and results["margin"] > 0 and results["kl_per_token"] > 0
    assert "⟦" in err and "say" in err  # an example with what is learned of it
    assert "MB of memory" in err and "a step" in err
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["valid_accuracy"] >= 0
    assert np.load(tmp_path / "run" / "reference.npy")["logprobs"].shape == (30, 2)
    load_module(tmp_path / "run" / "model")


def test_the_first_loss_is_that_of_equals(models, data, tmp_path, capsys):
    """At step 1 policy and reference are one: log 2, and every implicit reward 0."""
    given = (models["decoder"], data, "--method", "dpo", "--epochs", 1, "--batch", 27, "--set", "log_every=1")
    code, _, err = run(*given, "--out", tmp_path / "run", capsys=capsys)
    assert code == 0, err
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1 and first["lr"] <= 1e-6 and "rate 1e-06" in err
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and abs(first["margin"]) < 1e-6


def test_adapters_drop_nothing_of_what_is_compared(models, data, tmp_path, capsys):
    given = (models["decoder"], data, "--method", "dpo", "--epochs", 1, "--batch", 27, "--set", "log_every=1")
    how = ("--lora", 2, "--lora-targets", "all-linear", "--lora-dropout", 0.5, "--set", "recompute=True")
    assert run(*given, *how, "--out", tmp_path / "run", capsys=capsys)[0] == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_the_same_command_goes_on(models, data, tmp_path, capsys):
    given = (models["decoder"], data, "--method", "dpo", "--epochs", 1, "--out", tmp_path / "run")
    assert run(*given, capsys=capsys)[0] == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text(), (tmp_path / "run" / "reference.npy").read_bytes()
    assert run(*given, capsys=capsys)[0] == 0
    assert before == (
        (tmp_path / "run" / "metrics.jsonl").read_text(),
        (tmp_path / "run" / "reference.npy").read_bytes(),
    )
    code, _, err = run(*given, "--beta", 0.3, capsys=capsys)
    assert code == 2 and "--fresh" in err


def test_a_model_that_was_trained_on_in_between_is_another(models, data, tmp_path, capsys):
    """Of the same name; and --fresh believes nothing that was read of the old one."""
    given = (tmp_path / "model", data, "--method", "dpo", "--epochs", 1, "--out", tmp_path / "run")
    tokenizer, module = load_tokenizer(models["decoder"]), load_module(models["decoder"])
    save(module, tmp_path / "model", tokenizer)
    assert run(*given, capsys=capsys)[0] == 0
    with torch.no_grad():
        module.blocks[0].mixer.out.weight[3] += 0.1
    save(module, tmp_path / "model", tokenizer)
    code, _, err = run(*given, capsys=capsys)
    assert code == 2 and "another model" in err
    kept = np.load(tmp_path / "run" / "reference.npy")
    kept["logprobs"] = 0.0  # as no reference says
    np.save(tmp_path / "run" / "reference.npy", kept)
    code, _, err = run(*given, "--fresh", capsys=capsys)
    assert code == 0, err
    assert np.load(tmp_path / "run" / "reference.npy")["logprobs"].all()


def test_another_batch_is_another_run(models, data, tmp_path, capsys):
    given = (models["decoder"], data, "--method", "dpo", "--epochs", 1, "--out", tmp_path / "run")
    assert run(*given, "--batch", 9, capsys=capsys)[0] == 0
    code, _, err = run(*given, "--batch", 3, capsys=capsys)
    assert code == 2 and "another model, data, method or --batch was begun there" in err


def test_a_reward_model_is_transformers_own(models, data, tmp_path, capsys):
    given = (models["decoder"], data, "--method", "reward", "--epochs", 8, "--lr", 0.01, "--margin-field", "gap")
    code, told, err = run(*given, "--out", tmp_path / "run", "--json", capsys=capsys)
    assert code == 0, err
    assert json.loads(told)["accuracy"] == 1.0
    folder = tmp_path / "run" / "model"
    ours, tokenizer = load_module(folder).eval(), load_tokenizer(folder)
    assert isinstance(ours, Classifier) and ours.config.labels == ("reward",)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encode = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.config.num_labels == 1 and encode.pad_token_id == theirs.config.pad_token_id == tokenizer.pad_id
    texts = ["say 3 please please <|endoftext|>", "say 3 now<|endoftext|>"]
    ids = [tokenizer.encode(text) for text in texts]
    batch = {"ids": torch.zeros(1, 2, max(map(len, ids)), dtype=torch.long)}
    batch["segments"] = torch.zeros_like(batch["ids"])
    for side, row in enumerate(ids):
        batch["ids"][0, side, : len(row)] = torch.tensor(row)
        batch["segments"][0, side, : len(row)] = 1
    with torch.no_grad():
        found = theirs(**encode(texts, return_tensors="pt", padding=True)).logits[:, 0]
        told = reward.rewards(ours, batch)[0]
    torch.testing.assert_close(told, found, rtol=1e-4, atol=1e-5)
    assert told[0] > told[1] + 0.5


def test_bad_lines_are_named_and_counted(models, tmp_path, capsys):
    bad = [
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": "", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": " "},
        {"prompt": "q", "chosen": "a", "rejected": "b " * 60},
        {"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
    ]
    data = written(tmp_path / "data.jsonl", [*ROWS[:10], *bad, *ROWS[10:]])
    given = (models["decoder"], data, "--method", "dpo", "--epochs", 0.1, "--out", tmp_path / "run")
    code, told, err = run(*given, capsys=capsys)
    assert (code, told) == (2, "") and not (tmp_path / "run").exists()
    assert err.startswith(f"error: {data}: line 11: chosen and rejected are the same answer")
    code, told, err = run(*given, "--skip-bad", capsys=capsys)
    assert code == 0 and "left_out                 5" in told
    for line, message in enumerate(("same answer", "chosen is empty", "rejected is empty", "at most 64 fit"), start=11):
        assert f"left out: {data}: line {line}: " in err and message in err
    assert "line 15: chosen: messages, but the tokenizer has no chat template" in err


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("encoder", ["--method", "dpo"], "--method dpo: a decoder is wanted"),
        ("encoder", ["--method", "reward"], "--method reward: a decoder is wanted"),
        ("decoder", ["--method", "dpo", "--beta", 0], "beta=0.0"),
        ("decoder", ["--method", "dpo", "--label-smoothing", 0.7], "label_smoothing=0.7"),
        ("decoder", ["--method", "ipo", "--label-smoothing", 0.1], "--label-smoothing: ipo has no use for it"),
        ("decoder", ["--method", "dpo", "--margin-field", "gap"], "(taken by reward)"),
        ("decoder", ["--method", "reward", "--margin-field", "margn"], "accepted: prompt + chosen + rejected + margn"),
        ("decoder", ["--method", "dpo", "--set", "precision=bf16"], "--method dpo: precision=bf16, but its reference"),
        ("decoder", ["--method", "ipo", "--set", "precision=bf16"], "--method ipo: precision=bf16, but its reference"),
        ("decoder", ["--beta", 0.1], "--beta: sft has no use for it"),
    ],
)
def test_what_does_not_go_together(model, arguments, message, models, data, tmp_path, capsys):
    code, _, err = run(models[model], data, "--out", tmp_path / "run", *arguments, capsys=capsys)
    assert code == 2 and message in err and not (tmp_path / "run").exists()


def test_a_stopped_run_goes_on_bit_for_bit(models, data, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the third step of six."""
    given = (models["decoder"], data, "--method", "dpo", "--epochs", 2, "--batch", 9, "--lr", 0.01, "--lora", 2)
    assert run(*given, "--out", tmp_path / "whole", capsys=capsys)[0] == 0
    plain, calls = preference.answer_logprobs, []

    def interrupted(module, batch):
        calls.extend([1] * torch.is_grad_enabled())
        if len(calls) == 6:  # three were the estimate's
            os.kill(os.getpid(), signal.SIGINT)
        return plain(module, batch)

    with monkeypatch.context() as patched:
        patched.setattr(preference, "answer_logprobs", interrupted)
        assert run(*given, "--out", tmp_path / "parted", capsys=capsys)[0] == 130
    assert not (tmp_path / "parted/model").exists()
    assert run(*given, "--out", tmp_path / "parted", capsys=capsys)[0] == 0
    one, two = (tmp_path / name / "model/adapter_model.safetensors" for name in ("whole", "parted"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("more", [[], ["--lora", "2", "--lora-targets", "all-linear"]], ids=["whole", "adapters"])
def test_two_ranks_learn_what_one_does(models, data, tmp_path, capsys, more):
    """And both help to judge and to put the model together, as each holds a slice of it."""
    given = ["--method", "dpo", "--epochs", "2", "--batch", "8", "--lr", "0.01", "--set", "log_every=1", "--json"]
    given += more
    given += ["--set", "evaluate_every=100"]
    code, told, err = run(models["decoder"], data, *given, "--out", tmp_path / "one", capsys=capsys)
    assert code == 0, err
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "allyouneed",
    ]
    command += ["finetune", str(models["decoder"]), str(data), *given, "--set", "mesh.shard=2", "--out", "two"]
    source = {"PYTHONPATH": str(Path(allyouneed.__file__).parents[1])}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | source, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = json.loads(told), json.loads(done.stdout)
    assert two["accuracy"] == one["accuracy"] and len(two) == len(one)
    load_module(tmp_path / "two" / "model")
