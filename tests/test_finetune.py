"""`finetune`: every method on tiny models, what it prints and leaves behind, and what it refuses, by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from allyouneed import cli
from allyouneed.core.errors import InputError
from allyouneed.data import jsonl, labelled
from allyouneed.data.instructions import conversation, piece
from allyouneed.data.packing import IGNORED
from allyouneed.data.tokenizer_training import train_unigram, train_wordpiece
from allyouneed.data.tokenizers import Tokenizer, byte_tokenizer
from allyouneed.evaluate import labels as judging
from allyouneed.models import bert, gpt2, t5
from allyouneed.models.checkpoints.loading import load_module, load_tokenizer, save
from allyouneed.models.heads import Chooser, Classifier, SpanReader, Tagger

TEXTS = ["one red two blue", "red is red", "blue is blue", "where is red", "left right up down 0 1 2 3 4 5 6 7 8 9"]
LABELLED = [{"text": f"{colour} is {n}", "label": colour} for n in range(10) for colour in ("red", "blue")]
ROWS = {
    "classify": LABELLED,
    "pairs": [{"text": "is it", "text_pair": row["text"], "label": row["label"]} for row in LABELLED],
    "similarity": [{"text": "is it", "text_pair": row["text"], "label": row["label"]} for row in LABELLED],
    "choices": [{"context": "red is", "choices": ["up", "red"], "label": i % 2} for i in range(20)],
    "spans": [
        {
            "context": f"{row['text']} now",
            "question": "where is",
            "answers": {"text": [str(i // 2)], "answer_start": [at]},
        }
        for i, row in enumerate(LABELLED)
        for at in [len(row["text"]) - 1]
    ],
    "tokens": [{"tokens": row["text"].split(), "tags": [row["label"], "O", "number"]} for row in LABELLED],
}
HEADS = {"choices": Chooser, "spans": SpanReader, "tokens": Tagger}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A decoder, an encoder, one that was pre-trained, and a model of two stacks, with their tokenizers."""
    torch.manual_seed(0)
    bytes_, pieces, unigram = byte_tokenizer(), train_wordpiece(TEXTS, 90), train_unigram(TEXTS, 60, sentinels=4)
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2}
    pretrained = bert.architecture(vocab_size=pieces.vocab_size, context=32, **sizes)
    made = {
        "decoder": (gpt2.architecture(vocab_size=257, context=64, **sizes), bytes_),
        "encoder": (bert.encoder_of(pretrained), pieces),
        "pre-trained": (pretrained, pieces),
        "translator": (
            t5.architecture(
                vocab_size=unigram.vocab_size, dim=16, num_layers=1, num_heads=2, head_dim=8, hidden_dim=16
            ),
            unigram,
        ),
    }
    folders = {}
    for name, (config, tokenizer) in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        save(config.build(), folders[name], tokenizer)
    return folders


