"""GGUF: what the package writes is read back, numbers equal its own, and damaged or hostile files get one line."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import traced, within
from mutations import mutations, survives

from allyouneed.core.errors import InputError
from allyouneed.data import materials, vocabularies
from allyouneed.generate.load import load
from allyouneed.models.checkpoints.gguf import GGUF
from allyouneed.models.checkpoints.gguf_header import DEEPEST, SUPPORTED

Kind = gguf.GGMLQuantizationType
WRITTEN = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]  # what the package can quantise to
RANDOM = sorted(set(SUPPORTED) - set(WRITTEN))  # the others are random bytes with sane scales


def write(path: Path, *, alignment: int | None = None) -> Path:
    """A small file with every kind of value and of tensor."""
    randomness = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_uint32("a.count", 7)
    writer.add_int64("a.negative", -(2**40))
    writer.add_float32("a.rate", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "naïve 🙂\n")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.flags", [True, False])
    writer.add_array("a.rates", [0.5, -1.0])
    writer.add_array("a.words", ["", "one", "zwei", "три"])
    for name in WRITTEN:
        values = randomness.standard_normal((3, 2, 64)).astype(np.float32)
        writer.add_tensor(f"t.{name}", gguf.quants.quantize(values, Kind[name]), raw_dtype=Kind[name])
    for name in RANDOM:
        writer.add_tensor(f"t.{name}", blocks(Kind[name], 4, randomness), raw_dtype=Kind[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind: Kind, rows: int, randomness: np.random.Generator) -> np.ndarray:
    """(rows, bytes of two blocks): random bytes whose half-precision scales are small finite numbers."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = randomness.integers(0, 256, (rows, 2, size), dtype=np.uint8)
    scales = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)}[kind.name]
    count = (scales[1] - scales[0]) // 2
    raw[:, :, scales[0] : scales[1]] = randomness.uniform(-1, 1, (rows, 2, count)).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, 2 * size)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf")


def test_metadata_is_what_was_written(path: Path) -> None:
    file = GGUF.open(path)
    assert file.version == 3
    assert file.need("a.count", int) == 7
    assert file.need("a.negative", int) == -(2**40)
    assert file.need("a.rate", float) == 0.5
    assert file.need("a.count", float) == 7.0
    assert file.need("a.flag", bool) is True
    assert file.need("a.text", str) == "naïve 🙂\n"
    assert file.need("a.words", list) == ["", "one", "zwei", "три"]
    assert file.need("a.numbers", np.ndarray).tolist() == [1, 2, 3]
    assert file.need("a.flags", np.ndarray).tolist() == [True, False]
    assert file.find("a.missing", int, None) is None


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_everything_equals_the_packages_own_reader(tmp_path: Path, alignment: int | None) -> None:
    path = write(tmp_path / "aligned.gguf", alignment=alignment)
    ours, theirs = GGUF.open(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.kind, info.offset, info.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert list(info.shape) == tensor.shape.tolist()[::-1]
        assert ours.raw(tensor.name).tobytes() == tensor.data.tobytes()
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()


@pytest.mark.parametrize("kind", SUPPORTED)
def test_dequantised_numbers_are_the_packages(path: Path, kind: str) -> None:
    file = GGUF.open(path)
    found = file.tensor(f"t.{kind}")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == f"t.{kind}")
    expected = gguf.quants.dequantize(tensor.data, Kind[kind]).reshape(file.tensors[f"t.{kind}"].shape)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), expected)
    assert np.isfinite(expected).all()
    assert expected.std() > 0
    found += 1  # a copy: neither read-only nor the file


@pytest.mark.parametrize("kind", WRITTEN)
def test_dequantised_numbers_are_near_the_originals(path: Path, kind: str) -> None:
    randomness = np.random.default_rng(0)
    originals = {name: randomness.standard_normal((3, 2, 64)).astype(np.float32) for name in WRITTEN}
    bits = {"F32": 24, "F16": 11, "BF16": 8, "Q8_0": 8}.get(kind, int(kind[1]) if kind[0] == "Q" else 0)
    error = np.abs(GGUF.open(path).tensor(f"t.{kind}").numpy() - originals[kind]).max()
    assert error <= 8 * 2.0**-bits


