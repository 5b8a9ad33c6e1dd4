"""How many characters one token can stand for at most, so that a text that is far too long need not be tokenised.

Told of vocabularies that keep all of a text only: byte-level ones, and those with a token for every byte. Others drop
spaces, or take a word of any length for one unknown token.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from allyouneed.data.vocabularies import byte_characters

COMPOSED = 4  # code points that NFC makes one of, at most (Unicode Standard Annex 15, sec. 8: growth of NFD)
KEEP_ALL = ("ByteLevel", "Digits", "Metaspace")  # pre-tokenizers


def longest(spec: Mapping[str, Any]) -> int | None:
    """The most characters of a text that a token of the `tokenizer.json` stands for; None: there may be no bound.

    >>> from allyouneed.data.tokenizers import byte_tokenizer
    >>> import json
    >>> longest(json.loads(byte_tokenizer(["<|end|>"])._backend.to_str()))
    7
    """
    added, model = spec["added_tokens"], spec["model"]
    shrunk = _shrunk(spec["normalizer"])
    if shrunk is None or not _keeps(spec["pre_tokenizer"]) or not _complete(model, spec["pre_tokenizer"]):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in added):  # it takes all spaces beside it, too
        return None
    return shrunk * max(map(len, [*model["vocab"], *(token["content"] for token in added)]))


def _shrunk(part: Mapping[str, Any] | None) -> int | None:
    """How many characters a normalizer makes one of, at most."""
    match part:
        case None | {"type": "Prepend" | "NFD"}:
            return 1
        case {"type": "NFC"}:
            return COMPOSED
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return 1 if len(content) >= len(pattern) else None
        case {"type": "Sequence", "normalizers": list(parts)}:
            found = [_shrunk(one) for one in parts]
            return None if None in found else prod(one for one in found if one is not None)
    return None


def _keeps(part: Mapping[str, Any] | None) -> bool:
    """Whether a pre-tokenizer leaves nothing out."""
    match part:
        case {"type": "Split", "behavior": behavior}:
            return bool(behavior != "Removed")
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return all(map(_keeps, parts))
    return part is None or part["type"] in KEEP_ALL


def _complete(model: Mapping[str, Any], part: Mapping[str, Any] | None) -> bool:
    """Whether each character has a token of its own, or several."""
    if model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return False
    if model["byte_fallback"]:
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    return _by_bytes(part) and all(character in model["vocab"] for character in byte_characters())


def _by_bytes(part: Mapping[str, Any] | None) -> bool:
    """Whether a pre-tokenizer spells bytes with characters."""
    parts = part["pretokenizers"] if part is not None and part["type"] == "Sequence" else [part]
    return any(one is not None and one["type"] == "ByteLevel" for one in parts)
