"""Vocabularies learned from texts: byte-level BPE, SentencePiece's unigram, BERT's word pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import tokenizers

from allyouneed.core.errors import InputError
from allyouneed.data import vocabularies
from allyouneed.data.tokenizer_json import build, guarded
from allyouneed.data.tokenizers import BERT_TOKENS, END_OF_TEXT, Tokenizer, with_end, wordpiece_tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """A byte-level BPE learned from `texts`, words cut as GPT-2 cuts them (Sennrich et al. 2016; Radford et al. 2019).

    The first of `special_tokens`, whose ids come first, begins, ends and pads. The same texts give the same ids.

    Raises:
        InputError: `vocab_size` leaves no room for the 256 bytes and the special tokens.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise InputError(f"vocab_size is {vocab_size}; at least {least} are needed: 256 bytes and the special tokens")
    spec = vocabularies.byte_level({}, [], split="gpt2")
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(vocabularies.byte_characters()),
        show_progress=False,
    )
    with guarded("train_bpe"):
        backend.train_from_iterator(texts, trainer)
    return with_end(json.loads(backend.to_str()), special_tokens, "bpe")


def train_unigram(texts: Iterable[str], vocab_size: int, sentinels: int = 100) -> Tokenizer:
    """A SentencePiece unigram vocabulary learned from `texts` and used as T5 does (Kudo 2018; Raffel et al. 2020, 2.2).

    `<pad>` is 0, `</s>` 1, `<unk>` 2; the last `sentinels` ids are `<extra_id_0>` and so on, the highest first.
    `add_special_tokens` ends a text. `vocab_size` counts everything; what the texts cannot fill stays out. Text is
    normalised by NFKC and runs of spaces become one, so that decoding gives back the text up to that. The library adds
    up in no fixed order, so that another run may give other last digits and swap tokens that are equally likely.

    Raises:
        InputError: `vocab_size` leaves no room for the sentinels and 3 special tokens.
    """
    if sentinels < 0 or vocab_size <= sentinels + 3:
        raise InputError(f"vocab_size is {vocab_size}; more than {sentinels} sentinels and 3 special tokens are needed")
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=vocab_size - sentinels,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend = tokenizers.Tokenizer.from_str(json.dumps(vocabularies.unigram([("<unk>", 0.0)], unknown=0)))
    with guarded("train_unigram"):
        backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    names = [f"<extra_id_{n}>" for n in reversed(range(sentinels))]
    vocab = [*model["vocab"], *((name, 0.0) for name in names)]
    spec = vocabularies.unigram(vocab, unknown=model["unk_id"], special=("<pad>", "</s>", "<unk>", *names), end="</s>")
    return Tokenizer(spec, name="unigram", eos_ids=(1,), pad_id=0)


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, *, lowercase: bool = True, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """A vocabulary of word pieces like BERT's: `BERT_TOKENS`, `special_tokens`, characters, pieces by frequency.

    Pieces are joined by how often they stand together, as in BPE, where Wu et al. (2016, sec. 4.1) joined those that
    raise the text's likelihood most; encoding takes the longest piece first, as theirs. The same texts give the same
    ids.

    Raises:
        InputError: `vocab_size` leaves no room for the characters and the special tokens.

    >>> tokenizer = train_wordpiece(["low lower lowest", "new newer newest"], 40)
    >>> [tokenizer.token(i) for i in tokenizer.encode("Lower", add_special_tokens=True)]
    ['[CLS]', 'lower', '[SEP]']
    """
    texts, special = list(texts), [*BERT_TOKENS, *special_tokens]
    bare = build(vocabularies.wordpiece({token: i for i, token in enumerate(special)}, special, lowercase), "wordpiece")
    normalizer, splitter = bare.normalizer, bare.pre_tokenizer
    assert normalizer is not None and splitter is not None
    starts: set[str] = set()
    others: set[str] = set()
    for text in texts:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            starts.add(word[0])
            others.update(word[1:])
    # known beforehand and in order: the trainer would number what continues a word as its hash map yields it
    fixed = [*special, *sorted(starts), *sorted("##" + character for character in others)]
    if vocab_size < len(fixed):
        raise InputError(f"vocab_size is {vocab_size}; the characters and the special tokens alone take {len(fixed)}")
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=fixed, continuing_subword_prefix="##", show_progress=False
    )
    with guarded("train_wordpiece"):
        bare.train_from_iterator(texts, trainer)
    return wordpiece_tokenizer(bare.get_vocab(with_added_tokens=True), lowercase, "wordpiece", special)
