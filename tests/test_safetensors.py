"""Safetensors in and out, whole and sharded; broken and hostile files are refused in one line."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from mutations import bounded, mutations, survives

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator
from allyouneed.models.checkpoints.weights import (
    INDEX,
    MOST_HEADER,
    SINGLE,
    read_safetensors,
    read_sharded,
    write_safetensors,
    write_sharded,
)

Tensors = dict[str, torch.Tensor]


def tensors() -> Tensors:
    randomness = generator(0, "weights")
    found = {f"layer.{i}": torch.randn(4, i, generator=randomness) for i in range(5)}  # one of them empty
    return found | {
        "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "eight": torch.arange(7, dtype=torch.float32).to(torch.float8_e4m3fn),
        "mask": torch.tensor([True, False]),
        "one": torch.tensor(3, dtype=torch.int64),
    }


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].float().equal(b[name].float())
        for name in a
    )


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_file_and_back(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", tensors())
    assert same(read_safetensors(tmp_path / "a.safetensors"), tensors())
    assert same(safetensors.torch.load_file(tmp_path / "a.safetensors"), tensors())
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    safetensors.torch.save_file(tensors(), tmp_path / "b.safetensors")
    assert same(read_safetensors(tmp_path / "b.safetensors"), tensors())
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.safetensors", "b.safetensors"]


def test_data_is_mapped_not_read(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"large": torch.zeros(64 << 20, dtype=torch.uint8)})
    before = int(Path("/proc/self/statm").read_text().split()[1])
    held = read_safetensors(tmp_path / "a.safetensors")
    pages = int(Path("/proc/self/statm").read_text().split()[1]) - before
    assert pages * resource.getpagesize() < 16 << 20
    assert held["large"].sum() == 0


def test_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    table = torch.randn(100, 8, generator=generator(0))
    shared = {"embedding": table, "head": table, "rows": table[10:20], "turned": table.t()}
    write_safetensors(tmp_path / "a.safetensors", shared)
    assert (tmp_path / "a.safetensors").stat().st_size < 3 * table.nbytes
    assert set(safetensors.torch.load_file(tmp_path / "a.safetensors")) == {"embedding", "rows", "turned"}
    held = read_safetensors(tmp_path / "a.safetensors")
    assert same(held, shared)
    assert held["head"].data_ptr() == held["embedding"].data_ptr()
    write_sharded(tmp_path / "many", shared, max_shard_bytes=table.nbytes)
    assert same(read_sharded(tmp_path / "many"), shared)


def test_shards_and_their_index(tmp_path: Path) -> None:
    held = {f"layer.{i}.weight": torch.full((10, 10), float(i)) for i in range(10)}
    write_sharded(tmp_path, held, max_shard_bytes=1300)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 4000}
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    assert same(read_sharded(tmp_path), held)
    for name, shard in index["weight_map"].items():
        assert safetensors.torch.load_file(tmp_path / shard)[name].equal(held[name])


def test_writing_over_another_layout_leaves_only_the_new_one(tmp_path: Path) -> None:
    first, second = {"a": torch.zeros(100), "b": torch.ones(100)}, {"c": torch.ones(3)}
    write_sharded(tmp_path, first, max_shard_bytes=500)
    write_sharded(tmp_path, second)
    assert [p.name for p in tmp_path.iterdir()] == [SINGLE]
    assert same(read_sharded(tmp_path), second)
    write_sharded(tmp_path, first, max_shard_bytes=500)
    assert not (tmp_path / SINGLE).exists()
    assert same(read_sharded(tmp_path), first)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        write_safetensors(tmp_path / "file" / "a.safetensors", tensors())


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated or not safetensors"),
    "short": (b"\x00" * 7, "truncated or not safetensors"),
    "huge header": ((1 << 60).to_bytes(8, "little") + b"{}", "header of 1152921504606846976 bytes"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "header of 100 bytes"),
    "header too long": (file_of(b" " * (MOST_HEADER + 1)), "header of"),
    "not JSON": (file_of(b"not JSON"), "header is not JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "header is not JSON"),
    "nested": (file_of(b"[" * 1_000_000), "header is not JSON"),
    "long number": (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "header is not JSON"),
    "list": (file_of([]), "header is a list"),
    "same name twice": (file_of(b'{"a": {}, "a": {}}'), "the same name twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "'__metadata__' must map strings to strings"),
    "metadata a list": (file_of({"__metadata__": []}), "'__metadata__' must map strings to strings"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"8" * 8), "must have dtype, shape"),
    "dtype unknown": (file_of({"a": ONE | {"dtype": "F31"}}, b"8" * 8), "'a': dtype 'F31'; accepted: F64"),
    "dtype a list": (file_of({"a": ONE | {"dtype": ["F32"]}}, b"8" * 8), "'a': dtype"),
    "shape negative": (file_of({"a": ONE | {"shape": [-2]}}, b"8" * 8), "whole numbers"),
    "shape of fractions": (file_of({"a": ONE | {"shape": [2.0]}}, b"8" * 8), "whole numbers"),
    "shape of truths": (file_of({"a": ONE | {"shape": [True, 2]}}, b"8" * 8), "whole numbers"),
    "shape overflows": (file_of({"a": ONE | {"shape": [2**40] * 5}}, b"8" * 8), "needs .* bytes, data_offsets give 8"),
    "shape too large": (file_of({"a": ONE | {"shape": [3]}}, b"8" * 8), "needs 12 bytes, data_offsets give 8"),
    "three offsets": (file_of({"a": ONE | {"data_offsets": [0, 4, 8]}}, b"8" * 8), "whole numbers"),
    "offsets backwards": (file_of({"a": ONE | {"data_offsets": [8, 0]}}, b"8" * 8), "data_offsets give -8"),
    "offsets beyond the file": (file_of({"a": ONE | {"data_offsets": [8, 16]}}, b"8" * 8), "begins at 8"),
    "truncated data": (file_of({"a": ONE}, b"8" * 7), "tensors end at 8, the data at 7"),
    "data left over": (file_of({"a": ONE}, b"8" * 9), "tensors end at 8, the data at 9"),
    "overlap": (file_of({"a": ONE, "b": ONE | {"data_offsets": [4, 12]}}, b"8" * 12), "'b' begins at 4"),
    "hole": (file_of({"a": ONE, "b": ONE | {"data_offsets": [12, 20]}}, b"8" * 20), "'b' begins at 12"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(kind: str, tmp_path: Path) -> None:
    data, said = HOSTILE[kind]
    (tmp_path / "bad.safetensors").write_bytes(data)
    refused_in_one_line(tmp_path / "bad.safetensors", said)


def refused_in_one_line(path: Path, said: str) -> None:
    with bounded(path.stat().st_size), pytest.raises(InputError, match=said) as error:
        read_safetensors(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("part", [b"[],", b"{},", b'{"":0},'])
def test_a_header_of_many_small_things_takes_little_memory(part: bytes, tmp_path: Path) -> None:
    many = b"[" + part * ((MOST_HEADER - 8) // len(part)) + b"0]"
    (tmp_path / "bad.safetensors").write_bytes(file_of(many))
    refused_in_one_line(tmp_path / "bad.safetensors", "header is a list")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=f"{tmp_path}: has neither {SINGLE} nor"):
        read_sharded(tmp_path)


def test_mutated_files(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "good.safetensors", {k: v for k, v in tensors().items() if k in ("layer.3", "half")})
    outcomes = [
        survives(lambda path: [t.float().sum() for t in read_safetensors(path).values()], tmp_path / "bad", mutated)
        for mutated in mutations((tmp_path / "good.safetensors").read_bytes(), 400, seed=1)
    ]
    assert outcomes.count(False) > 100


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_sharded(tmp_path / "model", {"a": torch.zeros(100), "b": torch.ones(100)}, max_shard_bytes=500)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "field 'weight_map' must map"),
        ({"weight_map": []}, "field 'weight_map' must map"),
        ({"weight_map": {}}, "field 'weight_map' must map"),
        ([], "field 'weight_map' must map"),
        ({"weight_map": {"a": 3}}, r"weight_map\['a'\] is '3'"),
        ({"weight_map": {"a": "../good.safetensors"}}, r"weight_map\['a'\] is '../good"),
        ({"weight_map": {"a": "/etc/passwd"}}, r"weight_map\['a'\] is '/etc/passwd'"),
        ({"weight_map": {"a": "weights.bin"}}, r"weight_map\['a'\] is 'weights.bin'"),
        ({"weight_map": {"a": "missing.safetensors"}}, "missing.safetensors: No such file"),
        ({"weight_map": {"c": "model-00001-of-00002.safetensors"}}, "puts 'c' into model-00001.*does not hold it"),
    ],
)
def test_hostile_indexes(index: object, said: str, sharded: Path) -> None:
    write_safetensors(sharded.parent / "good.safetensors", {"a": torch.zeros(3)})
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=said) as error:
        read_sharded(sharded)
    assert len(str(error.value).splitlines()) == 1


def test_mutated_indexes(sharded: Path) -> None:
    data = (sharded / INDEX).read_bytes()
    outcomes = [
        survives(lambda _: read_sharded(sharded), sharded / INDEX, mutated, named=str(sharded))
        for mutated in mutations(data, 400, seed=2)
    ]
    assert outcomes.count(False) > 100


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: No such file"):
        read_sharded(sharded)
