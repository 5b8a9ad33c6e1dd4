"""What each token of a vocabulary writes, in bytes: what a grammar over texts needs to know of tokens.

Byte-level vocabularies spell bytes with printable characters, those of SentencePiece have tokens that stand for one
byte, and the others are asked: a token writes what decoding it after another one adds. Tokenises nothing itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from allyouneed.core.errors import InputError
from allyouneed.data.vocabularies import byte_characters

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NEEDED = {*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)}  # the bytes of usual characters


@dataclass(frozen=True)
class Spelling:
    """`writes[i]` is what token i writes within a text, None where it writes nothing (special tokens, ids that are
    none). With `drops_space` the space that a text begins with is left out when it is decoded, as SentencePiece does.
    """

    writes: tuple[bytes | None, ...]
    drops_space: bool

    @property
    def alphabet(self) -> bytes:
        """The bytes that are tokens of their own: any text of these can be written, and gone on with from any place."""
        return bytes(sorted({token[0] for token in self.writes if token is not None and len(token) == 1}))

    @property
    def complete(self) -> bool:
        """Whether the alphabet has all but control characters and the planes of Unicode that are not in use."""
        return set(self.alphabet) >= _NEEDED


def spelling(backend: Any, silent: set[int]) -> Spelling:
    """How the vocabulary of a `tokenizers.Tokenizer` spells; the ids in `silent` write nothing.

    Raises:
        InputError: what a token writes depends on what comes after it (GPT-1's vocabulary).
    """
    tokens = {i: token for token, i in backend.get_vocab().items() if i not in silent}
    size = max(backend.get_vocab().values(), default=-1) + 1
    decoder = json.loads(backend.to_str())["decoder"] or {}
    if decoder.get("type") == "ByteLevel":
        found = {i: _from_characters(token) for i, token in tokens.items()}
        return Spelling(tuple(found.get(i) or None for i in range(size)), drops_space=False)
    fallback = "ByteFallback" in json.dumps(decoder)
    single = {i: bytes([int(m[1], 16)]) for i, t in tokens.items() if fallback and (m := _BYTE.fullmatch(t))}
    asked = [i for i in tokens if i not in single]
    within, first = _decoded(backend, asked, tokens)
    found = single | {i: text.encode() for i, text in zip(asked, within, strict=True)}
    drops = any(text == " " + alone for text, alone in zip(within, first, strict=True))
    return Spelling(tuple(found.get(i) or None for i in range(size)), drops)


def _from_characters(token: str) -> bytes:
    """The bytes that a byte-level token spells; one with other characters (an added token) is its own text."""
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


_BYTES = {character: byte for byte, character in enumerate(byte_characters())}


def _decoded(backend: Any, asked: Sequence[int], tokens: dict[int, str]) -> tuple[list[str], list[str]]:
    """What each of the tokens `asked` writes after another one, and alone."""
    anchor = next((i for i in asked if re.fullmatch(r"▁?[a-zA-Z]+", tokens[i])), None)
    if anchor is None:
        raise InputError("the vocabulary has no token of plain letters")
    before = backend.decode([anchor], skip_special_tokens=False)
    rows = [[anchor, i] for i in asked]
    within = [text[len(before) :] for text in backend.decode_batch(rows, skip_special_tokens=False)]
    after = backend.decode_batch([[*row, anchor] for row in rows], skip_special_tokens=False)
    if not all(text.startswith(before + one) for text, one in zip(after, within, strict=True)):
        raise InputError("what a token of this vocabulary writes depends on the token after it")
    return within, backend.decode_batch([[i] for i in asked], skip_special_tokens=False)
