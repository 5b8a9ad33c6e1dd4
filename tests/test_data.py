"""Data files, rows of tokens, and iterators that go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import mutations, survives

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator
from allyouneed.data import jsonl
from allyouneed.data.batches import Epochs, Generated, Windows
from allyouneed.data.packing import IGNORED, Batch, Piece, answer, chop, document, fit, pad_right, take
from allyouneed.train import checkpoints

RECORDS = [
    {"text": "Ünïcode 🙂 text", "source": "a web page"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"prompt": "2+2=", "completion": "4"},
    {"prompt": [{"role": "user", "content": "2+2="}], "chosen": "4", "rejected": "5"},
]


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_the_four_kinds(tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", RECORDS[0], "", *RECORDS[1:])
    read = list(jsonl.read(path))
    assert [type(record) for record in read] == [jsonl.Text, jsonl.Chat, jsonl.Completion, jsonl.Preference]
    assert [vars(r) for r in read] == [{k: v for k, v in r.items() if k != "source"} for r in RECORDS]
    lines = jsonl.Lines(path)
    assert list(lines) == read
    assert lines[-1] == read[-1]
    assert lines[1:3] == read[1:3]
    with pytest.raises(IndexError):
        lines[4]


def test_only_the_kinds_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", RECORDS[3])
    assert isinstance(next(jsonl.read(path, [jsonl.Preference])), jsonl.Preference)
    with pytest.raises(InputError, match=r"line 1: keys 'prompt', 'chosen', 'rejected'; accepted: text, or messages"):
        next(jsonl.read(path, [jsonl.Text, jsonl.Chat]))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"promt": "a", "completion": "b"}', "keys 'promt', 'completion'; accepted: text, or messages, or prompt"),
        ("{}", "keys none"),
        ("[1]", "of type list; accepted: an object"),
        ('{"text": 3}', "field 'text' is of type int; accepted: a string"),
        ('{"text": "a", "text": "b"}', "key 'text' twice"),
        ('{"text": "a"', "not JSON: .* at character 14"),
        ('{"text": "\\ud800"}', "half a surrogate pair at character 1"),
        ('{"messages": []}', "field 'messages' is an empty list"),
        ('{"messages": "Hi"}', "field 'messages' is of type str; accepted: a list of messages"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] has 'role'; accepted: an object of role and content"),
        ('{"messages": [{"role": "me", "content": "Hi"}]}', r"messages\[0\].role is 'me'; accepted: system, user"),
        ('{"messages": [{"role": "user", "content": null}]}', r"messages\[0\].content is of type NoneType"),
        (
            '{"prompt": {}, "completion": "x"}',
            "field 'prompt' is of type dict; accepted: a string or a list of messages",
        ),
        ('{"text": ' + "[" * 100_000, "not JSON that can be read"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON that can be read"),
    ],
)
def test_errors_name_file_line_and_what_is_accepted(line: str, said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", RECORDS[0], "", line)
    for read in (lambda: list(jsonl.read(path)), lambda: list(jsonl.Lines(path))):
        with pytest.raises(InputError, match=said) as error:
            read()
        assert str(error.value).startswith(f"{path}: line 3: ")
        assert len(str(error.value).splitlines()) == 1


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            list(jsonl.read(path))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(InputError, match="line 2: byte 11 is not UTF-8"):
        list(jsonl.read(tmp_path / "latin.jsonl"))
    (tmp_path / "endless.jsonl").write_bytes(b" " * (jsonl.LONGEST + 1))
    for read in (lambda path: jsonl.Lines(path)[0], lambda path: list(jsonl.read(path))):
        with pytest.raises(InputError, match="line 1: longer than"):
            read(tmp_path / "endless.jsonl")
    (tmp_path / "endless.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * (3 * jsonl.LONGEST) + b'\n\n{"text": "b"}')
    lines = jsonl.Lines(tmp_path / "endless.jsonl")
    assert (lines[0], lines[2]) == (jsonl.Text("a"), jsonl.Text("b")) and list(lines.numbers) == [1, 2, 4]
    with pytest.raises(InputError, match="line 2: longer than"):
        lines[1]


def test_mutated_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", *RECORDS)
    outcomes = [
        survives(lambda damaged: list(jsonl.read(damaged)), tmp_path / "mutated.jsonl", mutated, named="jsonl: line ")
        for mutated in mutations(path.read_bytes(), 400, seed=0)
    ]
    assert outcomes.count(False) > 100


def test_a_hundred_thousand_lines_are_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"text": f"{i} " + "x" * 200}) + "\n" for i in range(50_000))
    lines = jsonl.Lines(path)
    assert len(lines) == 50_000
    assert lines[31_415].text.split()[0] == "31415"
    assert lines.offsets.itemsize * len(lines) < path.stat().st_size / 20


def test_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n \n\nthree")
    assert list(jsonl.texts(path)) == ["one\ntwo\n", "three"]
    assert list(jsonl.texts(path, whole=True)) == ["one\ntwo\n \n\nthree"]


def random_documents(seed: int, longest: int = 40) -> list[list[int]]:
    randomness = generator(seed, "documents")
    lengths = torch.randint(1, longest, (60,), generator=randomness).tolist()
    start, found = 1, []
    for length in lengths:
        found.append(list(range(start, start + length)))  # every token is its own, so that all can be told apart
        start += length
    return found


def segments_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The ids and targets of each segment, row by row."""
    found = []
    for ids, targets, segments in zip(batch["ids"], batch["targets"], batch["segments"], strict=True):
        numbers = segments[segments > 0].unique_consecutive().tolist()
        assert numbers == list(range(1, len(numbers) + 1))
        found += [(ids[segments == n].tolist(), targets[segments == n].tolist()) for n in numbers]
        assert (targets[segments == 0] == IGNORED).all()
    return found


