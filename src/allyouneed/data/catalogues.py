"""Pairs of sentences that people translated: the texts of programs, out of their gettext catalogues (`.mo`).

A catalogue is a table from the program's own, English, texts to those of one language. It is read as data: the rule
that says which plural form goes with which number is an expression of C, and is never computed. Texts are as they
stand there – markup, entities and placeholders such as `%(name)s` included – but for white space, runs of which become
one space. The catalogues of the materials are of web pages, where `&` begins an entity and never a keyboard shortcut.

What is left out: the header, what is not translated (the target is empty or the source again), and plurals in languages
of more than two forms, of which only the rule could say what stands for one and what for many.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from allyouneed import core
from allyouneed.core.errors import InputError, about, unknown
from allyouneed.core.seeds import derive
from allyouneed.data import materials
from allyouneed.data.pairs import Pair
from allyouneed.data.tokenizer_training import train_bpe

MATERIALS = ("translations", "translations-wagtail")
ENGLISH = "en"  # what the texts are translated from; no catalogue says it again

_SPECIAL = ("<pad>", "<start>", "<end>")

TextPair = tuple[str, str]  # source, target


class Split(NamedTuple):
    """Pairs to train on, to choose with and to test with; no source and no target is in two of them."""

    train: tuple[TextPair, ...]
    valid: tuple[TextPair, ...]
    test: tuple[TextPair, ...]


def languages(folders: Sequence[Path] | None = None) -> list[str]:
    """The languages that the catalogues have, as their folders are called (`de`, `pt_BR`, `zh_Hans`), and `en`."""
    return sorted({ENGLISH, *(path.parents[1].name for folder in _given(folders) for path in _files(folder))})


def pairs(source: str, target: str, folders: Sequence[Path] | None = None) -> list[TextPair]:
    """Every text that both languages have, once: of sources that differ only in case and space the first is kept.

    Args:
        source: a language, `en` for the texts as the programs have them.
        target: another one.
        folders: with catalogues at `**/<language>/LC_MESSAGES/*.mo`; the materials if None.

    Raises:
        InputError: no such language, one and the same, or a file that is no catalogue; names it.
    """
    folders = _given(folders)
    known = languages(folders)
    for language in (source, target):
        if language not in known:
            raise unknown("language", language, known)
    if source == target:
        raise InputError(f"pairs: {source!r} is the source and the target; two languages are wanted")
    found: dict[str, TextPair] = {}
    for folder in folders:
        sides = [None if language == ENGLISH else _texts(folder, language) for language in (source, target)]
        for key in next(side for side in sides if side is not None):
            said, translated = (_spaced(_english(key) if side is None else side.get(key, "")) for side in sides)
            if said and translated and said != translated:
                found.setdefault(_same(said), (said, translated))
    return list(found.values())


def split(found: Iterable[TextPair], *, valid: float = 0.1, test: float = 0.1, seed: int = 0) -> Split:
    """Split by source: where a pair goes is drawn from the text of its source, so that more pairs move none of these.

    Pairs of one target, compared like sources without case and space, go where the first source of these goes.

    Args:
        found: the pairs, each source once.
        valid: the share to choose with.
        test: the share to test with.
        seed: of the draw.

    Raises:
        InputError: shares that are negative or leave nothing to train on, or a source twice.

    >>> parts = split([(f"text {i}", f"Text {i // 2}") for i in range(100)])
    >>> len(parts.train), len(parts.valid), len(parts.test)
    (70, 16, 14)
    """
    if min(valid, test) < 0 or valid + test >= 1:
        raise InputError(f"valid={valid}, test={test}: shares of the pairs, together below 1, are wanted")
    found = list(found)
    if len({_same(source) for source, _ in found}) < len(found):
        raise InputError("split: a source twice, which could be trained on and tested with; `pairs` gives each once")
    by_target: dict[str, list[TextPair]] = {}
    for pair in found:
        by_target.setdefault(_same(pair[1]), []).append(pair)
    parts: tuple[list[TextPair], ...] = ([], [], [])
    for together in by_target.values():
        at = derive(seed, "split", min(_same(source) for source, _ in together)) / 2**63
        parts[2 if at < test else 1 if at < test + valid else 0].extend(together)
    return Split(*map(tuple, parts))


def read(path: Path) -> dict[str, str]:
    """The entries of one `.mo` file, source to target; the context, where there is one, before the source and `\\x04`.

    An entry with two plural forms is two, one with a single form is that of its plural. Of more forms none is given.

    Raises:
        InputError: no such file, or not a catalogue in UTF-8.
    """
    with about(path):
        try:
            data = Path(path).read_bytes()
            return dict(_entries(data))
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError("holds text that is not UTF-8") from None
        except struct.error:
            raise InputError("is cut short, or no catalogue of gettext (.mo)") from None


class Sentences(core.Configured):
    """English sentences and their translations, as texts and as ids of pieces, in the three parts of a split.

    Both languages share a byte-level BPE learned from what is trained on; its first ids are `languages`' PAD, START and
    END, none of which a pair has.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """Which, in how many different pieces; pairs of which a side has `context` pieces or more are left out."""

        language: str = "de"
        vocab_size: int = 1000
        context: int = 48  # the sentence and its end
        folders: tuple[str, ...] = ()  # with catalogues; the materials if there are none
        seed: int = 0  # of the split

    def __init__(self, config: Config) -> None:
        self.config = config
        found = pairs(ENGLISH, config.language, [Path(folder) for folder in config.folders] or None)
        parts = split(found, seed=config.seed)
        self.tokenizer = train_bpe((text for pair in parts.train for text in pair), config.vocab_size, _SPECIAL)
        kept = [self._fitting(part, config.context - 1) for part in parts]
        self.texts = Split(*(tuple(pair for pair, _ in part) for part in kept))
        self.ids = tuple([ids for _, ids in part] for part in kept)  # of train, valid and test
        self.left_out = sum(map(len, parts)) - sum(map(len, kept))

    def _fitting(self, pairs: Sequence[TextPair], most: int) -> list[tuple[TextPair, Pair]]:
        sides = (self.tokenizer.encode_batch([pair[side] for pair in pairs]) for side in (0, 1))
        ids = list(zip(*sides, strict=True))
        return [(pair, one) for pair, one in zip(pairs, ids, strict=True) if max(map(len, one)) <= most]


