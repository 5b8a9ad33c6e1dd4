"""Sentences out of gettext catalogues: reading them, pairing languages, splitting, and translating what they hold."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError
from allyouneed.data import catalogues
from allyouneed.data.catalogues import Sentences
from allyouneed.data.languages import END, PAD, START
from allyouneed.papers import attention
from allyouneed.papers.base import Report

HEADER = {"": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=__import__('os').abort();\n"}


def mo(entries: Mapping[str, str], order: str = "<") -> bytes:
    """What `msgfmt` writes of these entries, without the hash table that readers may leave alone."""
    sides = [[text.encode() for text in side] for side in zip(*sorted(entries.items()), strict=True)]
    start = 28 + 16 * len(entries)
    tables, texts = b"", b""
    for side in sides:
        for text in side:
            tables += struct.pack(f"{order}2I", len(text), start + len(texts))
            texts += text + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, start)
    return head + tables + texts


def write(folder: Path, place: str, entries: Mapping[str, str]) -> None:
    path = folder / place / "LC_MESSAGES" / "django.mo"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mo(HEADER | entries))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "core/locale/en", {})
    write(
        tmp_path,
        "core/locale/de",
        {
            "Save": "Sichern",
            "%(count)s  item\nin <b>%(name)s</b>": "  %(count)s Eintrag in <b>%(name)s</b>\n",
            "month name\x04May": "Mai",
            "Name": "Name",
            "Nothing": "",
            "%d day\0%d days": "%d Tag\0%d Tage",
        },
    )
    write(
        tmp_path,
        "core/locale/fr",
        {"Save": "Enregistrer", "month name\x04May": "mai", "%d day\0%d days": "%d jour\0%d jours", "Name": "Nom"},
    )
    write(tmp_path, "core/locale/ja", {"Save": "保存", "%d day\0%d days": "%d 日"})
    write(tmp_path, "core/locale/pl", {"Save": "Zapisz", "%d day\0%d days": "%d dzień\0%d dni\0%d dnia"})
    write(tmp_path, "more/locale/de", {"SAVE": "Speichern", "May": "Darf"})
    return tmp_path


def test_pairs_of_english_and_another_language(folder: Path) -> None:
    assert set(catalogues.pairs("en", "de", [folder])) == {
        ("Save", "Sichern"),  # as said first; the same in capitals is left out
        ("%(count)s item in <b>%(name)s</b>", "%(count)s Eintrag in <b>%(name)s</b>"),
        ("May", "Mai"),
        ("%d day", "%d Tag"),
        ("%d days", "%d Tage"),
    }
    assert set(catalogues.pairs("de", "en", [folder])) >= {("Sichern", "Save"), ("Speichern", "SAVE"), ("Darf", "May")}


def test_pairs_of_two_others_meet_in_what_they_translate(folder: Path) -> None:
    assert set(catalogues.pairs("fr", "de", [folder])) == {
        ("Enregistrer", "Sichern"),
        ("mai", "Mai"),
        ("%d jour", "%d Tag"),
        ("%d jours", "%d Tage"),
        ("Nom", "Name"),
    }


def test_plurals_of_one_form_and_of_three(folder: Path) -> None:
    assert set(catalogues.pairs("en", "ja", [folder])) == {("Save", "保存"), ("%d days", "%d 日")}
    assert catalogues.pairs("en", "pl", [folder]) == [("Save", "Zapisz")]


def test_languages_that_are_not_there(folder: Path) -> None:
    assert catalogues.languages([folder]) == ["de", "en", "fr", "ja", "pl"]
    with pytest.raises(InputError, match="unknown language 'dee'; did you mean 'de'"):
        catalogues.pairs("en", "dee", [folder])
    with pytest.raises(InputError, match="two languages are wanted"):
        catalogues.pairs("de", "de", [folder])


def test_either_byte_order(tmp_path: Path) -> None:
    (tmp_path / "little.mo").write_bytes(mo(HEADER | {"Save": "Sichern"}))
    (tmp_path / "big.mo").write_bytes(mo(HEADER | {"Save": "Sichern"}, ">"))
    read = [catalogues.read(tmp_path / name) for name in ("little.mo", "big.mo")]
    assert read == [{"Save": "Sichern"}] * 2


def test_a_damaged_catalogue_is_one_line(tmp_path: Path) -> None:
    whole, path = mo({"Save": "Sichern", "Open": "Öffnen"}), tmp_path / "bad.mo"
    bad = {cut: whole[:cut] for cut in range(len(whole) - 1)}  # the last byte is no text
    bad |= {-1: b"PK\x03\x04" + whole[4:], -2: whole.replace("Ö".encode(), b"\xff\xfe")}
    huge = struct.pack("<I", 2**31)
    bad |= {-3: whole[:8] + huge + whole[12:], -4: whole[:28] + huge + whole[32:], -5: whole[:16] + huge + whole[20:]}
    for data in bad.values():
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"bad\.mo: (is|holds) ") as error:
            catalogues.read(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"none\.mo: cannot be read: No such file"):
        catalogues.read(tmp_path / "none.mo")


def test_the_materials_hold_as_many_pairs_as_is_told() -> None:
    assert {"de", "fr", "ja", "pt_BR"} <= set(catalogues.languages())
    pairs = catalogues.pairs("en", "de")
    assert len(pairs) == 2516
    assert ("Enter a valid URL.", "Bitte eine gültige Adresse eingeben.") in pairs
    assert list(map(len, catalogues.split(pairs))) == [2006, 248, 262]


def test_nothing_is_in_two_parts() -> None:
    pairs = [(f"Text {i}", f"{'TEXT' if i % 2 else 'Text'}  nummer {i // 4}") for i in range(2000)]
    parts = catalogues.split(pairs)
    assert sorted(pair for part in parts for pair in part) == sorted(pairs)
    for side in (0, 1):
        seen = [{" ".join(pair[side].lower().split()) for pair in part} for part in parts]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert all(150 < len(part) < 250 for part in parts[1:])
    assert catalogues.split(pairs) == parts != catalogues.split(pairs, seed=1)


def test_more_pairs_move_none_of_these() -> None:
    pairs = [(f"text {i}", f"Text {i}") for i in range(500)]
    few, many = catalogues.split(pairs[:100]), catalogues.split(pairs)
    assert all(set(one) <= set(other) for one, other in zip(few, many, strict=True))


def test_what_cannot_be_split() -> None:
    with pytest.raises(InputError, match=r"valid=0.5, test=0.5"):
        catalogues.split([("a", "b")], valid=0.5, test=0.5)
    with pytest.raises(InputError, match="a source twice"):
        catalogues.split([("a", "b"), (" A", "c")])


@pytest.fixture
def sentences(tmp_path: Path) -> Sentences:
    adjectives = {"old": "alt", "new": "neu", "big": "groß", "red": "rot", "good": "gut", "last": "letzt"}
    nouns = {"page": "Seite", "file": "Datei", "list": "Liste", "word": "Sprache", "user": "Person", "key": "Taste"}
    entries = {f"{a} {n}": f"{x}e {y}" for a, x in adjectives.items() for n, y in nouns.items()}
    write(tmp_path, "locale/de", entries | {"long " * 60: "lang " * 60})
    return Sentences.Config(vocab_size=320, context=16, folders=(str(tmp_path),)).build()


def test_sentences_as_ids(sentences: Sentences) -> None:
    assert Config.from_json(sentences.config.to_json()) == sentences.config
    assert sum(map(len, sentences.ids)) == 36 and sentences.left_out == 1
    for texts, ids in zip(sentences.texts, sentences.ids, strict=True):
        assert [tuple(map(sentences.tokenizer.decode, pair)) for pair in ids] == list(texts)
        assert not {PAD, START, END} & {i for pair in ids for side in pair for i in side}
    assert [sentences.tokenizer.token(i) for i in (PAD, START, END)] == ["<pad>", "<start>", "<end>"]


def test_the_attention_paper_translates_them(sentences: Sentences, tmp_path: Path) -> None:
    config = attention.PAPER.sizes["smoke"]
    real = attention.Real(sentences=sentences.config, training=config.training.replace(steps=2), shown=2)
    report = Report(slug="attention", seeds=[0], folder=tmp_path / "run", evidence="small world", quiet=True)
    rates = {attention.BASE: 3e-3, attention.LSTM: 3e-3}
    attention._translate_real(config, real, sentences, report, rates)
    scores, shown = report.tables
    assert [row["arm"] for row in scores["rows"]] == ["Transformer, de", "LSTM with attention, de"]
    assert set(shown["rows"][0]) == {"source", "reference", "Transformer, de", "LSTM with attention, de"}
    assert f"{len(sentences.ids[0])} pairs to train on" in report.notes[0]
    assert not report.checks
