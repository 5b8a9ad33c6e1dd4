"""Tokenizers: ids equal those of transformers and tiktoken, streams equal whole texts, broken files get one line."""

from __future__ import annotations

import base64
import json
import random
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiktoken
import tiktoken.load
import transformers
from conftest import within
from mutations import mutations, survives
from tokenizers import Tokenizer as Theirs

from allyouneed.core.errors import InputError
from allyouneed.data import materials
from allyouneed.data.patterns import refusal
from allyouneed.data.tokenizer_training import train_bpe, train_unigram, train_wordpiece
from allyouneed.data.tokenizers import (
    BERT_TOKENS,
    Tokenizer,
    byte_tokenizer,
)
from allyouneed.models.checkpoints.gguf import GGUF

GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

BY_HAND = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n\r\n",
    "\t\tindented\ttwice",
    "Once upon a time",
    " a leading space",
    "a trailing space ",
    "runs   of    spaces          between",
    "It's what they'll've said; I'M, WE'RE, don'T",
    "0 1 12 123 1234 12345678901234567890",
    "3.14159 -1e-05 1,000,000 0xFF 1/2 ½ Ⅷ ٣٤٥ १२३",
    "x  1, y   22\n\n3",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }\r\n",
    '{"key": [1, 2.5, null, true], "nested": {"é": "\\u00e9"}}',
    "<div class='x'>&nbsp;&amp;</div><!-- -->",
    "SELECT * FROM t WHERE a <> 'b' AND c >= 10;",
    "#!/usr/bin/env bash\nset -euo pipefail; echo \"$HOME\" | sed 's/a/b/g'",
    "C:\\Users\\name\\file.txt and /usr/local/bin/../lib",
    "https://example.org/a?b=c&d=%20#frag mailto:a.b+c@example.org",
    "$E = mc^2$, \\frac{1}{2}, ∑∫∂√∞≠≤≥±×÷",
    "CamelCaseWords snake_case_words kebab-case-words SCREAMING_CASE",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "Grüße aus Köln, señor; œuvre naïve façade Århus Łódź",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "نص عربي مع تشكيلٍ وأرقام ١٢٣",
    "עברית מימין לשמאל",
    "हिन्दी में कुछ वाक्य और १२ अंक",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "中文没有空格,但是有标点。全角　空格",
    "日本語のひらがなとカタカナと漢字",
    "한국어 문장입니다",
    "Tiếng Việt có nhiều dấu",
    "ქართული და հայերեն",
    "🙂🙃😀 👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ❤️",
    "e\u0301 versus é, n\u0303 versus ñ, \u0301 alone",
    "\u00a0no-break\u2009thin\u200bzero\u2028line\u3000wide\ufeff",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31mred\x1b[0m\x7f",
    "\ufffd\ufffe private \ue000 \U0010ffff \U000e0041",
    "…“quotes” ‘single’ – — • § ¶ † ‡ ™ © ®",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|> c",
    "<|im_start|<|im_end|>|> <| im_start |> <|IM_START|>",
    "<repo_name><file_sep><filename>a.py<gh_stars>",
    "<s> </s> <unk> [CLS] [SEP] <pad> <0x0A>",
    "ĠGPT Ċ ▁▁ ## @@",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "=" * 100 + "-" * 100 + " " * 100 + "\n" * 20,
    "\n \n  \n   \n\t\n \t \n",
    "a\rb\rc\r\nd\n\re",
]