@pytest.mark.parametrize("length", [1, 7, 16, 64])
def test_chopping_loses_no_token_and_no_target(length: int) -> None:
    documents = random_documents(length)
    batch = chop(map(document, documents), length)
    assert batch["ids"].shape[1] == length
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    held = segments_of(batch)
    assert [token for ids, _ in held for token in ids] == [token for d in documents for token in d]
    expected = [target for d in documents for target in [*d[1:], IGNORED]]
    assert [target for _, targets in held for target in targets] == expected
    assert (batch["segments"][:-1] > 0).all()


@pytest.mark.parametrize("length", [8, 16, 64])
def test_fitting_keeps_documents_whole(length: int) -> None:
    documents = random_documents(length)
    held = segments_of(fit(map(document, documents), length))
    expected = [
        (d[i : i + length], [*d[1:], IGNORED][i : i + length]) for d in documents for i in range(0, len(d), length)
    ]
    assert sorted(held) == sorted(expected)


def best_fit_by_trying_every_row(lengths: list[int], length: int) -> int:
    rows: list[int] = []
    for wanted in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(rows)) if rows[row] + wanted <= length]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += wanted
        else:
            rows.append(wanted)
    return len(rows)


def test_fitting_is_best_fit() -> None:
    for seed in range(20):
        documents = random_documents(seed, longest=30)
        rows = fit(map(document, documents), 32)["ids"]
        assert len(rows) == best_fit_by_trying_every_row([len(d) for d in documents], 32)


