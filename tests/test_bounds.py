"""How few tokens a text can have: never more than it has, and none where nothing can be said."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allyouneed.data import materials
from allyouneed.data.tokenizer_training import train_bpe
from allyouneed.data.tokenizers import Tokenizer, byte_tokenizer, wordpiece_tokenizer
from allyouneed.models.checkpoints.gguf import GGUF

COMPOSING = "ᾂ".join(["α\u0313\u0300\u0345"] * 3) + "\u1100\u1161\u11a8" * 3  # four code points, and three, become one


def changed(normalizer: object = None, **added: object) -> Tokenizer:
    """A trained vocabulary with another normalizer, or another kind of added token."""
    spec = json.loads(train_bpe(["the cat and the hat " * 9], 300, ["<|end|>"])._backend.to_str())
    spec["normalizer"] = normalizer
    spec["added_tokens"] = [token | added for token in spec["added_tokens"]]
    return Tokenizer(spec)


NFC = {"type": "NFC"}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
BOUNDED = {
    "bytes": byte_tokenizer(),
    "trained": changed(),
    "composed": changed(NFC),
    "sequence": changed({"type": "Sequence", "normalizers": [NFC, SPACES]}),
}
texts = st.text(max_size=60) | st.lists(
    st.sampled_from(["the ", " " * 30, "<|end|>", "cat", COMPOSING, "é"]), max_size=9
).map("".join)


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(text=texts)
def test_no_text_has_fewer_tokens_than_the_bound_says(name: str, text: str) -> None:
    tokenizer = BOUNDED[name]
    text = text.encode("utf-8", "replace").decode()
    assert len(tokenizer.encode(text)) >= tokenizer.least(text) >= len(text) / 100


def test_the_bound_is_reached() -> None:
    tokenizer = BOUNDED["trained"]
    longest = max((tokenizer.token(i) for i in range(tokenizer.vocab_size)), key=len).replace("Ġ", " ")
    assert len(tokenizer.encode(longest)) == tokenizer.least(longest) == 1
    assert tokenizer.least(longest + "a") == 2


@pytest.mark.parametrize(
    "tokenizer",
    [
        wordpiece_tokenizer({"[UNK]": 0, "a": 1}, True, "words", ["[UNK]"]),
        changed({"type": "Strip", "strip_left": True, "strip_right": True}),
        changed({"type": "Replace", "pattern": {"String": "aa"}, "content": "a"}),
        changed({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}),
        changed({"type": "NFKC"}),
        changed(rstrip=True),
        changed(lstrip=True),
    ],
)
def test_where_a_token_may_stand_for_any_length_nothing_is_said(tokenizer: Tokenizer) -> None:
    assert tokenizer.least("a" * 10**6) == 0


def test_smollm2_whose_vocabulary_drops_some_control_characters() -> None:
    tokenizer = Tokenizer.from_gguf(GGUF.open(materials.path("smollm2-135m-instruct")))
    for text in ("\x04" * 9000, " " * 9000, "\x04\x05" * 4000, "the cat" * 900, "\U00050000" * 300, "\n" * 5000):
        assert len(tokenizer.encode(text)) >= tokenizer.least(text)
    assert tokenizer.encode("\x04" * 9) == [] and tokenizer.least("\x04" * 9) == 0
    assert tokenizer.least("word " * 720_000) > 8192  # 3.6 MB