def mixed_lines() -> list[str]:
    """Over 300 lines: those by hand, and some put together at random from pieces that tokenizers stumble over."""
    randomness = random.Random(0)
    pieces = [
        "a",
        "the",
        "ING",
        "foo",
        "1",
        "23",
        "4567",
        "é",
        "Ж",
        "中文",
        "한국",
        "ا",
        "हि",
        "ก",
        "🙂",
        "👩\u200d👧",
        "½",
    ]
    pieces += ["'s", "'LL", "_", "--", "#", "...", "()", "{}", "\\n", "<|im_start|>", "<|endoftext|>", "<s>"]
    pieces += [" ", "  ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u0301", "\u200d", "\x00", "\x7f", "\ufffd"]
    scrambled = ["".join(randomness.choices(pieces, k=randomness.randrange(2, 24))) for _ in range(150)]
    ranges = (
        (32, 127),
        (0xA0, 0x250),
        (0x370, 0x530),
        (0x590, 0x780),
        (0x900, 0xE80),
        (0x2000, 0x2C00),
        (0x1F300, 0x1FA00),
    )
    scripts = ["".join(chr(randomness.randrange(*randomness.choice(ranges))) for _ in range(24)) for _ in range(100)]
    return BY_HAND + scrambled + scripts


LINES = mixed_lines()
CORPUS = [line * 3 for line in BY_HAND] + ["the quick brown fox and the lazy dogs were there then"] * 20


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return materials.path("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def smollm2_ours(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUF.open(smollm2))


@pytest.fixture(scope="module")
def gpt2_ours() -> Tokenizer:
    return Tokenizer.from_tiktoken_ranks(materials.path("gpt2-ranks"))


def same_ids(ours: Tokenizer, theirs: Any, lines: list[str] = LINES) -> None:
    for line in lines:
        ids = ours.encode(line)
        assert ids == theirs(line, add_special_tokens=False)["input_ids"], repr(line)
        assert ours.encode(line, add_special_tokens=True) == theirs(line)["input_ids"], repr(line)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), repr(
                line
            )


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> str:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return "".join([*map(stream.push, ids), stream.finish()])


@pytest.fixture(scope="module")
def unigram() -> Tokenizer:
    return train_unigram(CORPUS, 900)


def test_trained_unigram_is_t5s(unigram, tmp_path):
    """The same vocabulary in `transformers`' T5Tokenizer; and what either saves, the other reads."""
    model = json.loads(unigram._backend.to_str())["model"]
    theirs = transformers.T5Tokenizer(vocab=[tuple(entry) for entry in model["vocab"]])
    unigram.save(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    others = (
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "ours"),
        theirs,
    )
    again = Tokenizer.from_folder(tmp_path / "theirs")
    assert (again.eos_ids, again.pad_id) == ((1,), 0)
    for text in (*CORPUS[:20], "two  spaces\nand a line", "cut <extra_id_0> out <extra_id_99>", " ", "\u2603"):
        text = unicodedata.normalize("NFKC", text)  # theirs leaves that to a table from a SentencePiece file
        ids = unigram.encode(text, add_special_tokens=True)
        assert ids[-1] == 1
        assert again.encode(text, add_special_tokens=True) == ids
        for other in others:
            assert other.encode(text) == ids