def test_raw_bytes_are_the_file_itself(path: Path) -> None:
    file = GGUF.open(path)
    raw = file.raw("t.Q4_1")
    assert raw.shape == (6, 40)
    assert raw.base is not None
    assert not raw.flags.writeable


def test_names_the_nearest_tensor(path: Path) -> None:
    with pytest.raises(InputError, match=r"small\.gguf: 't.Q4_2'; did you mean"):
        GGUF.open(path).tensor("t.Q4_2")


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("llama.block_count", int, "no 'llama.block_count'; an integer is needed"),
        ("a.text", int, "'a.text' is 'naïve 🙂.n'; an integer is accepted"),
        ("a.flag", int, "'a.flag' is True; an integer is accepted"),
        ("a.numbers", list, "'a.numbers' is an array of 3 numbers; a list of strings is accepted"),
        ("a.words", np.ndarray, "'a.words' is a list of 4; an array of numbers is accepted"),
    ],
)
def test_need_names_file_key_and_kind(path: Path, key: str, kind: type, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        GGUF.open(path).need(key, kind)
    assert "small.gguf" in str(error.value)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def crafted(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return head + bytes(-len(head) % 32 + 64)


def nested(depth: int) -> bytes:
    """An array of an array of ... of no numbers."""
    return struct.pack("<IQ", 9, 1) * (depth - 1) + struct.pack("<IQ", 4, 0)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "other": (b"PK\x03\x04 something else", "begins with"),
    "short": (b"GGUF\x03", "header: claims 4 bytes"),
    "version": (crafted(version=1), "of version 1; versions 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "big-endian"),
    "2^60 tensors": (crafted(tensors=2**60), "1152921504606846976 tensors; at most"),
    "more tensors than bytes": (crafted(tensors=60000), "60000 tensors do not fit"),
    "2^63 keys": (crafted(keys=2**63), "metadata keys; at most"),
    "huge key": (crafted(struct.pack("<Q", 2**63), keys=1), "metadata key 0: claims 9223372036854775808 bytes"),
    "huge string": (crafted(field(b"k", 8, struct.pack("<Q", 2**40)), keys=1), "metadata 'k': claims"),
    "huge array": (crafted(field(b"k", 9, struct.pack("<IQ", 4, 2**62)), keys=1), "elements do not fit"),
    "huge array of strings": (crafted(field(b"k", 9, struct.pack("<IQ", 8, 2**40)), keys=1), "elements; at most"),
    "array of arrays of itself": (crafted(field(b"k", 9, struct.pack("<IQ", 9, 2**32)), keys=1), "elements; at most"),
    "nested": (crafted(field(b"k", 9, nested(DEEPEST + 1)), keys=1), f"nested deeper than {DEEPEST}"),
    "type": (crafted(field(b"k", 13, b""), keys=1), "value type 13 is unknown"),
    "array type": (crafted(field(b"k", 9, struct.pack("<IQ", 99, 0)), keys=1), "value type 99"),
    "boolean": (crafted(field(b"k", 7, b"\x02"), keys=1), "a boolean is 0 or 1"),
    "array boolean": (crafted(field(b"k", 9, struct.pack("<IQ", 7, 1) + b"\x02"), keys=1), "neither 0 nor 1"),
    "key encoding": (crafted(field(b"\xff", 7, b"\x01"), keys=1), "metadata key 0: byte 32 is not UTF-8"),
    "encoding": (crafted(field(b"k", 8, string(b"ok\xff")), keys=1), "metadata 'k': byte 47 is not UTF-8"),
    "array encoding": (crafted(field(b"k", 9, struct.pack("<IQ", 8, 1) + string(b"\xff")), keys=1), "string 0: byte"),
    "key twice": (crafted(field(b"k", 7, b"\1"), field(b"k", 7, b"\1"), keys=2), "metadata 'k': stands twice"),
    "line break": (crafted(field(b"a\nb", 7, b"\2"), keys=1), r"metadata 'a\nb'"),
    "alignment": (crafted(field(b"general.alignment", 4, struct.pack("<I", 0)), keys=1), "a power of two"),
    "alignment kind": (crafted(field(b"general.alignment", 8, string(b"32")), keys=1), "'32'; a power of two"),
    "dimensions": (crafted(tensor(b"t", [1] * 5), tensors=1), "has 5 dimensions"),
    "no dimensions": (crafted(tensor(b"t", []) + bytes(16), tensors=1), "has 0 dimensions"),
    "nothing": (crafted(tensor(b"t", [0]), tensors=1), "dimensions are at least 1"),
    "overflow": (crafted(tensor(b"t", [2**32, 2**32, 2**32]), tensors=1), "but the file ends at"),
    "kind": (crafted(tensor(b"t", [1], kind=77), tensors=1), "type number 77, which is unknown"),
    "row": (crafted(tensor(b"t", [33], kind=2), tensors=1), "rows of 33 numbers, no multiple of the 32"),
    "offset": (crafted(tensor(b"t", [1], offset=2**63), tensors=1), "but the file ends at"),
    "misaligned": (crafted(tensor(b"t", [1], offset=4), tensors=1), "no multiple of the alignment 32"),
    "tensor twice": (crafted(tensor(b"t", [1]), tensor(b"t", [1], offset=32), tensors=2), "'t': stands twice"),
    "overlap": (crafted(tensor(b"t", [9]), tensor(b"u", [1], offset=32), tensors=2), "overlaps"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_get_one_line(tmp_path: Path, name: str) -> None:
    data, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with traced() as peak, within(0.5), pytest.raises(InputError) as error:
        GGUF.open(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert peak[0] < 1 << 20


def test_arrays_within_arrays(tmp_path: Path) -> None:
    path = tmp_path / "nested.gguf"
    path.write_bytes(crafted(field(b"k", 9, nested(DEEPEST)), keys=1))
    value: Any = GGUF.open(path).metadata["k"]
    for _ in range(DEEPEST - 1):
        (value,) = value
    assert value.tolist() == []


def test_a_type_that_is_not_read_is_named_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(crafted(tensor(b"t", [256], kind=Kind.IQ2_XXS), tensors=1) + bytes(64))
    file = GGUF.open(path)
    with pytest.raises(InputError, match="'t' is IQ2_XXS; types that are read: F32, F16"):
        file.tensor("t")


@pytest.mark.parametrize(("name", "message"), [("missing.gguf", "No such file"), ("", "directory")])
def test_what_cannot_be_opened(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GGUF.open(tmp_path / name)


def test_mutations_get_one_line(path: Path, tmp_path: Path) -> None:
    def load(damaged: Path) -> None:
        file = GGUF.open(damaged)
        for name, info in file.tensors.items():
            file.raw(name)
            if info.kind.name in SUPPORTED:
                file.tensor(name)
        for key in ("a.count", "a.words"):
            file.find(key, int if key == "a.count" else list, None)

    data = path.read_bytes()
    outcomes = [survives(load, tmp_path / "damaged.gguf", damaged) for damaged in mutations(data, 500, seed=0)]
    assert 50 < sum(outcomes) < 450


def test_a_real_file() -> None:
    path = materials.path("smollm2-135m-instruct")
    GGUF.open(path)  # the first time reads it from the disk
    with within(0.4):
        file = GGUF.open(path)
    assert len(file.tensors) == 272
    assert file.need("llama.block_count", int) == 30
    assert len(file.need("tokenizer.ggml.merges", list)) == 48900
    assert file.tensor("token_embd.weight").shape == (49152, 576)
    assert file.tensor("blk.0.ffn_down.weight").std() > 0


def test_a_header_is_read_once_and_its_merges_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[GGUF] = []
    real = GGUF.open
    monkeypatch.setattr(GGUF, "open", lambda path: opened.append(real(path)) or opened[-1])
    load("smollm2-135m-instruct")
    (file,) = opened
    merges = file.need("tokenizer.ggml.merges", list)
    made = vocabularies.from_gguf(file)["model"]["merges"]
    assert len(made) == len(merges) and all(one is other for one, other in zip(made, merges, strict=True))
