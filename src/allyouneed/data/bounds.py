"""How few tokens a text can have, found without tokenising it: so that one which is far too long need not be.

Told of vocabularies that keep text: byte-level ones, and those with a token for every byte. Others drop spaces, or take
a word of any length for one unknown token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from allyouneed.data.vocabularies import byte_characters

COMPOSED = 4  # code points that NFC makes one of, at most (Unicode Standard Annex 15, sec. 8: growth of NFD)
KEEP_ALL = ("ByteLevel", "Digits", "Metaspace")  # pre-tokenizers
CONTINUING = range(0x80, 0xC0)  # bytes that every character beyond ASCII has


@dataclass(frozen=True)
class Bound:
    """A token stands for `longest` characters at most, and for these `dropped` ones there is none.

    >>> Bound(4, "!").least("what!!!!!")
    1
    """

    longest: int
    dropped: str

    def least(self, text: str) -> int:
        """As many tokens a text has at least."""
        kept = len(text) - sum(map(text.count, self.dropped))
        return -(-kept // self.longest)


def bound(spec: Mapping[str, Any]) -> Bound | None:
    """Of the vocabulary of a `tokenizer.json`; None: there may be no such bound."""
    added, model = spec["added_tokens"], spec["model"]
    dropped, shrunk = _dropped(model, spec["pre_tokenizer"]), _shrunk(spec["normalizer"])
    if shrunk is None or dropped is None or not _keeps(spec["pre_tokenizer"]):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in added):  # it takes all spaces beside it, too
        return None
    return Bound(shrunk * max(map(len, [*model["vocab"], *(token["content"] for token in added)])), dropped)


def _shrunk(part: Mapping[str, Any] | None) -> int | None:
    """How many characters a normalizer makes one of, at most."""
    match part:
        case None | {"type": "Prepend" | "NFD"}:
            return 1
        case {"type": "NFC"}:
            return COMPOSED
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return 1 if len(content) >= len(pattern) and not _controls(content) else None
        case {"type": "Sequence", "normalizers": list(parts)}:
            found = [_shrunk(one) for one in parts]
            return None if None in found else prod(one for one in found if one is not None)
    return None


def _controls(text: str) -> bool:
    """Whether a text has characters that may have no token."""
    return any(character < " " or character == "\x7f" for character in text)


def _keeps(part: Mapping[str, Any] | None) -> bool:
    """Whether a pre-tokenizer leaves nothing out."""
    match part:
        case {"type": "Split", "behavior": behavior}:
            return bool(behavior != "Removed")
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return all(map(_keeps, parts))
    return part is None or part["type"] in KEEP_ALL


def _dropped(model: Mapping[str, Any], part: Mapping[str, Any] | None) -> str | None:
    """The characters of which no token is made: control characters at most, or there is no bound."""
    if model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return None
    if model["byte_fallback"]:
        return "" if all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)) else None
    if not _by_bytes(part):
        return None
    missing = [byte for byte, character in enumerate(byte_characters()) if character not in model["vocab"]]
    found = "".join(chr(byte) for byte in missing if byte < CONTINUING.start)
    return found if all(map(_controls, found)) and not set(missing) & set(CONTINUING) else None


def _by_bytes(part: Mapping[str, Any] | None) -> bool:
    """Whether a pre-tokenizer spells bytes with characters."""
    parts = part["pretokenizers"] if part is not None and part["type"] == "Sequence" else [part]
    return any(one is not None and one["type"] == "ByteLevel" for one in parts)
