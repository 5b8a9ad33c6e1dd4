"""Vocabularies in whatever form they come – GGUF metadata, tiktoken ranks, 256 bytes – as `tokenizer.json` values.

Four kinds: byte-level BPE (GPT-2), whose tokens spell bytes with printable characters; SentencePiece's BPE
(LLaMA), whose tokens spell text with "▁" for a space and fall back to bytes; its unigram (T5); and WordPiece (BERT),
which takes the longest piece that fits, "##" marking those that continue a word. Tokenises nothing itself.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from allyouneed.core.errors import InputError, unknown
from allyouneed.data.tokenizer_json import MOST_IDS

T = TypeVar("T")
D = TypeVar("D")

LONGEST_TOKEN = 512  # characters; recovering merges looks at every place where a token can be cut
MOST_RANKS_BYTES = 64 << 20

# How text is cut into words before merging. None is GPT-2's expression, which the tokenizers library brings along.
SPLITS: dict[str, str | None] = {
    "gpt2": None,
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}

# GGUF's names for the same. `smollm` is as transformers reads it; the original also isolates digits, which differs
# where several spaces or a line break stand before one.
_GGUF_SPLITS = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "smollm": "gpt2",
    "olmo": "gpt2",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "smaug-bpe": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type


class Metadata(Protocol):
    """What is asked of an opened GGUF file."""

    path: Path

    def need(self, key: str, kind: type[T]) -> T:
        """The value under `key`, or an `InputError`."""

    def find(self, key: str, kind: type[T], default: D) -> T | D:
        """The value under `key`, or `default` where there is none."""


def byte_characters() -> list[str]:
    """The character that spells each byte in a byte-level vocabulary: itself where printable, else from U+0100 on.

    >>> byte_characters()[65], byte_characters()[32]
    ('A', 'Ġ')
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_level(
    vocab: Mapping[str, int],
    merges: Sequence[Any],
    *,
    split: str | None,
    added: Sequence[dict[str, Any]] = (),
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    whole_words: bool = False,
) -> dict[str, Any]:
    """A byte-level BPE. `split` names one of `SPLITS`, or is None for no cutting into words.

    `prefix` and `suffix` are the ids that `add_special_tokens` puts around a text. `whole_words` takes a word that is
    itself a token as that token, without merging.
    """
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pre_tokenizer: dict[str, Any] = bytes_only
    if split is not None and SPLITS[split] is None:
        pre_tokenizer = bytes_only | {"use_regex": True}
    elif split is not None:
        cut = {"type": "Split", "pattern": {"Regex": SPLITS[split]}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [cut, bytes_only]}
    model = {"type": "BPE", "vocab": dict(vocab), "merges": list(merges), "ignore_merges": whole_words}
    return _spec(model, None, pre_tokenizer, bytes_only, added, _template(vocab, added, prefix, suffix))


def unigram(
    vocab: Sequence[Sequence[Any]], *, unknown: int, special: Sequence[str] = (), end: str | None = None
) -> dict[str, Any]:
    """SentencePiece's unigram: tokens and their log-probabilities, "▁" for the space before a word.

    `special` are tokens of `vocab` found in a text before anything else; `end` is what `add_special_tokens` puts after
    it.
    """
    ids = {entry[0]: i for i, entry in enumerate(vocab)}
    model = {"type": "Unigram", "vocab": [list(entry) for entry in vocab], "unk_id": unknown, "byte_fallback": False}
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    words = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]}
    added = [_added(ids[token], token) for token in special]
    return _spec(model, {"type": "NFKC"}, words, spaces, added, _template(ids, added, [], [ids[end]] if end else []))


def of_bytes(special_tokens: Sequence[str]) -> dict[str, Any]:
    """The 256 bytes, each its own id, and `special_tokens` from 256 on."""
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    return byte_level(vocab, [], split=None, added=added_tokens(special_tokens, first=256))


def of_words(words: Sequence[str], special: str, unknown: str) -> dict[str, Any]:
    """Words between spaces as ids: `special` is 0, what is in none of them `unknown`, 1, and the words follow."""
    model = {
        "type": "WordLevel",
        "unk_token": unknown,
        "vocab": {w: i for i, w in enumerate((special, unknown, *words))},
    }
    return _spec(model, None, {"type": "WhitespaceSplit"}, None, [_added(0, special)], None)


