"""The `tokenizer.json` of Hugging Face's `tokenizers`, looked over before that library gets it.

The library panics, aborts the process or runs without end on some files (merges outside the vocabulary, expressions
that backtrack exponentially, replacements that double a text sixty times). What can be checked cheaply is checked
here; the rest it reports itself, and `guarded` turns into one line. Holds no tokenizer of its own.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tokenizers

from allyouneed.core.errors import InputError, brief
from allyouneed.data.patterns import refusal

MOST_IDS = 1 << 24  # ids lie below
MOST_PARTS = 64  # of a normalizer, pre-tokenizer, post-processor or decoder
MOST_GROWTH = 1024  # factor by which a normalizer or decoder may lengthen a text
LONGEST_WORD = 1000  # characters of a word that WordPiece, which takes quadratic time, may look at

_KINDS = {
    "normalizer": "Sequence BertNormalizer ByteLevel Lowercase NFC NFD NFKC NFKD Nmt Precompiled Prepend Replace Strip "
    "StripAccents",
    "pre_tokenizer": "Sequence BertPreTokenizer ByteLevel CharDelimiterSplit Digits FixedLength Metaspace Punctuation "
    "Split UnicodeScripts Whitespace WhitespaceSplit",
    "post_processor": "Sequence BertProcessing ByteLevel RobertaProcessing TemplateProcessing",
    "decoder": "Sequence BPEDecoder ByteFallback ByteLevel CTC Fuse Metaspace Replace Strip WordPiece",
}
_CHILDREN = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


def build(spec: Any, name: str) -> tokenizers.Tokenizer:
    """The library's tokenizer for the JSON value of a `tokenizer.json`, once that has been looked over.

    Truncation, padding and dropout are left out: they belong to whoever makes batches, and to training.

    Raises:
        InputError: naming `name` and the field.
    """
    try:
        spec = _checked(spec)
    except _FaultError as fault:
        raise InputError(f"{name}: {fault}") from None
    except RecursionError:
        raise InputError(f"{name}: JSON nested too deeply") from None
    with guarded(name):
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for token in spec["added_tokens"]:
        if backend.token_to_id(token["content"]) != token["id"]:
            raise InputError(f"{name}: added token {brief(token['content'])} has an id that is not free: {token['id']}")
    with guarded(name):
        ids = backend.encode("A b\u00e9 1\n").ids
        backend.decode([i for i in ids if i < MOST_IDS])
    if any(backend.id_to_token(i) is None for i in ids):
        raise InputError(f"{name}: post_processor: adds an id that is not in the vocabulary")
    return backend


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Turns what the library raises, a Rust panic included, into an `InputError` of one line."""
    try:
        yield
    except (TypeError, AttributeError):  # ours: called with the wrong thing
        raise
    except Exception as error:
        raise InputError(f"{name}: {_line(error)}") from None
    except BaseException as error:  # pyo3's PanicException is no Exception, and cannot be imported
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{name}: the tokenizers library failed: {_line(error)}") from None


class _FaultError(Exception):
    """What is wrong, and where."""


def _checked(spec: Any) -> dict[str, Any]:
    fields = _dict(spec, "tokenizer.json")
    model = dict(_dict(fields.get("model"), "model"))
    kind = model.setdefault("type", _guess_type(model))
    if not isinstance(kind, str) or kind not in _MODELS:
        raise _FaultError(f"model: type {brief(kind)}; accepted: {', '.join(_MODELS)}")
    _MODELS[kind](model)
    for slot in _KINDS:
        _check_parts(fields.get(slot), slot)
    added = fields.get("added_tokens") or []
    for token in _list(added, "added_tokens"):
        if not isinstance(_dict(token, "added_tokens").get("content"), str) or not token["content"]:
            raise _FaultError("added_tokens: a token has no 'content'")
        _id(token.get("id"), f"added_tokens: {brief(token['content'])}")
    return fields | {"model": model, "added_tokens": added, "truncation": None, "padding": None}


