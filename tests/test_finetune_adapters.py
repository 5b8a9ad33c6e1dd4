"""`finetune --lora`: every method by adapters alone, what is kept, gone on with and refused; a merged model."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from allyouneed import cli
from allyouneed.adapt import lora
from allyouneed.adapt.quantise import Quantise, quantise
from allyouneed.core.errors import InputError
from allyouneed.data.tokenizer_training import train_unigram, train_wordpiece
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.models import bert, gpt2, llama, t5
from allyouneed.models.checkpoints.adapters import load_adapter, save_adapter
from allyouneed.models.checkpoints.loading import load_module, load_tokenizer, save
from allyouneed.models.heads import Classifier

TEXTS = ["one red two blue", "red is red", "blue is blue", "0 1 2 3 4 5 6 7 8 9"]
ANSWERS = [{"prompt": f"{n} is", "completion": " red" if n % 2 else " blue"} for n in range(20)]
PREFERRED = [{"prompt": f"{n} is", "chosen": " red", "rejected": " blue"} for n in range(20)]
LABELLED = [{"text": f"{colour} is {n}", "label": colour} for n in range(10) for colour in ("red", "blue")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(0)
    bytes_, pieces, unigram = byte_tokenizer(), train_wordpiece(TEXTS, 90), train_unigram(TEXTS, 60, sentinels=4)
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2}
    whole = bert.architecture(vocab_size=pieces.vocab_size, context=32, **sizes)
    made = {
        "decoder": (gpt2.architecture(vocab_size=257, context=64, **sizes), bytes_),
        "llama": (llama.architecture(vocab_size=257, context=64, hidden_dim=24, tied=False, **sizes), bytes_),
        "pre-trained": (whole, pieces),
        "translator": (t5.architecture(vocab_size=unigram.vocab_size, head_dim=8, hidden_dim=16, **sizes), unigram),
    }
    folders = {}
    for name, (config, tokenizer) in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        save(config.build(), folders[name], tokenizer)
    return folders


def run(*arguments: object, capsys) -> tuple[int, str, str]:
    code = cli.main(["finetune", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def data(folder: Path, rows: list) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("model", "method", "rows"),
    [
        ("decoder", "sft", ANSWERS),
        ("llama", "sft", ANSWERS),
        ("translator", "sft", ANSWERS),
        ("decoder", "dpo", PREFERRED),
        ("decoder", "reward", PREFERRED),
        ("decoder", "classify", LABELLED),
        ("pre-trained", "classify", LABELLED),
    ],
)
def test_every_kind_of_method(model, method, rows, models, tmp_path, capsys):
    path, out = data(tmp_path, rows), tmp_path / "run"
    given = ("--lora", 2, "--lora-targets", "all-linear", "--rslora", "--lr", 0.01, "--epochs", 1)
    code, told, err = run(models[model], path, "--method", method, *given, "--out", out, "--json", capsys=capsys)
    assert code == 0, err
    assert "of all are trained" in err and json.loads(told)["train"] == 18
    (kept,) = list((out / "checkpoints").iterdir())[-1:]
    learned = load_file(kept / "model.safetensors")
    assert learned and all(".adapters.default." in name for name in learned)
    module = load_module(out / "model")
    assert load_tokenizer(out / "model").vocab_size and all(p.requires_grad for p in module.parameters())
    if method in ("reward", "classify"):
        assert isinstance(module, Classifier) and (out / "model/config.json").is_file()
    else:
        described = json.loads((out / "model/adapter_config.json").read_text())
        assert described["base_model_name_or_path"] == str(models[model]) and described["use_rslora"]
        assert not (out / "model/config.json").exists()


def test_from_lines_to_a_merged_model_that_peft_agrees_with(models, tmp_path, capsys):
    path, out = data(tmp_path, ANSWERS * 8), tmp_path / "run"
    given = ("--lora", 4, "--lora-alpha", 8, "--lora-targets", "q,v,up,head", "--lr", 0.03, "--epochs", 4)
    code, told, err = run(models["llama"], path, *given, "--out", out, "--json", capsys=capsys)
    assert code == 0, err
    results = json.loads(told)
    assert results["nats_per_token"] < results["nats_per_token_before"] - 1
    assert cli.main(["merge", str(models["llama"]), str(out / "model"), str(tmp_path / "merged")]) == 0
    for there in (models["llama"], tmp_path / "merged"):
        assert cli.main(["merge", str(models["llama"]), str(out / "model"), str(there)]) == 2
        assert "is there already; choose another folder" in " ".join(capsys.readouterr().err.split())
    x = torch.tensor([byte_tokenizer().encode("4 is blue")])
    with torch.no_grad():
        ours = load_module(out / "model")(x).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        base = transformers.AutoModelForCausalLM.from_pretrained(models["llama"])
        theirs = peft.PeftModel.from_pretrained(base, out / "model").eval()
        assert torch.allclose(merged(x).logits, ours, atol=1e-5) and torch.allclose(theirs(x).logits, ours, atol=1e-5)
    capsys.readouterr()
    answer = ["generate", str(out / "model"), "3 is", "--temperature", "0", "--max-new-tokens", "5"]
    assert cli.main(answer) == 0 and "red" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "how"), [(None, ""), ("nf4", " --quantize nf4"), ("int8", "")])
def test_the_end_says_how_it_is_served_as_it_was_judged(kind, how, models, tmp_path, capsys):
    out, base = tmp_path / "run", models["llama"]
    given = ("--lora", 2, "--epochs", 1, "--out", out, *(("--quantize", kind) if kind else ()))
    code, told, err = run(base, data(tmp_path, ANSWERS), *given, capsys=capsys)
    assert code == 0, err
    over = f", judged over its layers in {kind}" if kind else ""
    line = f"{out}/model: an adapter of {base}{over}; allyouneed serve {base}{how} --adapter tuned={out}/model"
    assert told.splitlines()[-1] == line
    assert json.loads((out / "results.json").read_text()).get("quantize") == kind


def test_an_adapter_can_be_trained_on(models, tmp_path, capsys):
    """Supervised, then by preferences: the second adapter's base is the first."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(models["llama"], data(tmp_path, ANSWERS), "--lora", 2, "--out", first, capsys=capsys)[0] == 0
    given = ("--method", "dpo", "--lora", 2, "--out", second)
    code, _, err = run(first / "model", data(tmp_path, PREFERRED), *given, capsys=capsys)
    assert code == 0, err
    described = json.loads((second / "model/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(first / "model")
    one, two = (load_module(folder / "model").state_dict() for folder in (first, second))
    moved = {name for name in one if not torch.equal(one[name], two[name])}
    assert moved == {"blocks.0.mixer.q.weight", "blocks.0.mixer.v.weight"}


def test_the_same_command_goes_on_bit_for_bit(models, tmp_path, capsys):
    path = data(tmp_path, ANSWERS)
    adapters = []
    for name in ("whole", "broken"):
        given = (
            models["decoder"],
            path,
            "--lora",
            2,
            "--lora-dropout",
            0.2,
            "--save-every",
            2,
            "--out",
            tmp_path / name,
        )
        assert run(*given, capsys=capsys)[0] == 0
        if name == "broken":
            newest = sorted((tmp_path / name / "checkpoints").iterdir())[-1]
            shutil.rmtree(newest)
            assert run(*given, capsys=capsys)[0] == 0
        adapters.append(load_file(tmp_path / name / "model/adapter_model.safetensors"))
    assert all(torch.equal(x, adapters[1][key]) for key, x in adapters[0].items())
    code, _, err = run(*given[:2], "--lora", 3, "--out", tmp_path / "whole", capsys=capsys)
    assert code == 2 and "another model, data, method or --batch was begun there" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lora-alpha", 3), "--lora-alpha says how --lora adapts; add --lora R"),
        (("--rslora",), "--rslora says how --lora adapts"),
        (("--lora", 0), "rank=0; it must be 1 or more"),
        (
            ("--lora", 2, "--lora-targets", "q_proj"),
            "unknown target (it matches no linear layer or embedding) 'q_proj'",
        ),
        (("--lora", 2, "--lora-targets", "head"), "head shares its tensor with embedding: leave it out"),
    ],
)
def test_what_is_refused_before_training(options, message, models, tmp_path, capsys):
    code, _, err = run(models["decoder"], data(tmp_path, ANSWERS), *options, "--out", tmp_path / "run", capsys=capsys)
    assert code == 2 and message in err and not (tmp_path / "run/checkpoints").exists()