def _entries(data: bytes) -> Iterator[TextPair]:
    """Source and target of each entry (GNU gettext manual, "The Format of GNU MO Files")."""
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        raise InputError("is no catalogue of gettext (.mo)")
    _, count, *tables = struct.unpack_from(f"{order}4I", data, 4)
    sources, targets = (_strings(data, struct.unpack_from(f"{order}{2 * count}I", data, at)) for at in tables)
    for source, target in zip(sources, targets, strict=True):
        context, mark, plain = source.rpartition("\x04")
        ones, forms = plain.split("\0"), target.split("\0")
        if plain and len(forms) <= len(ones):
            yield from ((context + mark + one, form) for one, form in zip(ones[-len(forms) :], forms, strict=True))


def _strings(data: bytes, table: Sequence[int]) -> list[str]:
    """What a table of lengths and places points at."""
    lengths, places = table[::2], table[1::2]
    if sum(lengths) > len(data) or any(sum(one) > len(data) for one in zip(lengths, places, strict=True)):
        raise InputError("is cut short: it has less text than it tells")
    return [data[place : place + length].decode() for length, place in zip(lengths, places, strict=True)]


def _given(folders: Sequence[Path] | None) -> list[Path]:
    return [materials.path(name) for name in MATERIALS] if folders is None else list(folders)


def _files(folder: Path, language: str = "*") -> list[Path]:
    return sorted(folder.rglob(f"{language}/LC_MESSAGES/*.mo"))


def _texts(folder: Path, language: str) -> dict[tuple[str, str], str]:
    """A language's texts by catalogue, the language left out of its path, and by what they translate."""
    found: dict[tuple[str, str], str] = {}
    for path in _files(folder, language):
        place = (path.parents[2] / path.name).relative_to(folder).as_posix()
        found |= {(place, key): text for key, text in read(path).items()}
    return found


def _english(key: tuple[str, str]) -> str:
    return key[1].rpartition("\x04")[2]


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _same(text: str) -> str:
    """What two texts are compared by."""
    return _spaced(text).lower()