def written(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(*arguments: object, capsys) -> tuple[int, str, str]:
    code = cli.main(["finetune", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize("method", ROWS)
@pytest.mark.parametrize("model", ["decoder", "encoder", "pre-trained"])
def test_every_method(model, method, models, tmp_path, capsys):
    data, out = written(tmp_path / "data.jsonl", ROWS[method]), tmp_path / "run"
    code, told, err = run(models[model], data, "--method", method, "--epochs", 1, "--out", out, "--json", capsys=capsys)
    assert code == 0, err
    results = json.loads(told)
    assert results == json.loads((out / "results.json").read_text())
    assert results["train"] == 18 and results["valid"] == 2 and results["left_out"] == 0
    assert ("exact_match" in results) == (method == "spans") and "parameters" in err and "20 steps" not in err
    read = load_module(out / "model")
    assert type(read) is HEADS.get(method, Classifier)
    assert read.config.labels == {"choices": (), "spans": (), "tokens": ("O", "blue", "number", "red")}.get(
        method, ("blue", "red")
    )


def test_it_learns_and_transformers_answers_alike(models, tmp_path, capsys):
    data, out = written(tmp_path / "data.jsonl", ROWS["classify"] * 6), tmp_path / "run"
    code, told, err = run(
        models["decoder"], data, "--method", "classify", "--lr", 0.01, "--auxiliary", 0.5, "--out", out, capsys=capsys
    )
    assert code == 0 and "accuracy                 1.0000" in told, err
    module, tokenizer = load_module(out / "model"), load_tokenizer(out / "model")
    texts = ["red is 3", "blue is 4"]
    ours = judging.logits(module, [labelled.of_text(tokenizer, text, 0) for text in texts])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    encode = transformers.AutoTokenizer.from_pretrained(out / "model")
    with torch.no_grad():
        for text, row in zip(texts, ours, strict=True):
            assert torch.allclose(theirs(**encode(text, return_tensors="pt")).logits, row, atol=1e-5)
    told = transformers.pipeline("text-classification", model=str(out / "model"))(texts)
    assert [one["label"] for one in told] == ["red", "blue"]


def test_the_same_command_goes_on(models, tmp_path, capsys):
    data, out = written(tmp_path / "data.jsonl", ROWS["classify"]), tmp_path / "run"
    given = (models["encoder"], data, "--method", "classify", "--out", out)
    assert run(*given, "--epochs", 1, capsys=capsys)[0] == 0
    first = (out / "metrics.jsonl").read_text()
    assert run(*given, "--epochs", 1, capsys=capsys)[0] == 0
    assert (out / "metrics.jsonl").read_text() == first  # nothing was left to train


def test_answers_by_a_decoder_and_by_two_stacks(models, tmp_path, capsys):
    rows = [{"prompt": f"red {n}", "completion": f" blue {n}"} for n in range(12)]
    data = written(tmp_path / "data.jsonl", rows)
    for model in ("decoder", "translator"):
        out = tmp_path / model
        given = (models[model], data, "--epochs", 30, "--batch", 4, "--lr", 0.01, "--out", out, "--json")
        code, told, err = run(*given, capsys=capsys)
        assert code == 0, err
        results = json.loads(told)
        assert results["nats_per_token"] < 0.8 * results["nats_per_token_before"]
        load_module(out / "model")


def test_only_what_the_assistant_says_is_learned():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% if m.role == 'assistant' %}.{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    turns = [("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B"), ("user", "late")]
    made = conversation(tokenizer, [{"role": role, "content": text} for role, text in turns])
    assert tokenizer.decode(made.ids) == "<s>S<u>Q<a>A.<u>R<a>B."
    learned = [target for target in made.targets if target != IGNORED]
    assert tokenizer.decode(learned) == "A.B."
    alone = piece(tokenizer, jsonl.Completion("Q", "A"))
    assert [t for t in alone.targets if t != IGNORED] == [ord("A"), 256]
    with pytest.raises(InputError, match="nothing to learn"):
        conversation(tokenizer, [{"role": "user", "content": "Q"}])
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="writes earlier messages anew"):
        conversation(tokenizer, [{"role": role, "content": text} for role, text in turns])


BAD = {
    "unknown keys": ("classify", {"txt": "a", "label": "red"}, "keys 'txt', 'label'; accepted: text + label"),
    "empty text": ("classify", {"text": " ", "label": "red"}, "text is empty"),
    "a label of no kind": (
        "classify",
        {"text": "a", "label": True},
        "field 'label' is of type bool; accepted: a string",
    ),
    "too long": ("classify", {"text": "a " * 60, "label": "red"}, "at most 64 fit"),
    "not JSON": ("classify", "{", "not JSON"),
    "empty second text": ("pairs", {"text": "a", "text_pair": "", "label": "red"}, "text_pair is empty"),
    "no such choice": ("choices", {"context": "a", "choices": ["b", "c"], "label": 2}, "a number from 0 to 1"),
    "one choice": ("choices", {"context": "a", "choices": ["b"], "label": 0}, "only one"),
    "an empty word": ("tokens", {"tokens": ["a", ""], "tags": ["O", "O"]}, "tokens[1] is empty"),
    "no choices": ("choices", {"context": "a", "choices": [], "label": 0}, "'choices' is an empty list"),
    "span outside": (
        "spans",
        {"context": "red is 1", "question": "q", "answers": {"text": ["1"], "answer_start": [9]}},
        "answers: '1' at character 9, beyond the 8 of the context",
    ),
    "span elsewhere": (
        "spans",
        {"context": "red is 1", "question": "q", "answers": {"text": ["1"], "answer_start": [0]}},
        "answers: '1' at character 0, where 'r' is",
    ),
    "answers of no form": ("spans", {"context": "a", "question": "q", "answers": {"text": "a"}}, "field 'answers'"),
    "a tag too few": ("tokens", {"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named_or_left_out(name, models, tmp_path, capsys):
    method, row, message = BAD[name]
    data, out = written(tmp_path / "data.jsonl", [*ROWS[method][:7], row, *ROWS[method][7:]]), tmp_path / "run"
    given = (models["decoder"], data, "--method", method, "--epochs", 0.1, "--out", out)
    code, told, err = run(*given, capsys=capsys)
    assert (code, told, out.exists()) == (2, "", False)
    assert err.startswith(f"error: {data}: line 8: ") and message in err and len(err.splitlines()) == 1
    code, told, err = run(*given, "--skip-bad", capsys=capsys)
    assert code == 0 and "left_out                 1" in told and f"left out: {data}: line 8: " in err


def test_a_label_that_was_not_learned(models, tmp_path, capsys):
    data, valid = written(tmp_path / "data.jsonl", LABELLED), tmp_path / "valid.jsonl"
    written(valid, [*LABELLED[:2], {"text": "green is 1", "label": "green"}])
    given = (models["encoder"], data, "--method", "classify", "--valid", valid, "--out", tmp_path / "run")
    code, _, err = run(*given, capsys=capsys)
    assert code == 2 and f"{valid}: line 3: unknown label 'green'" in err
    code, told, _ = run(*given, "--epochs", 0.1, "--skip-bad", capsys=capsys)
    assert code == 0 and "left_out                 1" in told


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("encoder", ["--method", "clasify"], "did you mean 'classify'"),
        ("encoder", [], "this model only reads"),
        ("translator", ["--method", "classify"], "use sft"),
        ("encoder", ["--method", "classify", "--auxiliary", 0.5], "--auxiliary"),
        ("decoder", ["--auxiliary", 0.5], "--auxiliary"),
        ("decoder", ["--method", "classify", "--length", 65], "context of 64 tokens"),
        ("decoder", ["--method", "spans"], "line 1: keys 'text', 'label'; accepted: context + question + answers"),
    ],
)
def test_what_does_not_go_together(model, arguments, message, models, tmp_path, capsys):
    data = written(tmp_path / "data.jsonl", LABELLED)
    code, _, err = run(models[model], data, "--out", tmp_path / "run", *arguments, capsys=capsys)
    assert code == 2 and message in err and not (tmp_path / "run").exists()


def test_another_task_in_the_same_folder_is_refused(models, tmp_path, capsys):
    data, out = written(tmp_path / "data.jsonl", LABELLED), tmp_path / "run"
    other = written(tmp_path / "other.jsonl", [row | {"label": row["label"].upper()} for row in LABELLED])
    assert run(models["encoder"], data, "--method", "classify", "--epochs", 1, "--out", out, capsys=capsys)[0] == 0
    given = (models["encoder"], other, "--method", "classify", "--epochs", 1, "--out", out)
    code, _, err = run(*given, capsys=capsys)
    assert code == 2 and "--fresh" in err and load_module(out / "model").config.labels == ("blue", "red")
    assert run(*given, "--fresh", capsys=capsys)[0] == 0
    assert load_module(out / "model").config.labels == ("BLUE", "RED")


def test_spans_over_an_encoder_are_a_class_of_transformers(models, tmp_path, capsys):
    for method, theirs in (("spans", "BertForQuestionAnswering"), ("tokens", "BertForTokenClassification")):
        data, out = written(tmp_path / "data.jsonl", ROWS[method]), tmp_path / method
        assert run(models["encoder"], data, "--method", method, "--epochs", 1, "--out", out, capsys=capsys)[0] == 0
        assert json.loads((out / "model" / "config.json").read_text())["architectures"] == [theirs]
        getattr(transformers, theirs).from_pretrained(out / "model")


def test_a_label_that_only_bad_lines_have(models, tmp_path, capsys):
    data = written(tmp_path / "data.jsonl", [*LABELLED, {"text": "", "label": "[/a]"}])
    given = (models["encoder"], data, "--method", "classify", "--skip-bad", "--out", tmp_path / "run")
    code, _, err = run(*given, capsys=capsys)
    assert code == 2 and "no line to learn the label '[/a]' from" in err


@pytest.mark.parametrize("option", [["--batch", 0], ["--epochs", "nan"], ["--epochs", -1], ["--auxiliary", -1]])
def test_numbers_without_a_meaning(option, models, tmp_path, capsys):
    data = written(tmp_path / "data.jsonl", LABELLED)
    given = (models["decoder"], data, "--method", "classify", "--out", tmp_path / "run", *option)
    code, _, err = run(*given, capsys=capsys)
    assert code == 2 and option[0] in err and not (tmp_path / "run").exists()


def test_only_the_completion_of_a_conversation_is_learned():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}:{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    asked = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "OLD"), ("user", "r"))]
    made = piece(tokenizer, jsonl.Completion(asked, "NEW"))
    assert tokenizer.decode([t for t in made.targets if t != IGNORED]) == "NEW"
    with pytest.raises(InputError, match="nothing to learn"):
        piece(tokenizer, jsonl.Completion(asked, [{"role": "user", "content": "NEW"}]))


