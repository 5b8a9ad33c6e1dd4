"""Adapters behind the server: models of their own by `base:adapter`, which share an engine and answer in one batch."""

from __future__ import annotations

import copy
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from adapters import CONFIGS, merged, with_adapters
from serving import NAME, module, serving, tokenizer

from allyouneed.core.errors import InputError
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.local import LocalModel

NAMES = (NAME, *(f"{NAME}:{name}" for name in CONFIGS))
PROMPTS = ["The quick brown", "jumps over the lazy", "call {"]
GREEDY = {"max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def lm():
    config = Engine.Config(blocks=128, max_batch=8)
    return LocalModel(with_adapters(copy.deepcopy(module())), tokenizer(), NAME, config=config)


@pytest.fixture(scope="module")
def server(lm):
    with serving(lm) as running:
        yield running


@pytest.fixture(scope="module")
def alone(lm):
    """Models by the names of the server's, each with plain weights and an engine of its own."""
    mixes = {NAME: (), **{f"{NAME}:{name}": ((name, 1.0),) for name in CONFIGS}}
    config = Engine.Config(blocks=128)
    return {name: LocalModel(merged(lm.module, mix), tokenizer(), name, config=config) for name, mix in mixes.items()}


def test_models_are_listed_and_found_by_name(server):
    listed = server.client.models.list().data
    assert [model.id for model in listed] == list(NAMES)
    assert server.client.models.retrieve(f"{NAME}:deep").id == f"{NAME}:deep"
    with pytest.raises(openai.NotFoundError, match="unknown model 'tiny:dep'; did you mean 'tiny:deep'") as found:
        server.client.completions.create(model=f"{NAME}:dep", prompt="x")
    assert (found.value.param, found.value.code) == ("model", "model_not_found")


def test_all_at_once_they_say_what_each_says_alone(server, alone):
    def ask(asked: tuple[str, str]) -> str:
        answer = server.client.completions.create(model=asked[0], prompt=asked[1], **GREEDY)
        assert answer.model == asked[0]
        return answer.choices[0].text

    asked = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(ask, asked))
    sampling = Sampling(max_new_tokens=16, temperature=0.0, ignore_eos=True)
    assert found == [alone[name].complete([prompt], sampling)[0].text for name, prompt in asked]
    assert len(set(found[: len(NAMES)])) == len(NAMES)
    assert server.settles()


def test_conversations_and_streams(server, alone):
    messages = [{"role": "user", "content": "quick"}]
    for name in NAMES:
        pieces = server.client.chat.completions.create(model=name, messages=messages, stream=True, **GREEDY)
        found = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
        assert found == alone[name].chat(messages, max_new_tokens=16, temperature=0.0, ignore_eos=True)


def test_vectors_are_the_adapter_s(server, alone):
    for name in NAMES:
        found = server.client.embeddings.create(model=name, input=PROMPTS).data
        assert np.abs(np.array([one.embedding for one in found]) - alone[name].embed(PROMPTS)).max() <= 1e-5


def test_the_first_is_asked_where_none_is_named(server, alone):
    sent = {"prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    answer = server.post("/v1/completions", json=sent).json()
    assert answer["model"] == NAME
    assert (
        answer["choices"][0]["text"]
        == alone[NAME].generate(PROMPTS[:1], max_new_tokens=16, temperature=0.0, ignore_eos=True)[0]
    )


def test_in_this_process_too(lm, alone):
    asked = {"max_new_tokens": 16, "temperature": 0.0, "ignore_eos": True}
    for name in CONFIGS:
        one, other = lm.with_adapter(name), alone[f"{NAME}:{name}"]
        assert one.name == other.name
        assert one.generate(PROMPTS, **asked) == other.generate(PROMPTS, **asked)
        assert "".join(one.stream(PROMPTS[0], Sampling(**asked))) == other.generate(PROMPTS[:1], **asked)[0]
        assert one.score(PROMPTS, [" dog", " fox", " {"]) == pytest.approx(
            other.score(PROMPTS, [" dog", " fox", " {"]), abs=1e-4
        )
        queue = one.queue()
        queue.ask(0, PROMPTS[0], Sampling(**asked))
        assert queue.answers()[0].text == other.generate(PROMPTS[:1], **asked)[0]
    with pytest.raises(InputError, match=re.escape("unknown adapter 'dep'; did you mean 'deep'?")):
        lm.with_adapter("dep")
