"""Text to ids and back: one class over the `tokenizers` library, however the vocabulary comes.

Holds encoding, decoding, special ids, and the Hugging Face layout both ways. What a vocabulary looks like in GGUF or
tiktoken files is `data.vocabularies`' business, what may be wrong with a `tokenizer.json` is `data.tokenizer_json`'s,
what stands beside it `data.tokenizer_config`'s, how text grows as a model writes `data.streams`', and how talk becomes
text `data.chat`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from allyouneed.core.errors import InputError
from allyouneed.core.files import read_json, read_text, write_json, write_text
from allyouneed.data import bounds, vocabularies
from allyouneed.data.spelling import Spelling, spelling
from allyouneed.data.streams import Stream
from allyouneed.data.tokenizer_config import chat_template, read_object
from allyouneed.data.tokenizer_json import build, guarded

END_OF_TEXT = "<|endoftext|>"
BERT_TOKENS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
)  # what `tokenizer_training.train_wordpiece` begins its vocabulary with


class Tokenizer:
    """A vocabulary with its rules.

    `vocab_size` is one more than the largest id. `bos_id`, `eos_ids` (any of which ends a text) and `pad_id` are what
    the vocabulary says of them, and so are `cls_id`, `sep_id` and `mask_id`, which begin a text, end each of its
    sentences and stand for a hidden token in vocabularies like BERT's; `chat_template` is the Jinja template of its
    conversations.

    >>> tokenizer = byte_tokenizer()
    >>> tokenizer.encode("Hi"), tokenizer.decode([72, 105, 256]), tokenizer.vocab_size
    ([72, 105], 'Hi', 257)
    """

    def __init__(
        self,
        spec: Any,
        *,
        name: str = "tokenizer",
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        cls_id: int | None = None,
        sep_id: int | None = None,
        mask_id: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        """`spec` is the JSON value of a `tokenizer.json`; `name` stands in messages.

        Raises:
            InputError: the specification is wrong, or an id is not in the vocabulary.
        """
        self.name, self.chat_template = name, chat_template
        self._backend = build(spec, name)
        self._special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        vocab = self._backend.get_vocab()
        self._bytes = {vocab[token] for token in (f"<0x{byte:02X}>" for byte in range(256)) if token in vocab}
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.bos_id, self.eos_ids, self.pad_id = bos_id, tuple(dict.fromkeys(eos_ids)), pad_id
        self.cls_id, self.sep_id, self.mask_id = cls_id, sep_id, mask_id
        self._check(i for i in (bos_id, *self.eos_ids, pad_id, cls_id, sep_id, mask_id) if i is not None)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name}, vocab_size={self.vocab_size})"

    @property
    def identity(self) -> str:
        """In short, which ids it makes of a text, which text of ids, and what ends one."""
        ends = (self.bos_id, *self.eos_ids)
        return hashlib.sha256(f"{self._backend.to_str()}{self.chat_template}{ends}".encode()).hexdigest()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of `text`. Special tokens written out in it become their ids.

        `add_special_tokens` puts around it what the vocabulary's rules say (often a beginning-of-text token, or none).

        Raises:
            InputError: `text` holds half a surrogate pair, which no encoding has.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = False, most: int | None = None
    ) -> list[list[int]]:
        """The ids of each text; of a text with more than `most`, special tokens included, the end is left out."""
        self._check_texts(texts)
        with guarded(self.name):
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            rows = [encoding.ids for encoding in found]
            for i, row in enumerate(rows):
                if most is not None and len(row) > most:
                    rows[i] = self._shortened(texts[i], add_special_tokens, most)
        return rows

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], *, most: int | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """The ids of each two sentences with their special tokens, and the kind of each token: 0 in the first, 1 in
        the second. Where they are more than `most`, the longer sentence loses its end, token by token.
        """
        self._check_texts([text for pair in pairs for text in pair])
        with guarded(self.name):
            backend, found = self._backend, []
            for first, second in pairs:
                sides = [backend.encode(text, add_special_tokens=False) for text in (first, second)]
                if most is not None:
                    _shorten(sides, most - backend.num_special_tokens_to_add(True))
                whole = backend.post_process(sides[0], sides[1], True)
                found.append((whole.ids, whole.type_ids))
        return found

    def locate(self, text: str, pair: str) -> tuple[list[int], list[int], list[tuple[int, int] | None]]:
        """As `encode_pairs` for one pair, and for each token of the second text the characters (first, end) it stands
        for; None for all others.
        """
        self._check_texts([text, pair])
        with guarded(self.name):
            whole = self._backend.encode(text, pair, add_special_tokens=True)
        of = whole.sequence_ids
        return whole.ids, whole.type_ids, [p if of[i] == 1 else None for i, p in enumerate(whole.offsets)]

    def places(self, text: str, *, add_special_tokens: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text` and the characters (first, end) that each stands for; of added tokens none, (0, 0)."""
        self._check_texts([text])
        with guarded(self.name):
            whole = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return whole.ids, whole.offsets

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the vocabulary's rules put before a text, and those after it."""
        plain, whole = self.encode("a"), self.encode("a", add_special_tokens=True)
        at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[:at], whole[at + len(plain) :]

    def encode_words(self, words: Sequence[str]) -> tuple[list[int], list[int | None]]:
        """The ids of a text given as words, special tokens around it, and the number of the word that each is of."""
        self._check_texts(words)
        with guarded(self.name):
            spaced = [word if i == 0 else f" {word}" for i, word in enumerate(words)]
            whole = self._backend.encode(spaced, is_pretokenized=True, add_special_tokens=True)
        return whole.ids, whole.word_ids

    def framed(self, start: str, between: str, end: str) -> Tokenizer:
        """This vocabulary and three special tokens, which `add_special_tokens` puts around a text, and between two
        (Radford et al. 2018, sec. 3.3). Tokens it has already keep their ids.

        >>> tokenizer = byte_tokenizer().framed("<s>", "<$>", "<e>")
        >>> tokenizer.encode("A", add_special_tokens=True), tokenizer.encode_pairs([("A", "B")])[0][0]
        ([257, 65, 259], [257, 65, 258, 66, 259])
        """
        tokens = {token: self.token_id(token) for token in (start, between, end)}
        spec = json.loads(self._backend.to_str())
        free = iter(range(self.vocab_size, self.vocab_size + 3))
        ids = {token: next(free) if known is None else known for token, known in tokens.items()}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        spec["added_tokens"] += [
            {"id": i, "content": token} | plain for token, i in ids.items() if tokens[token] is None
        ]
        first, second, *frame = (
            *({"Sequence": {"id": name, "type_id": 0}} for name in "AB"),
            *({"SpecialToken": {"id": token, "type_id": 0}} for token in ids),
        )
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [frame[0], first, frame[2]],
            "pair": [frame[0], first, frame[1], second, frame[2]],
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ids.items()},
        }
        return self._changed(spec, self.pad_id)

    def padded(self, ends: Iterable[int]) -> Tokenizer:
        """This vocabulary with a padding token that is none of `ends`, in which texts end: its own, or another special
        token, or a new one. transformers looks for the last token of a text by what is no padding.

        >>> byte_tokenizer().padded([65]).pad_token, byte_tokenizer().padded([256]).pad_token
        ('<|endoftext|>', '<|pad|>')
        """
        spec, taken = json.loads(self._backend.to_str()), {*ends, None}
        known = [self.pad_id, *sorted(self._special - {self.bos_id, *self.eos_ids})]
        pad = next((i for i in known if i not in taken), self.vocab_size)
        if pad == self.vocab_size:
            spec["added_tokens"] += vocabularies.added_tokens(["<|pad|>"], first=pad)
        return self._changed(spec, pad)

    def _changed(self, spec: Any, pad_id: int | None) -> Tokenizer:
        """With another specification and another padding token, all else as it is."""
        return Tokenizer(
            spec,
            name=self.name,
            bos_id=self.bos_id,
            eos_ids=self.eos_ids,
            pad_id=pad_id,
            cls_id=self.cls_id,
            sep_id=self.sep_id,
            mask_id=self.mask_id,
            chat_template=self.chat_template,
        )

    def _shortened(self, text: str, add_special_tokens: bool, most: int) -> list[int]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        special = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        encoding.truncate(max(0, most - special))
        ids: list[int] = self._backend.post_process(encoding, None, add_special_tokens).ids
        return ids

    def _check_texts(self, texts: Sequence[str]) -> None:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"text: character {error.start} is half a surrogate pair") from None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises:
            InputError: an id outside the vocabulary.
        """
        self._check(ids)
        with guarded(self.name):
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> Stream:
        """A decoder that takes ids one by one."""
        return Stream(self, skip_special_tokens=skip_special_tokens)

    def spelling(self) -> Spelling:
        """What each token writes, in bytes; those with a role of their own write nothing.

        >>> byte_tokenizer().spelling().writes[72]
        b'H'

        Raises:
            InputError: that depends on other tokens.
        """
        roles = (self.bos_id, *self.eos_ids, self.pad_id, self.cls_id, self.sep_id, self.mask_id)
        with guarded(self.name):
            return spelling(self._backend, self._special.union(i for i in roles if i is not None))

    def least(self, text: str) -> int:
        """As many tokens a text has at least, found by its length alone; 0 where nothing can be said.

        >>> byte_tokenizer(["</s>"]).least("a" * 400)
        100
        """
        return 0 if self._bound is None else self._bound.least(text)

    @cached_property
    def _bound(self) -> bounds.Bound | None:
        return bounds.bound(json.loads(self._backend.to_str()))

    def token(self, i: int) -> str:
        """How the vocabulary spells token `i`."""
        self._check([i])
        return self._backend.id_to_token(i) or ""

    def token_id(self, token: str) -> int | None:
        """The id of what the vocabulary spells `token`, None where it has no such token."""
        try:
            return self._backend.token_to_id(token)
        except UnicodeEncodeError:  # half a surrogate pair, which no vocabulary has
            return None

    @property
    def bos_token(self) -> str | None:
        """How the beginning-of-text token is spelled."""
        return None if self.bos_id is None else self.token(self.bos_id)

    @property
    def eos_token(self) -> str | None:
        """How the first of the end tokens is spelled."""
        return self.token(self.eos_ids[0]) if self.eos_ids else None

    @property
    def pad_token(self) -> str | None:
        """How the padding token is spelled."""
        return None if self.pad_id is None else self.token(self.pad_id)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint in the Hugging Face layout.

        Reads tokenizer.json, or the vocab.txt of a BERT that has none; special tokens from tokenizer_config.json,
        special_tokens_map.json and generation_config.json, the template from chat_template.jinja or
        tokenizer_config.json, where they exist.

        Raises:
            InputError: a file missing or wrong; names it and the field.
        """
        return _from_folder(Path(path))

    @classmethod
    def from_gguf(cls, file: vocabularies.Metadata) -> Tokenizer:
        """The tokenizer in the metadata of an opened GGUF file: byte-level BPE or SentencePiece's BPE.

        Raises:
            InputError: names the file and the key.
        """
        size = len(file.need("tokenizer.ggml.tokens", list))
        bos, pad, *ends = (vocabularies.gguf_id(file, role, size) for role in ("bos", "padding", "eos", "eot", "eom"))
        return cls(
            vocabularies.from_gguf(file),
            name=str(file.path),
            bos_id=bos,
            pad_id=pad,
            eos_ids=[i for i in ends if i is not None],
            chat_template=file.find("tokenizer.chat_template", str, None),
        )

    @classmethod
    def from_tiktoken_ranks(
        cls, source: str | Path | bytes, *, split: str = "gpt2", special_tokens: Sequence[str] = (END_OF_TEXT,)
    ) -> Tokenizer:
        """Byte-level BPE from a `.tiktoken` file or its bytes.

        `split` is how text is cut into words (`vocabularies.SPLITS`); `special_tokens` get the ids after the last
        rank, and the first of them begins, ends and pads.

        Raises:
            InputError: names the file and the line.
        """
        name = "ranks" if isinstance(source, bytes) else str(source)
        try:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
        except OSError as error:
            raise InputError(f"{name}: {error.strerror}") from None
        return with_end(vocabularies.from_ranks(data, name, split, special_tokens), special_tokens, name)

    @classmethod
    def from_vocab_txt(cls, path: str | Path, *, lowercase: bool = True) -> Tokenizer:
        """BERT's WordPiece from a file with one token a line, whose number is its id (Devlin et al. 2019, sec. 3).

        Where the file has them, [CLS], [SEP], [MASK] and [PAD] take their roles, and [CLS] and [SEP] are put around a
        text; [UNK] it must have.

        Raises:
            InputError: names the file and the line.
        """
        path = Path(path)
        tokens = [line.rstrip("\r") for line in read_text(path, limit=64 << 20).removesuffix("\n").split("\n")]
        seen: set[str] = set()
        for number, token in enumerate(tokens, 1):
            if not token or token in seen:
                raise InputError(f"{path}: line {number} is empty, or a token that stood there before")
            seen.add(token)
        return wordpiece_tokenizer({token: i for i, token in enumerate(tokens)}, lowercase, str(path))

    def save(self, folder: str | Path) -> None:
        """Write the files that `from_folder` and transformers' AutoTokenizer read.

        The ids of special tokens are also put into generation_config.json, beside whatever it says already.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        others = {"cls_token": self.cls_id, "sep_token": self.sep_id, "mask_token": self.mask_id}
        named |= {key: None if i is None else self.token(i) for key, i in others.items()}
        named = {key: token for key, token in named.items() if token is not None}
        rules = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_text(folder / "tokenizer.json", self._backend.to_str())
        write_json(folder / "tokenizer_config.json", rules | named)
        write_json(folder / "special_tokens_map.json", named)
        if self.chat_template is not None:
            write_text(folder / "chat_template.jinja", self.chat_template)
        ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        found = {key: value for key, value in ids.items() if value not in (None, [])}
        write_json(folder / "generation_config.json", read_object(folder / "generation_config.json") | found)

    def _check(self, ids: Iterable[int]) -> None:
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise InputError(f"{self.name}: token id {i} is not in the vocabulary of {self.vocab_size}")


def byte_tokenizer(special_tokens: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """Bytes as ids, and `special_tokens` from 256 on, the first of which begins, ends and pads."""
    return with_end(vocabularies.of_bytes(special_tokens), special_tokens, "bytes")


def word_tokenizer(words: Sequence[str], *, chat_template: str | None = None) -> Tokenizer:
    """Words between spaces as ids from 2 on. `END_OF_TEXT`, which begins, ends and pads, is 0, and any other word 1.

    Raises:
        InputError: a word twice, or one with a space in it.

    >>> tokenizer = word_tokenizer(["a", "rose", "is"])
    >>> tokenizer.encode("a rose is red"), tokenizer.decode([2, 3, 4, 2, 3, 0])
    ([2, 3, 4, 1], 'a rose is a rose')
    """
    odd = [word for i, word in enumerate(words) if word in words[:i] or word.split() != [word]]
    if odd:
        raise InputError(f"word {odd[0]!r}: each is given once, and without spaces")
    spec = vocabularies.of_words(words, END_OF_TEXT, "<|unknown|>")
    return Tokenizer(spec, name="words", bos_id=0, eos_ids=(0,), pad_id=0, chat_template=chat_template)


def wordpiece_tokenizer(
    vocab: dict[str, int], lowercase: bool, name: str, special: Sequence[str] = BERT_TOKENS
) -> Tokenizer:
    """A tokenizer whose special tokens have the roles that BERT gives them."""
    special = [token for token in special if token in vocab]
    spec = vocabularies.wordpiece(vocab, special, lowercase)
    pad, cls, sep, mask = (vocab.get(f"[{role}]") for role in ("PAD", "CLS", "SEP", "MASK"))
    return Tokenizer(spec, name=name, pad_id=pad, cls_id=cls, sep_id=sep, mask_id=mask)


def _shorten(sides: list[Any], most: int) -> None:
    """Cut the ends of two encodings until they have `most` tokens together, the longer always first, as the library
    does.
    """
    shorter, longer = sorted(sides, key=lambda side: len(side.ids))  # stable: of equals the second counts as longer
    kept = len(shorter.ids) if len(shorter.ids) + len(longer.ids) <= most else min(len(shorter.ids), most // 2)
    shorter.truncate(kept)
    longer.truncate(max(most - kept, 0))


def with_end(spec: dict[str, Any], special_tokens: Sequence[str], name: str) -> Tokenizer:
    """A tokenizer whose first special token begins, ends and pads."""
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    end = ids[special_tokens[0]] if special_tokens else None
    return Tokenizer(spec, name=name, bos_id=end, eos_ids=() if end is None else (end,), pad_id=end)


def _from_folder(folder: Path) -> Tokenizer:
    spec_path, vocab_path = folder / "tokenizer.json", folder / "vocab.txt"
    config_path = folder / "tokenizer_config.json"
    config = read_object(folder / "special_tokens_map.json") | read_object(config_path)
    if spec_path.is_file():
        tokenizer = Tokenizer(read_json(spec_path), name=str(spec_path))
    elif vocab_path.is_file():
        tokenizer = Tokenizer.from_vocab_txt(vocab_path, lowercase=config.get("do_lower_case", True) is not False)
    else:
        raise InputError(f"{folder}: has no tokenizer.json; save the tokenizer in that form, as transformers does")
    generation_path = folder / "generation_config.json"
    generation = read_object(generation_path)
    tokenizer.bos_id = _named_id(tokenizer, config, "bos_token", config_path)
    for role in ("pad", "cls", "sep", "mask"):
        found = _named_id(tokenizer, config, f"{role}_token", config_path, needed=False)
        setattr(tokenizer, f"{role}_id", getattr(tokenizer, f"{role}_id") if found is None else found)
    end = _named_id(tokenizer, config, "eos_token", config_path)
    others = generation.get("eos_token_id")
    others = others if isinstance(others, list) else [] if others is None else [others]
    for i in others:
        if type(i) is not int or not 0 <= i < tokenizer.vocab_size:
            raise InputError(f"{generation_path}: eos_token_id holds {i!r:.60}, no id below {tokenizer.vocab_size}")
    tokenizer.eos_ids = tuple(dict.fromkeys(([] if end is None else [end]) + others))
    tokenizer.chat_template = chat_template(folder, config, config_path)
    return tokenizer


def _named_id(tokenizer: Tokenizer, config: dict[str, Any], key: str, path: Path, *, needed: bool = True) -> int | None:
    """The id of the token that `config` names under `key`, by its spelling or as an object with `content`."""
    value = config.get(key)
    spelling = value.get("content") if isinstance(value, dict) else value
    if spelling is None:
        return None
    found = tokenizer.token_id(spelling) if isinstance(spelling, str) else None
    if found is None and needed:
        raise InputError(f"{path}: {key} is {spelling!r:.60}, which is not in the vocabulary")
    return found