def test_trained_unigram(unigram):
    assert [unigram.token(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    top = unigram.vocab_size - 1
    assert unigram.vocab_size <= 900
    assert [unigram.token_id(f"<extra_id_{n}>") for n in (0, 1, 99)] == [top, top - 1, top - 99]
    for text in CORPUS[:20]:
        plain = " ".join(unicodedata.normalize("NFKC", text).split())
        assert unigram.decode(unigram.encode(text)) == plain
        assert len(unigram.encode(text)) < max(2, len(text))
    with pytest.raises(InputError, match="vocab_size is 103; more than 100 sentinels and 3"):
        train_unigram(CORPUS, 103)


def test_smollm2_from_gguf_has_the_ids_of_transformers(smollm2: Path, smollm2_ours: Tokenizer) -> None:
    assert len(LINES) >= 200
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    same_ids(smollm2_ours, theirs)
    assert smollm2_ours.encode_batch(LINES) == [smollm2_ours.encode(line) for line in LINES]
    assert (smollm2_ours.bos_id, smollm2_ours.eos_ids, smollm2_ours.pad_id) == (1, (2,), 2)
    assert (smollm2_ours.bos_token, smollm2_ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert smollm2_ours.chat_template == theirs.chat_template
    assert smollm2_ours.vocab_size == len(theirs) == 49152


def test_smollm2_is_read_within_a_second(smollm2: Path) -> None:
    with within(1):
        Tokenizer.from_gguf(GGUF.open(smollm2))


def test_gpt2_from_ranks_has_the_ids_of_tiktoken(gpt2_ours: Tokenizer) -> None:
    ranks = tiktoken.load.load_tiktoken_bpe(str(materials.path("gpt2-ranks")))
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    for line in LINES:
        ids = gpt2_ours.encode(line)
        assert ids == theirs.encode(line, allowed_special="all"), repr(line)
        assert gpt2_ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == line
    assert gpt2_ours.vocab_size == 50257
    assert gpt2_ours.eos_ids == (50256,)
    assert gpt2_ours.encode("Hello world") == [15496, 995]  # the example of transformers' GPT2Tokenizer


def test_gpt2_merges_are_the_fifty_thousand_of_the_paper(gpt2_ours: Tokenizer, tmp_path: Path) -> None:
    gpt2_ours.save(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) == 50000  # 50,257 tokens are 256 bytes, 50,000 merges and the end of text
    assert [tuple(merge) for merge in merges[:3]] == [("Ġ", "t"), ("Ġ", "a"), ("h", "e")]


@pytest.mark.parametrize("model_type", [None, "llama", "gpt2"])
def test_a_saved_folder_loads_in_transformers_and_here(
    smollm2_ours: Tokenizer, gpt2_ours: Tokenizer, tmp_path: Path, model_type: str | None
) -> None:
    ours = gpt2_ours if model_type == "gpt2" else smollm2_ours
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    same_ids(ours, theirs, LINES[::4])
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (ours.bos_token, ours.eos_token, ours.pad_token)
    assert theirs.chat_template == ours.chat_template
    again = Tokenizer.from_folder(tmp_path)
    assert [again.encode(line) for line in LINES] == [ours.encode(line) for line in LINES]
    assert (again.bos_id, again.eos_ids, again.pad_id) == (ours.bos_id, ours.eos_ids, ours.pad_id)
    assert again.chat_template == ours.chat_template
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.5


def write_gguf(folder: Path, kind: str, tokens: list[str], **fields: Any) -> Path:
    """A GGUF file without weights, enough for transformers to make a tokenizer of."""
    writer = gguf.GGUFWriter(folder / "small.gguf", "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        getattr(writer, f"add_{key}")(16)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "small.gguf"


@pytest.mark.parametrize("split", ["gpt-2", "default", "llama-bpe", "qwen2", "smollm"])
@pytest.mark.parametrize("begins", [True, False])
def test_small_byte_level_gguf(tmp_path: Path, split: str, begins: bool) -> None:
    backend = train_bpe(CORPUS, 600, ["<|endoftext|>", "<|im_start|>", "<think>"])._backend
    model = json.loads(backend.to_str())["model"]
    path = write_gguf(
        tmp_path,
        "gpt2",
        sorted(model["vocab"], key=model["vocab"].__getitem__),
        tokenizer_pre=split,
        token_merges=[" ".join(pair) for pair in model["merges"]],
        token_types=[3, 3, 4] + [1] * 597,
        bos_token_id=1,
        eos_token_id=0,
        add_bos_token=begins,
    )
    ours = Tokenizer.from_gguf(GGUF.open(path))
    same_ids(ours, transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name))
    assert ours.encode("x", add_special_tokens=True)[0] == (1 if begins else ours.encode("x")[0])
    ours.save(tmp_path / "saved")
    same_ids(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"), LINES[::4])


def sentencepiece_tokens() -> tuple[list[str], list[float], list[int]]:
    """A vocabulary as SentencePiece's BPE writes it: special, bytes, pieces by falling score, single characters."""
    text = "the quick brown fox and the lazy dogs were there then a 中文 é 12 345 , . ' ▁▁▁▁ \t".replace(" ", "▁")
    pieces = ["▁t", "he", "▁the", "▁a", "nd", "▁and", "er", "re", "▁there", "en", "▁then", "▁▁", "▁▁▁▁", "in", "ing"]
    pieces += ["▁q", "ui", "ck", "▁quick", "中文", "▁中文", "12", "▁12"]
    letters = sorted(set(text + "".join(chr(i) for i in range(33, 127))) - {"▁"})
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + pieces + ["▁", *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters) + 1)]
    return tokens, scores, [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens, scores, kinds = sentencepiece_tokens()
    fields = {"token_scores": scores, "token_types": kinds, "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    return write_gguf(tmp_path_factory.mktemp("sentencepiece"), "llama", tokens, **fields)


def test_small_sentencepiece_gguf(sentencepiece: Path, tmp_path: Path) -> None:
    ours = Tokenizer.from_gguf(GGUF.open(sentencepiece))
    same_ids(ours, transformers.AutoTokenizer.from_pretrained(sentencepiece.parent, gguf_file=sentencepiece.name))
    assert [ours.token(i) for i in ours.encode("there 12", add_special_tokens=True)] == ["<s>", "▁there", "▁12"]
    assert [ours.token(i) for i in ours.encode("ж")] == ["▁", "<0xD0>", "<0xB6>"]
    ours.save(tmp_path)
    same_ids(ours, transformers.AutoTokenizer.from_pretrained(tmp_path), LINES[::4])


def test_streams_equal_whole_texts(smollm2_ours: Tokenizer, sentencepiece: Path) -> None:
    for tokenizer in (smollm2_ours, Tokenizer.from_gguf(GGUF.open(sentencepiece)), byte_tokenizer()):
        randomness = random.Random(0)
        rows = [tokenizer.encode(line) for line in LINES]
        rows += [randomness.choices(range(tokenizer.vocab_size), k=20) for _ in range(100)]
        some = [*range(300), *range(tokenizer.vocab_size)][:300]  # specials, bytes and short tokens: broken characters
        rows += [randomness.choices([i for i in some if i < tokenizer.vocab_size], k=20) for _ in range(200)]
        for ids in rows:
            for skip in (True, False):
                assert streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip_special_tokens=skip), ids


def test_streams_hold_back_only_what_may_change(smollm2_ours: Tokenizer) -> None:
    stream = smollm2_ours.stream()
    ids = smollm2_ours.encode("ab 👩🏽 cd")
    pieces = [stream.push(i) for i in ids]
    assert stream.finish() == ""
    assert "".join(pieces) == "ab 👩🏽 cd"
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[0] == smollm2_ours.decode(ids[:1])
    assert stream.push(ids[0]) == pieces[0]  # as new


def test_bytes() -> None:
    tokenizer = byte_tokenizer(["<|endoftext|>", "<|sep|>"])
    for line in LINES:
        if "<|endoftext|>" not in line:
            assert tokenizer.encode(line) == list(line.encode())
            assert tokenizer.decode(list(line.encode())) == line
    assert tokenizer.vocab_size == 258
    assert tokenizer.encode("a<|endoftext|>b<|sep|>") == [97, 256, 98, 257]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (256, (256,), 256)
    assert byte_tokenizer([]).eos_ids == ()


def test_trained_bpe() -> None:
    tokenizer = train_bpe(CORPUS, 500)
    assert tokenizer.vocab_size == 500
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.token_id("<|endoftext|>")) == (0, (0,), 0)
    assert len(tokenizer.encode(" there then")) == 2
    for line in LINES:
        assert tokenizer.decode(tokenizer.encode(line), skip_special_tokens=False) == line
    again = train_bpe(iter(CORPUS), 500)
    assert [again.encode(line) for line in LINES] == [tokenizer.encode(line) for line in LINES]
    with pytest.raises(InputError, match="vocab_size is 256; at least 257"):
        train_bpe(CORPUS, 256)


def test_ids_and_texts_are_checked() -> None:
    tokenizer = byte_tokenizer()
    for bad in (257, -1, 2**70):
        with pytest.raises(InputError, match=f"token id {bad} is not in the vocabulary of 257"):
            tokenizer.decode([72, bad])
        with pytest.raises(InputError, match=f"token id {bad}"):
            tokenizer.stream().push(bad)
    with pytest.raises(InputError, match="character 2 is half a surrogate pair"):
        tokenizer.encode("ab\ud800")


RANKS = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["!! 5"], "line 257 is not a token in base64"),
        (["YWI="], "line 257 is not a token in base64"),
        (["YWI= x"], "line 257 is not a token in base64"),
        (["YWI= -1"], "line 257 has a token twice"),
        (["YWI= 256", "YWI= 257"], "line 258 has a token twice"),
        (["YWI= 255"], "the same id"),
    ],
)
def test_wrong_ranks_name_their_line(lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tokenizer.from_tiktoken_ranks("\n".join(RANKS + lines).encode())


def test_ranks_need_every_byte_a_known_split_and_a_file(tmp_path: Path) -> None:
    assert Tokenizer.from_tiktoken_ranks("\n".join([*RANKS, "YWI= 256"]).encode()).encode("cab") == [99, 256]
    with pytest.raises(InputError, match="byte 255 has no rank"):
        Tokenizer.from_tiktoken_ranks("\n".join(RANKS[:-1]).encode())
    with pytest.raises(InputError, match="unknown split 'gpt3'; did you mean 'gpt2'"):
        Tokenizer.from_tiktoken_ranks("\n".join(RANKS).encode(), split="gpt3")
    with pytest.raises(InputError, match=r"no\.tiktoken: No such file"):
        Tokenizer.from_tiktoken_ranks(tmp_path / "no.tiktoken")


def small_spec() -> dict[str, Any]:
    """A tokenizer.json with something in every place."""
    model = json.loads(train_bpe(CORPUS, 300)._backend.to_str())["model"]
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": GPT2_WORDS}, "behavior": "Isolated", "invert": False}
    special = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": "<|endoftext|>"} | rules],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}],
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, bytes_only]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, text],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": special},
        },
        "decoder": bytes_only,
        "model": model,
    }


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value, at a path like `model.unk_token`."""

    def change(spec: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            spec = spec[int(key) if key.isdigit() else key]
        spec[int(last) if last.isdigit() else last] = value  # type: ignore[index]

    return change


def splitting(pattern: str) -> Callable[[dict[str, Any]], None]:
    return changed("pre_tokenizer.pretokenizers.0.pattern", {"Regex": pattern})


def table(*raw: int) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(raw)).decode()}


DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
UNDEFINED = [{"SpecialToken": {"id": "<x>", "type_id": 0}}]

# The comments say what the tokenizers library does when it gets such a file as it is; the first three run for ever.
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "exponential": (splitting("(a|a)*b"), "repeats a group that can match in several ways"),
    "exponential in a row": (splitting("a?" * 40 + "a" * 40), "ways to match its optional parts"),
    "cubic": (splitting(r"\w*\w*\d"), "several unbounded repetitions before something that can fail"),
    "repeated 10^9 times": (splitting("(?:(?:a{1000}){1000}){1000}"), "items or ways"),
    "parentheses": (splitting("(" * 5000 + ")" * 5000), "nests groups deeper|at most 4096"),
    "no expression": (splitting("("), r"has an unmatched '\('"),
    "replaces nothing": (
        changed("normalizer.normalizers.1.pattern", {"String": ""}),
        "with text is accepted",
    ),  # panics
    "doubles 60 times": (changed("normalizer.normalizers", [DOUBLING] * 60), "lengthens a text by more than 1024"),
    "chunks of nothing": (changed("pre_tokenizer", {"type": "FixedLength", "length": 0}), "1 or more"),  # panics
    "prepends nothing": (
        changed("normalizer", {"type": "Prepend", "prepend": ""}),
        "characters are accepted",
    ),  # panics
    "strips": (changed("decoder", {"type": "Strip", "content": "a", "start": 0, "stop": 9}), "stop 0"),  # panics
    "no table": (changed("normalizer", table(1, 2)), "not what SentencePiece writes|claims a trie"),  # panics
    "small table": (changed("normalizer", table(4, 0, 0, 0, 255, 255, 255, 255)), "claims a trie of 4"),  # panics
    "undefined piece": (changed("post_processor.single", UNDEFINED), "'<x>'.*not defined"),  # panics
    "second text": (changed("post_processor.single.1.Sequence.id", "B"), "not defined"),  # panics
    "id added": (changed("post_processor.special_tokens.<|endoftext|>.ids", [4000]), "not in the vocabulary"),
    "merge unknown": (changed("model.merges.5", ["a", "zzz"]), r"merge 5, \['a', 'zzz'\], is of tokens"),
    "merge to unknown": (changed("model.merges.5", ["Z", "Z"]), "is of tokens that are not in"),  # panics
    "prefix": (changed("model.continuing_subword_prefix", "aé"), "is of tokens that are not in"),  # aborts the process
    "merge of one": (changed("model.merges.5", "ab"), "merge 5 is 'ab'; two tokens"),
    "unknown token": (changed("model.unk_token", "zzz"), "unk_token is 'zzz', which is not in"),
    "same id": (changed("model.vocab.A", 3), "have the same id 3"),
    "negative id": (changed("model.vocab.A", -1), "'A': id -1; 0 to"),
    "huge id": (changed("model.vocab.A", 2**32 - 1), "'A': id 4294967295; 0 to"),
    "added id": (changed("added_tokens.0.id", 7), "has an id that is not free: 7"),
    "added nothing": (changed("added_tokens.0.content", ""), "a token has no 'content'"),
    "model": (changed("model.type", "RNN"), "model: type 'RNN'; accepted: BPE, WordPiece, WordLevel, Unigram"),
    "kind": (changed("decoder", {"type": "Eval"}), "decoder: type 'Eval'; accepted: Sequence"),
    "kind of kind": (changed("decoder", {"type": []}), "decoder: type"),
    "many parts": (changed("normalizer.normalizers", [{"type": "NFC"}] * 99), "more than 64 parts"),
    "no model": (changed("model", None), "model: is None; an object is accepted"),
    "unigram": (changed("model", {"type": "Unigram", "unk_id": 1, "vocab": [["a", 0.0]]}), "unk_id is 1"),
    "long words": (
        changed("model", {"type": "WordPiece", "unk_token": "a", "max_input_chars_per_word": 10**9, "vocab": {"a": 0}}),
        "max_input_chars_per_word is 1000000000",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokenizers_get_one_line(tmp_path: Path, name: str) -> None:
    change, message = HOSTILE[name]
    spec = small_spec()
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with within(1), pytest.raises(InputError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(error.value)


def test_padding_truncation_and_dropout_are_left_out(tmp_path: Path) -> None:
    spec = small_spec()
    plain = Tokenizer(spec)
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    spec["padding"] = padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    spec["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 10}
    spec["model"]["dropout"] = 0.9
    without, theirs = Tokenizer(spec), Theirs.from_str(json.dumps(small_spec()))
    for line in LINES:
        assert without.encode(line) == plain.encode(line) == theirs.encode(line, add_special_tokens=False).ids


def test_accepted_expressions() -> None:
    """Those of GPT-2, LLaMA 3, GPT-4o, DeepSeek, Bloom, CLIP, Falcon."""
    for pattern in (
        GPT2_WORDS,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}| ?[^\s\p{L}]+[\r\n/]*",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
        " ?[^(\\s|[.,!?…。，、।۔،])]+",
        r"<\|startoftext\|>|<\|endoftext\|>|'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        r"(?=(\d{3})+(?!\d))",
        "[一-龥぀-ゟ゠-ヿ]+",
    ):
        assert refusal(pattern) is None, pattern


def test_mutations_get_one_line(tmp_path: Path) -> None:
    def load(path: Path) -> None:
        tokenizer = Tokenizer.from_folder(path.parent)
        for line in BY_HAND[5:]:
            tokenizer.decode(tokenizer.encode(line, add_special_tokens=True))

    data = json.dumps(small_spec()).encode()
    path = tmp_path / "tokenizer.json"
    outcomes = [survives(load, path, damaged) for damaged in mutations(data, 500, seed=0)]
    assert 50 < sum(outcomes) < 450


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_mutations_of_the_other_files_get_one_line(tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer(small_spec(), bos_id=0, eos_ids=(0, 5), pad_id=0, chat_template="{{ messages }}")
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).eos_ids == (0, 5)
    data = (tmp_path / name).read_bytes()
    outcomes = [
        survives(lambda path: Tokenizer.from_folder(path.parent), tmp_path / name, damaged, named=str(tmp_path))
        for damaged in mutations(data, 60, seed=1)
    ]
    assert 0 < sum(outcomes) < 60


def test_mutations_of_gguf_tokenizers_get_one_line(sentencepiece: Path, tmp_path: Path) -> None:
    def load(path: Path) -> None:
        tokenizer = Tokenizer.from_gguf(GGUF.open(path))
        tokenizer.decode(tokenizer.encode("then ж\n", add_special_tokens=True))

    data = sentencepiece.read_bytes()
    outcomes = [survives(load, tmp_path / "small.gguf", damaged) for damaged in mutations(data, 300, seed=2)]
    assert 20 < sum(outcomes) < 280


def test_what_a_folder_says_of_special_tokens(tmp_path: Path) -> None:
    Tokenizer(small_spec()).save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).eos_ids == ()
    config, generation = tmp_path / "tokenizer_config.json", tmp_path / "generation_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}, "chat_template": "T", "pad_token": "[P]"}))
    generation.write_text(json.dumps({"eos_token_id": [7, 0]}))
    found = Tokenizer.from_folder(tmp_path)
    assert (found.eos_ids, found.pad_id, found.chat_template) == ((0, 7), None, "T")
    config.write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]})
    )
    assert Tokenizer.from_folder(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_folder(tmp_path).chat_template == "J"
    config.write_text(json.dumps({"eos_token": "<end>"}))
    with pytest.raises(InputError, match="eos_token is '<end>', which is not in the vocabulary"):
        Tokenizer.from_folder(tmp_path)
    config.write_text("{}")
    generation.write_text(json.dumps({"eos_token_id": 300}))
    with pytest.raises(InputError, match="eos_token_id holds 300, no id below 300"):
        Tokenizer.from_folder(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_model": "rwkv"}, "'tokenizer.ggml.model' is 'rwkv'; accepted: gpt2, llama"),
        ({"tokenizer_pre": "gpt-3"}, "'gpt-3'; did you mean 'gpt-2'"),
        ({"token_merges": ["a b c"]}, "'tokenizer.ggml.merges' holds 'a b c'"),
        ({"token_merges": ["a z"]}, "merge 0.*not in the vocabulary"),
        ({"token_types": [1]}, "has 1 entries for 2 tokens"),
        ({"eos_token_id": 2}, "'tokenizer.ggml.eos_token_id' is 2; ids below 2"),
        ({"token_list": ["a", "a"]}, "holds 'a' twice"),
    ],
)
def test_wrong_gguf_tokenizers_name_the_key(change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": change.get("tokenizer_model", "gpt2"),
        "tokenizer.ggml.pre": change.get("tokenizer_pre", "gpt-2"),
        "tokenizer.ggml.tokens": change.get("token_list", ["a", "b"]),
        "tokenizer.ggml.merges": change.get("token_merges", []),
        "tokenizer.ggml.token_type": np.array(change.get("token_types", [1, 1])),
        "tokenizer.ggml.eos_token_id": change.get("eos_token_id", 1),
    }
    file = object.__new__(GGUF)
    file.path, file.metadata = Path("small.gguf"), fields
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.from_gguf(file)
    assert "small.gguf" in str(error.value)


# WordPiece


@pytest.fixture(scope="module")
def minilm() -> Path:
    return materials.path("all-minilm-l6-v2")


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.txt"])
def test_wordpiece_ids_are_theirs(minilm, form):
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    ours = Tokenizer.from_folder(minilm) if form == "tokenizer.json" else Tokenizer.from_vocab_txt(minilm / form)
    roles = ("pad", "cls", "sep", "mask")
    for role in roles:
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_token_id")
    for add in (False, True):
        assert ours.encode_batch(BY_HAND, add_special_tokens=add) == theirs(BY_HAND, add_special_tokens=add).input_ids
    for most in (2, 3, 7, 40):
        shortened = theirs(BY_HAND, max_length=most, truncation=True).input_ids
        assert ours.encode_batch(BY_HAND, add_special_tokens=True, most=most) == shortened
    pairs = list(zip(BY_HAND, BY_HAND[::-1], strict=True))
    for most in (3, 4, 9, 16, 512):
        expected = theirs(
            BY_HAND, BY_HAND[::-1], max_length=most, truncation="longest_first", return_token_type_ids=True
        )
        found = ours.encode_pairs(pairs, most=most)
        assert [ids for ids, _ in found] == expected.input_ids
        assert [types for _, types in found] == expected.token_type_ids
    with pytest.raises(InputError, match="half a surrogate pair"):
        ours.encode_pairs([("fine", "\ud800")])


def test_wordpiece_without_tokenizer_json(minilm, tmp_path):
    shutil.copy(minilm / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "mask_token": "[MASK]"}')
    cased = Tokenizer.from_folder(tmp_path)
    assert cased.encode("Word") == [cased.token_id("[UNK]")] and cased.mask_id == cased.token_id("[MASK]")
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).encode("Word") == [cased.token_id("word")]


def test_wordpiece_round_trip(tmp_path):
    texts = ["the quick brown fox jumps over the lazy dog", "Pack my box with five dozen liquor jugs", "naïve café"] * 3
    ours = train_wordpiece(texts, 120)
    assert [ours.token(i) for i in range(5)] == list(BERT_TOKENS) and ours.vocab_size <= 120
    ours.save(tmp_path)
    again, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for role in ("pad", "cls", "sep", "mask"):
        assert getattr(ours, f"{role}_id") == getattr(again, f"{role}_id") == getattr(theirs, f"{role}_token_id")
    for text in texts:
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == again.encode(text, add_special_tokens=True) == theirs(text).input_ids
        assert ours.token_id("[UNK]") not in ids
    assert ours.decode(ours.encode("The lazy CAFÉ")) == "the lazy cafe"


def test_wordpiece_is_the_same_in_every_process():
    """The library's hash maps are seeded anew in each process, and its trainer would number pieces by them."""
    code = (
        "from allyouneed.data.tokenizer_training import train_wordpiece as t\n"
        "w = t(['the reader reads and rereads the readable reading list of readers'], 70)\n"
        "print([w.token(i) for i in range(w.vocab_size)])"
    )
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(4)}
    assert len(runs) == 1 and len(runs.pop()) > 100


def test_wordpiece_refuses(tmp_path):
    with pytest.raises(InputError, match="the characters and the special tokens alone take"):
        train_wordpiece(["abc def"], 6)
    (tmp_path / "vocab.txt").write_text("[UNK]\na\nb\na\n")
    with pytest.raises(InputError, match=r"vocab\.txt: line 4 "):
        Tokenizer.from_vocab_txt(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="unk_token"):
        Tokenizer.from_folder(tmp_path)