def test_one_label_is_no_task(models, tmp_path, capsys):
    data = written(tmp_path / "data.jsonl", [row for row in LABELLED if row["label"] == "red"])
    code, _, err = run(models["encoder"], data, "--method", "classify", "--out", tmp_path / "run", capsys=capsys)
    assert code == 2 and "the only label is 'red'" in err


def test_measures_by_hand():
    """Classes: two of three right, F1 2/3 and 2/3; spans: SQuAD's normal form and words shared."""

    class Told(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, batch):
            best = batch["ids"][:, 0, 0]  # the first id says what is told
            return torch.nn.functional.one_hot(best, 2)[:, None].float()

    examples = [labelled.Example(([told],), ([0],), (asked,)) for told, asked in ((0, 0), (1, 1), (1, 0))]
    found = judging.classes(Told(), examples)
    assert found == pytest.approx({"accuracy": 2 / 3, "f1": (2 / 3 + 2 / 3) / 2, "majority": 2 / 3})
    tokenizer: Tokenizer = byte_tokenizer().framed("<s>", "<$>", "<e>")
    span = labelled.of_span(tokenizer, "q", "The big cat.", [("big cat", 4)])
    logits = torch.zeros(2, len(span.places))
    logits[0, span.places.index((0, 1))] = logits[1, span.places.index((10, 11))] = 9
    assert judging.best_span(logits, span) == "The big cat"
    assert judging.best_span(logits, span, longest=3) != "The big cat"
    reader = lambda batch: logits[None]  # noqa: E731
    told = type("Reader", (Told,), {"forward": lambda self, batch: reader(batch)})()
    assert judging.spans(told, [span]) == {"exact_match": 1.0, "f1": 1.0}