def _guess_type(model: dict[str, Any]) -> str:
    """The type of a model in files written before they said it, GPT-2's own among them."""
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _check_bpe(model: dict[str, Any]) -> None:
    vocab = _check_vocab(model)
    _check_unknown(model, vocab, needed=False)
    model["dropout"] = None
    prefix = model.get("continuing_subword_prefix") or ""
    if not isinstance(prefix, str):
        raise _FaultError(f"model: continuing_subword_prefix is {brief(prefix)}; a string is accepted")
    for i, merge in enumerate(_list(model.get("merges"), "model: merges")):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(merge, str) and merge.startswith("#version"):
            continue
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise _FaultError(f"model: merge {i} is {brief(merge)}; two tokens are accepted")
        left, right = pair
        whole = left + right.removeprefix(prefix)
        if left not in vocab or right not in vocab or whole not in vocab or not right.startswith(prefix):
            raise _FaultError(f"model: merge {i}, {brief(merge)}, is of tokens that are not in the vocabulary")


def _check_wordpiece(model: dict[str, Any]) -> None:
    _check_unknown(model, _check_vocab(model), needed=True)
    longest = model.get("max_input_chars_per_word")
    if type(longest) is not int or not 0 < longest <= LONGEST_WORD:
        raise _FaultError(f"model: max_input_chars_per_word is {brief(longest)}; 1 to {LONGEST_WORD} is accepted")


def _check_wordlevel(model: dict[str, Any]) -> None:
    _check_unknown(model, _check_vocab(model), needed=True)


def _check_unigram(model: dict[str, Any]) -> None:
    vocab = _list(model.get("vocab"), "model: vocab")
    for i, entry in enumerate(vocab):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise _FaultError(f"model: vocab: entry {i} is {brief(entry)}; a token and its score are accepted")
        if not isinstance(entry[1], int | float) or not abs(entry[1]) < 1e30:
            raise _FaultError(f"model: vocab: token {brief(entry[0])} has the score {brief(entry[1])}")
    unknown = model.get("unk_id")
    if type(unknown) is not int or not 0 <= unknown < len(vocab):
        raise _FaultError(f"model: unk_id is {brief(unknown)}; an id of the vocabulary is accepted")


_MODELS: dict[str, Callable[[dict[str, Any]], None]] = {
    "BPE": _check_bpe,
    "WordPiece": _check_wordpiece,
    "WordLevel": _check_wordlevel,
    "Unigram": _check_unigram,
}


def _check_vocab(model: dict[str, Any]) -> dict[str, int]:
    vocab = _dict(model.get("vocab"), "model: vocab")
    owners: dict[int, str] = {}
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i < MOST_IDS:
            _id(i, f"model: vocab: {brief(token)}")
        if owners.setdefault(i, token) is not token:
            raise _FaultError(f"model: vocab: {brief(owners[i])} and {brief(token)} have the same id {i}")
    return vocab


def _check_unknown(model: dict[str, Any], vocab: dict[str, int], *, needed: bool) -> None:
    token = model.get("unk_token")
    if token is None and not needed:
        return
    if not isinstance(token, str) or token not in vocab:
        raise _FaultError(f"model: unk_token is {brief(token)}, which is not in the vocabulary")


def _check_parts(root: Any, slot: str) -> None:
    """Every part under `root`, sequences of parts included."""
    waiting, growth, seen = [root] if root is not None else [], 1, 0
    while waiting:
        part, seen = _dict(waiting.pop(), slot), seen + 1
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in _KINDS[slot].split():
            raise _FaultError(f"{slot}: type {brief(kind)}; accepted: {', '.join(_KINDS[slot].split())}")
        where = f"{slot}: {kind}"
        if kind == "Sequence":
            waiting += _list(part.get(_CHILDREN[slot]), f"{where}: {_CHILDREN[slot]}")
        elif (slot, kind) in _PARTS:
            growth *= _PARTS[slot, kind](part, where) or 1
        if seen + len(waiting) > MOST_PARTS:
            raise _FaultError(f"{slot}: more than {MOST_PARTS} parts")
        if growth > MOST_GROWTH:
            raise _FaultError(f"{slot}: lengthens a text by more than {MOST_GROWTH} times")