def test_an_adapter_for_another_base_of_the_same_shapes_is_refused(models, tmp_path):
    module = load_module(models["llama"])
    lora.adapt(module, lora.Lora.Config(rank=2))
    save_adapter(module, tmp_path / "adapter", base=str(models["llama"]))
    load_adapter(load_module(models["llama"]), tmp_path / "adapter")
    load_adapter(load_module(models["llama"]).bfloat16(), tmp_path / "adapter")
    rounded = load_module(models["llama"])
    quantise(rounded, Quantise.Config(kind="nf4"))
    load_adapter(rounded, tmp_path / "adapter")
    torch.manual_seed(1)
    with pytest.raises(InputError, match=r"an adapter for another base, .*: this model's layers have other numbers"):
        load_adapter(load_module(models["llama"]).config.build(), tmp_path / "adapter")
    retrained = load_module(models["llama"])
    with torch.no_grad():
        retrained.blocks[0].mixer.q.weight.add_(0.02 * torch.randn_like(retrained.blocks[0].mixer.q.weight))
    with pytest.raises(InputError, match="other numbers"):
        load_adapter(retrained, tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT is not shown a field that it does not know
        assert peft.LoraConfig.from_pretrained(tmp_path / "adapter").r == described["r"] == 2
    (tmp_path / "adapter/base.json").write_text('{"sketch": [1]}')
    with pytest.raises(InputError, match=r"base.json: field 'sketch': a list of 16 numbers"):
        load_adapter(load_module(models["llama"]), tmp_path / "adapter")


def test_one_of_few_bits_is_told_from_others_too(models, tmp_path):
    module = load_module(models["llama"])
    quantise(module, Quantise.Config(kind="nf4"))
    lora.adapt(module, lora.Lora.Config(rank=2))
    save_adapter(module, tmp_path / "adapter", base=str(models["llama"]))
    load_adapter(load_module(models["llama"]), tmp_path / "adapter")
    torch.manual_seed(1)
    with pytest.raises(InputError, match="other numbers"):
        load_adapter(load_module(models["llama"]).config.build(), tmp_path / "adapter")