def wordpiece(vocab: Mapping[str, int], special_tokens: Sequence[str], lowercase: bool) -> dict[str, Any]:
    """BERT's word pieces: text cleaned and cut at spaces and punctuation, Chinese characters apart, accents dropped
    with the case; [CLS] before and [SEP] after each sentence, where the vocabulary has both.
    """
    added = [_added(vocab[token], token) for token in special_tokens]
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": dict(vocab),
    }
    ends = _template(vocab, added, [vocab["[CLS]"]], [vocab["[SEP]"]]) if {"[CLS]", "[SEP]"} <= vocab.keys() else None
    if ends is not None:  # one [CLS] for both sentences
        ends["pair"] = ends["single"] + ends["pair"][len(ends["single"]) + 1 :]
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    return _spec(model, normalizer | {"lowercase": lowercase}, {"type": "BertPreTokenizer"}, decoder, added, ends)


def from_gguf(file: Metadata) -> dict[str, Any]:
    """The tokenizer in a GGUF's metadata (`tokenizer.ggml.*`)."""
    model = file.need("tokenizer.ggml.model", str)
    tokens = file.need("tokenizer.ggml.tokens", list)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise InputError(f"{file.path}: metadata 'tokenizer.ggml.tokens' holds {twice[:60]!r} twice")
    prefix = _ids_added(file, "bos", model == "llama", len(tokens))
    suffix = _ids_added(file, "eos", False, len(tokens))
    added = _added_in_gguf(file, tokens)
    if model == "llama":
        return _sentencepiece(file, tokens, vocab, added=added, prefix=prefix, suffix=suffix)
    if model != "gpt2":
        raise InputError(f"{file.path}: metadata 'tokenizer.ggml.model' is {model[:60]!r}; accepted: gpt2, llama")
    split = file.find("tokenizer.ggml.pre", str, "default")
    if split not in _GGUF_SPLITS:
        raise unknown(f"tokenizer.ggml.pre in {file.path}:", split[:60], _GGUF_SPLITS)
    return byte_level(vocab, _merges(file), split=_GGUF_SPLITS[split], added=added, prefix=prefix, suffix=suffix)


def gguf_id(file: Metadata, role: str, size: int) -> int | None:
    """The id of a token's role (`bos`, `eos`, `padding` …), None where the file names none."""
    key = f"tokenizer.ggml.{role}_token_id"
    value = file.find(key, int, None)
    if value is not None and not 0 <= value < size:
        raise InputError(f"{file.path}: metadata {key!r} is {value}; ids below {size} are accepted")
    return value


def from_ranks(data: bytes, name: str, split: str, special_tokens: Sequence[str]) -> dict[str, Any]:
    """A tiktoken file: lines of a token's bytes in base64 and its rank, which is its id and its turn in merging."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    ranks = _read_ranks(data, name)
    spelling = byte_characters()

    def spell(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    merges = [cut for token in sorted(ranks, key=ranks.__getitem__) if (cut := _last_merge(token, ranks))]
    vocab = {spell(token): rank for token, rank in ranks.items()}
    added = added_tokens(special_tokens, first=max(ranks.values()) + 1)
    pairs = [[spell(left), spell(right)] for left, right in merges]
    return byte_level(vocab, pairs, split=split, added=added, whole_words=True)


def added_tokens(contents: Sequence[str], *, first: int) -> list[dict[str, Any]]:
    """Special tokens with ids from `first` on, found in a text before anything else."""
    return [_added(first + i, content) for i, content in enumerate(contents)]


def _added(i: int, content: str, *, special: bool = True) -> dict[str, Any]:
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, "special": special} | rules


def _spec(
    model: dict[str, Any],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any],
    decoder: dict[str, Any] | None,
    added: Sequence[dict[str, Any]],
    post_processor: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False} | model,
    }


def _template(
    vocab: Mapping[str, int], added: Sequence[dict[str, Any]], prefix: Sequence[int], suffix: Sequence[int]
) -> dict[str, Any] | None:
    """The post-processor that puts `prefix` and `suffix` around a text."""
    if not prefix and not suffix:
        return None
    names = {i: token for token, i in vocab.items()} | {token["id"]: token["content"] for token in added}

    def side(sequence: str, type_id: int) -> list[dict[str, Any]]:
        ends = [[{"SpecialToken": {"id": names[i], "type_id": type_id}} for i in ids] for ids in (prefix, suffix)]
        return [*ends[0], {"Sequence": {"id": sequence, "type_id": type_id}}, *ends[1]]

    tokens = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in (*prefix, *suffix)}
    return {
        "type": "TemplateProcessing",
        "single": side("A", 0),
        "pair": side("A", 0) + side("B", 1),
        "special_tokens": tokens,
    }


def _added_in_gguf(file: Metadata, tokens: list[str]) -> list[dict[str, Any]]:
    kinds = file.find("tokenizer.ggml.token_type", np.ndarray, np.ones(len(tokens), np.int32))
    if len(kinds) != len(tokens):
        raise InputError(
            f"{file.path}: metadata 'tokenizer.ggml.token_type' has {len(kinds)} entries for {len(tokens)} tokens"
        )
    chosen = np.flatnonzero(np.isin(kinds, (_UNKNOWN, _CONTROL, _USER_DEFINED)))
    return [_added(int(i), tokens[i], special=bool(kinds[i] != _USER_DEFINED)) for i in chosen]


def _ids_added(file: Metadata, role: str, default: bool, size: int) -> list[int]:
    token = gguf_id(file, role, size)
    return [token] if token is not None and file.find(f"tokenizer.ggml.add_{role}_token", bool, default) else []


def _merges(file: Metadata) -> list[str]:
    """Pairs of tokens with a space between: the file's own strings, which are nowhere made into lists of two."""
    merges: list[str] = file.need("tokenizer.ggml.merges", list)
    wrong = next((merge for merge in merges if merge.count(" ") != 1), None)
    if wrong is not None:
        raise InputError(f"{file.path}: metadata 'tokenizer.ggml.merges' holds {wrong[:60]!r}; two tokens are accepted")
    return merges


