"""A real encoder, all-MiniLM-L6-v2, against sentence-transformers reading the same files."""

from __future__ import annotations

import json
import random
import shutil
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentence_transformers
import torch

import allyouneed as ayn
from allyouneed.core.errors import InputError
from allyouneed.data import materials
from allyouneed.generate.language_model import LanguageModel
from allyouneed.generate.local_encoder import CACHED, LocalEncoder, Reading
from allyouneed.nn.prepacked import prepack

NAME = "all-minilm-l6-v2"


@pytest.fixture(scope="module")
def lm() -> LocalEncoder:
    found = ayn.load(NAME)
    assert isinstance(found, LocalEncoder) and isinstance(found, LanguageModel)
    return found


@pytest.fixture(scope="module")
def theirs() -> sentence_transformers.SentenceTransformer:
    return sentence_transformers.SentenceTransformer(str(materials.path(NAME)), device="cpu")


def texts() -> list[str]:
    """500 of many kinds: empty and blank, single words, sentences, code, other scripts, far beyond the limit."""
    source, prose = random.Random(0), list(topics.values())
    by_hand = ["", " ", "\n", "word", "[CLS] [SEP] [MASK]", "a" * 300, "日本語の文", "نص عربي", "🙂" * 40, "é e\u0301"]
    found = list(by_hand)
    while len(found) < 500:
        topic = source.choice(prose)
        start = source.randrange(len(topic))
        found.append(topic[start : start + round(2 ** source.uniform(1, 8.5)) if len(found) % 50 else start + 4096])
    return found


def test_vectors_are_those_of_sentence_transformers(lm, theirs):
    asked = texts()
    ours, expected = lm.embed(asked), theirs.encode(asked)
    assert ours.shape == (500, 384) and ours.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-5)
    lengths = lm.count_tokens(asked)
    assert min(lengths) == 0 and max(lengths) > 254
    cosines = (ours * expected).sum(1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= 0.9999
    assert np.abs(ours - expected).max() <= 1e-4


def test_batches_do_not_matter(lm):
    asked = texts()[:40]
    one_by_one = np.concatenate([lm.embed([text]) for text in asked])
    np.testing.assert_allclose(lm.embed(asked), one_by_one, atol=1e-5)


def test_long_texts_are_read_a_few_at_a_time(lm, monkeypatch):
    read, hidden = [], lm.module.hidden
    monkeypatch.setattr(lm.module, "hidden", lambda ids, segments: read.append(ids.shape) or hidden(ids, segments))
    lm.embed(["a bridge " * 200] * 20 + ["a bridge"] * 40)
    assert max(rows * width for rows, width in read) <= CACHED and max(rows for rows, _ in read) == lm.batch
    assert sorted(rows for rows, _ in read) == [4, 8, 8, 8, 32]


def test_meaning(lm):
    question, answer, other = lm.embed(["How old is the bridge?", "It was built in 1901.", "Mix flour and eggs."])
    assert question @ answer > question @ other + 0.1


def test_it_cannot_generate(lm):
    with pytest.raises(InputError, match=f"{NAME} is an encoder: it cannot generate, only embed"):
        lm.generate(["Once"])


def test_files_of_sentence_transformers(theirs, tmp_path):
    folder = materials.path(NAME)
    assert Reading.of(folder, 512) == Reading(256, "mean")
    assert Reading.of(folder, 100) == Reading(100, "mean")
    assert Reading.of(tmp_path, 512) == Reading(512, "mean")
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.parent.mkdir()
    shutil.copy(folder / "1_Pooling" / "config.json", pooling)
    described = json.loads(pooling.read_text())
    pooling.write_text(json.dumps(described | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}))
    assert Reading.of(tmp_path, 512).pooling == "cls"
    pooling.write_text('{"pooling_mode": "cls"}')
    assert Reading.of(tmp_path, 512).pooling == "cls"
    for wrong in ('{"pooling_mode": "max"}', '{"pooling_mode_max_tokens": true}', "[1]"):
        pooling.write_text(wrong)
        with pytest.raises(InputError, match=r"1_Pooling.config\.json"):
            Reading.of(tmp_path, 512)
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(InputError, match=r"modules\.json.*'Dense'"):
        Reading.of(tmp_path, 512)


def test_the_first_tokens_vector(theirs):
    """Pooling by [CLS], against theirs told to do the same."""
    lm = ayn.load(NAME)
    lm.reading = Reading(256, "cls")
    hidden = theirs.encode(["a short text", "another, somewhat longer text"], output_value="token_embeddings")
    expected = np.stack([tokens[0].numpy() / np.linalg.norm(tokens[0].numpy()) for tokens in hidden])
    np.testing.assert_allclose(lm.embed(["a short text", "another, somewhat longer text"]), expected, atol=1e-5)


def test_prepacked_layers_compute_the_same():
    torch.manual_seed(0)
    for bias in (True, False):
        plain = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias), torch.nn.GELU(), torch.nn.Linear(40, 8))
        x = torch.randn(3, 7, 24)
        with torch.inference_mode():
            expected = plain(x)
            packed = prepack(plain)
            assert torch.allclose(packed(x), expected, atol=1e-6)
        if torch.backends.mkldnn.is_available():
            assert [type(layer).__name__ for layer in packed] == ["PrepackedLinear", "GELU", "PrepackedLinear"]
    double = torch.nn.Linear(4, 4).double()
    assert prepack(torch.nn.Sequential(double))[0] is double