def test_prompts_and_padding_are_not_predicted() -> None:
    batch = pad_right([answer([1, 2, 3], [4, 5]), answer([6], [7]), answer([8, 9], [])])
    assert batch["ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0], [8, 9, 0, 0, 0]]
    assert batch["targets"].tolist() == [[-100, -100, 4, 5, -100], [7] + [-100] * 4, [-100] * 5]
    assert batch["segments"].tolist() == [[1] * 5, [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert pad_right([answer([1, 2, 3], [4, 5])], length=4)["targets"].tolist() == [[-100, -100, 4, 5]]
    turns = document([1, 2, 3, 4, 5, 6], predicted=[False, False, True, False, False, True])
    assert turns.targets == [-100, 3, -100, -100, 6, -100]
    assert document([]) == Piece([], [])


def test_rows_of_a_batch() -> None:
    batch = chop([document(list(range(1, 41)))], 8)
    assert take(batch, slice(1, 3))["ids"].tolist() == batch["ids"][1:3].tolist()
    assert take(batch, [4, 0])["segments"].shape == (2, 8)


def windows() -> Windows:
    return Windows(torch.arange(1000, dtype=torch.int32), batch_size=4, length=16, seed=5)


def epochs(examples: int = 23, seed: int = 5) -> Epochs[int]:
    return Epochs(range(examples), batch_size=4, collate=lambda x: {"ids": torch.tensor(x)}, seed=seed)


def generated() -> Generated:
    return Generated(lambda randomness: {"ids": torch.randn(3, 5, generator=randomness)}, seed=5)


def drawn(batches: Any, count: int) -> list[Any]:
    return [next(batches)["ids"] for _ in range(count)]


@pytest.mark.parametrize("make", [windows, epochs, generated])
@pytest.mark.parametrize("before", [0, 1, 5, 6, 40])
def test_iterators_go_on_where_they_stopped(make: Any, before: int, tmp_path: Path) -> None:
    unbroken, stopped = make(), make()
    drawn(unbroken, before)
    drawn(stopped, before)
    checkpoints.write(tmp_path, {"batches": stopped.state_dict()})
    state = checkpoints.read(tmp_path)["batches"]
    drawn(stopped, 3)  # what comes after the state was taken must not change it
    resumed = make()
    drawn(resumed, 2)
    resumed.load_state_dict(state)
    assert all(a.equal(b) for a, b in zip(drawn(unbroken, 20), drawn(resumed, 20), strict=True))


@pytest.mark.parametrize("make", [windows, epochs, generated])
def test_iterators_leave_the_global_generator_alone(make: Any) -> None:
    before = torch.get_rng_state()
    first = drawn(make(), 10)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(123)
    assert all(a.equal(b) for a, b in zip(first, drawn(make(), 10), strict=True))
    torch.set_rng_state(before)


def test_an_epoch_has_each_example_once() -> None:
    order = torch.cat(drawn(epochs(), 23)).tolist()  # 92 examples, four epochs
    each = [order[i : i + 23] for i in range(0, 92, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in each)
    assert len({tuple(epoch) for epoch in each}) == 4
    assert order[:23] != torch.cat(drawn(epochs(seed=6), 23)).tolist()[:23]


def test_windows_reach_every_token() -> None:
    text = torch.arange(20)
    batches = Windows(text, batch_size=64, length=19, seed=0)
    assert next(batches)["targets"].unique().tolist() == list(range(1, 20))
    batches = Windows(text, batch_size=512, length=3, seed=0)
    batch = next(batches)
    assert batch["ids"][:, 0].unique().tolist() == list(range(17))
    assert (batch["targets"] == batch["ids"] + 1).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            lambda: Windows(torch.arange(16), batch_size=1, length=16, seed=0),
            "16 tokens is too short for windows of 16",
        ),
        (lambda: epochs(0), "no examples"),
        (lambda: epochs().load_state_dict(epochs(24).state_dict()), "'examples' is 24, this run's is 23"),
        (lambda: epochs().load_state_dict(epochs(seed=6).state_dict()), "'seed' is 6, this run's is 5"),
        (lambda: epochs().load_state_dict(windows().state_dict()), "'examples' is None"),
        (lambda: epochs().load_state_dict(epochs().state_dict() | {"drawn": -1}), "'drawn' is -1"),
        (lambda: windows().load_state_dict(epochs().state_dict()), "'generator'"),
        (lambda: windows().load_state_dict({"generator": torch.zeros(3, dtype=torch.uint8)}), "'generator'"),
    ],
)
def test_wrong_states_and_sizes(wrong: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        wrong()
