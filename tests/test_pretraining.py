"""`train` by the kind of model: BERT on masked tokens and pairs, T5 on spans, decoders on next tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from allyouneed import cli
from allyouneed.commands import pretraining
from allyouneed.core.errors import InputError
from allyouneed.data.corpora import corpus
from allyouneed.data.tokenizer_training import train_unigram
from allyouneed.models import bert
from allyouneed.models.checkpoints.loading import load_module, load_tokenizer
from allyouneed.train.ranks import Ranks

TEXTS = ["one two three"] * 3
CLASSES = {
    "bert": transformers.BertForPreTraining,
    "t5": transformers.T5ForConditionalGeneration,
    "llama": transformers.LlamaForCausalLM,
}
SIZES = ["--dim", "16", "--layers", "1", "--heads", "2", "--vocab", "300", "--length", "24", "--batch", "4"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    colours = ("red", "blue", "green", "white")
    documents = [" ".join(f"The {a} one saw the {b} {n} times." for b in colours for n in range(4)) for a in colours]
    file.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents * 6))
    return file


def trained(capsys, *arguments: object) -> str:
    assert cli.main(["train", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", CLASSES)
def test_a_new_model_learns_and_goes_on_as_its_kind(family, texts, tmp_path, capsys):
    out = tmp_path / "run"
    told = trained(capsys, f"new:{family}", texts, "--out", out, "--steps", 60, "--lr", "1e-2", *SIZES)
    assert f"allyouneed {'generate' if family == 'llama' else 'finetune'} {out / 'model'}" in told
    losses = [row["loss"] for row in rows(out) if "loss" in row]
    assert losses[-1] < losses[0] - 1
    held_out = [row for row in rows(out) if any(name.startswith("valid_") for name in row)]
    assert held_out and held_out[-1]["step"] == 60
    read = CLASSES[family].from_pretrained(out / "model")
    assert read.config.architectures == [CLASSES[family].__name__]
    more = tmp_path / "more"
    trained(capsys, out / "model", texts, "--out", more, "--steps", 2, "--length", 24, "--batch", 4)
    assert type(load_module(more / "model")) is type(load_module(out / "model"))
    assert rows(more)[0]["loss"] < losses[0] - 1  # it did not begin anew


def test_a_run_of_t5_keeps_its_vocabulary(texts, tmp_path, capsys, monkeypatch):
    """The same texts give another unigram vocabulary each time; a run that goes on must not get one."""
    command = ["new:t5", texts, "--out", tmp_path, "--steps", 4, *SIZES]
    trained(capsys, *command)
    (kept,) = tmp_path.glob("vocabulary-*")
    pieces = (kept / "tokenizer.json").read_text()
    learned = []
    monkeypatch.setattr(pretraining, "train_unigram", lambda *_: learned.append(1) or train_unigram(TEXTS, 110))
    trained(capsys, *command)
    assert not learned and (tmp_path / "model" / "tokenizer.json").read_text() == pieces
    trained(capsys, *command, "--vocab", 200, "--fresh")
    assert learned and load_tokenizer(tmp_path / "model").vocab_size < 120


def test_what_cannot_be_learned_is_said(texts, tmp_path, capsys, monkeypatch):
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2}
    encoder = bert.encoder_of(bert.architecture(vocab_size=300, context=24, **sizes)).build()
    with pytest.raises(InputError, match="without its heads of pre-training"):
        pretraining.lessons(encoder, load_tokenizer("all-minilm-l6-v2"), corpus(str(texts)), rows=4, length=24, seed=0)
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "One. Two."}\n{"text": "Three. Four."}\n{"text": "Five. Six."}\n')
    assert cli.main(["train", "new:bert", str(few), "--out", str(tmp_path / "few"), *SIZES]) == 2
    assert "held-out text: 1 documents of two sentences" in capsys.readouterr().err
    monkeypatch.setattr(pretraining, "join", lambda: Ranks(world=2))
    assert cli.main(["train", "new:t5", str(texts), "--out", str(tmp_path / "t5"), *SIZES]) == 2
    assert "each rank would learn another vocabulary" in capsys.readouterr().err