def _check_pattern(part: dict[str, Any], where: str) -> None:
    pattern = _dict(part.get("pattern"), f"{where}: pattern")
    expression, literal = pattern.get("Regex"), pattern.get("String")
    if len(pattern) != 1 or not isinstance(expression or literal, str) or not (expression or literal):
        raise _FaultError(f"{where}: pattern is {brief(pattern)}; a 'String' or a 'Regex' with text is accepted")
    reason = refusal(expression) if isinstance(expression, str) else None
    if reason:
        raise _FaultError(f"{where}: Regex {brief(expression)} {reason}")


def _check_replace(part: dict[str, Any], where: str) -> int:
    _check_pattern(part, where)
    if not isinstance(part.get("content"), str):
        raise _FaultError(f"{where}: content is {brief(part.get('content'))}; a string is accepted")
    return max(1, len(part["content"]))


def _check_prepend(part: dict[str, Any], where: str) -> None:
    text = part.get("prepend")
    if not isinstance(text, str) or not 0 < len(text) <= MOST_GROWTH:
        raise _FaultError(f"{where}: prepend is {brief(text)}; 1 to {MOST_GROWTH} characters are accepted")


def _check_precompiled(part: dict[str, Any], where: str) -> None:
    """A table for characters: its size in bytes, a trie of 32-bit units, and the texts they stand for."""
    try:
        table = base64.b64decode(part.get("precompiled_charsmap") or "", validate=True)
        size = int.from_bytes(table[:4], "little")
        table[4 + size :].decode()
    except (TypeError, ValueError, binascii.Error):
        raise _FaultError(f"{where}: precompiled_charsmap is not what SentencePiece writes") from None
    if size % 4 or not 1024 <= size <= len(table) - 4:
        raise _FaultError(f"{where}: precompiled_charsmap claims a trie of {size} bytes")


def _check_fixed_length(part: dict[str, Any], where: str) -> None:
    if type(part.get("length")) is not int or part["length"] < 1:
        raise _FaultError(f"{where}: length is {brief(part.get('length'))}; 1 or more is accepted")


def _check_strip(part: dict[str, Any], where: str) -> None:
    start, stop = part.get("start"), part.get("stop")
    if type(start) is not int or not 0 <= start <= MOST_GROWTH or type(stop) is not int or stop != 0:
        raise _FaultError(f"{where}: start {brief(start)}, stop {brief(stop)}; a small start and stop 0 are accepted")


def _check_template(part: dict[str, Any], where: str) -> None:
    known = _dict(part.get("special_tokens"), f"{where}: special_tokens")
    for side, sequences in (("single", ["A"]), ("pair", ["A", "B"])):
        pieces = _list(part.get(side), f"{where}: {side}")
        if len(pieces) > MOST_PARTS:
            raise _FaultError(f"{where}: {side} has more than {MOST_PARTS} pieces")
        for piece in pieces:
            kind, fields = next(iter(_dict(piece, f"{where}: {side}").items()), (None, None))
            choices: Any = {"SpecialToken": known, "Sequence": sequences}.get(str(kind), ())
            if not isinstance(fields, dict) or str(fields.get("id")) not in choices:
                raise _FaultError(f"{where}: {side} has the piece {brief(piece)}, which is not defined")


_PARTS: dict[tuple[str, str], Callable[[dict[str, Any], str], int | None]] = {
    ("normalizer", "Replace"): _check_replace,
    ("normalizer", "Prepend"): _check_prepend,
    ("normalizer", "Precompiled"): _check_precompiled,
    ("pre_tokenizer", "Split"): _check_pattern,
    ("pre_tokenizer", "FixedLength"): _check_fixed_length,
    ("post_processor", "TemplateProcessing"): _check_template,
    ("decoder", "Replace"): _check_replace,
    ("decoder", "Strip"): _check_strip,
}


def _dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _FaultError(f"{where}: is {brief(value)}; an object is accepted")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _FaultError(f"{where}: is {brief(value)}; a list is accepted")
    return value


def _id(value: Any, where: str) -> None:
    if type(value) is not int or not 0 <= value < MOST_IDS:
        raise _FaultError(f"{where}: id {brief(value)}; 0 to {MOST_IDS - 1} is accepted")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