def _sentencepiece(
    file: Metadata,
    tokens: list[str],
    vocab: dict[str, int],
    *,
    added: list[dict[str, Any]],
    prefix: list[int],
    suffix: list[int],
) -> dict[str, Any]:
    space_first = file.find("tokenizer.ggml.add_space_prefix", bool, True)
    unknown_id = gguf_id(file, "unknown", len(tokens))
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": _merges_by_score(file, tokens, vocab),
        "unk_token": None if unknown_id is None else tokens[unknown_id],
        "fuse_unk": True,
        "byte_fallback": True,
    }
    scheme = "first" if space_first else "never"
    words = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_first else []
    decoder = {"type": "Sequence", "decoders": steps}
    return _spec(model, None, words, decoder, added, _template(vocab, added, prefix, suffix))


def _merges_by_score(file: Metadata, tokens: list[str], vocab: dict[str, int]) -> list[list[str]]:
    """Every cut of a token into two tokens, the better scores first: the order SentencePiece joins them in."""
    scores = file.need("tokenizer.ggml.scores", np.ndarray).astype(np.float64)
    if len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise InputError(f"{file.path}: metadata 'tokenizer.ggml.scores' is not one finite number for each token")
    cuts: list[tuple[float, int, int, int, int]] = []
    for token, score in zip(tokens, scores.tolist(), strict=True):
        if len(token) > LONGEST_TOKEN:
            raise InputError(f"{file.path}: token {token[:60]!r}... has {len(token)} characters, over {LONGEST_TOKEN}")
        for i in range(1, len(token)):
            left, right = vocab.get(token[:i]), vocab.get(token[i:])
            if left is not None and right is not None:
                cuts.append((-score, -i, i - len(token), left, right))
    cuts.sort(key=lambda cut: cut[:3])
    return [[tokens[left], tokens[right]] for *_, left, right in cuts]


def _read_ranks(data: bytes, name: str) -> dict[bytes, int]:
    if len(data) > MOST_RANKS_BYTES:
        raise InputError(f"{name}: {len(data)} bytes, more than the {MOST_RANKS_BYTES} such a file may have")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            text, rank = line.split()
            token, value = base64.b64decode(text, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{name}: line {number} is not a token in base64 and its rank") from None
        if token in ranks or not 0 < len(token) <= LONGEST_TOKEN or not 0 <= value < MOST_IDS:
            raise InputError(f"{name}: line {number} has a token twice, an empty or a huge one, or a rank out of range")
        ranks[token] = value
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise InputError(f"{name}: byte {missing} has no rank; every byte needs one")
    return ranks


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that merging makes `token` of; None for a byte, and for a token no merging leads to."""
    cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
    possible = [(left, right) for left, right in cuts if left in ranks and right in ranks]
    if len(possible) < 2:
        return possible[0] if possible else None
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(left + right, MOST_IDS), i) for i, (left, right) in enumerate(pairwise(parts)))
        if rank >= ranks[token]:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
