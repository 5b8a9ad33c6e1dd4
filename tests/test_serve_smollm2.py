"""The real SmolLM2 behind the server: what comes over HTTP equals what it says when asked directly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import serving

import allyouneed as ayn
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.local import LocalModel

NAME = "smollm2-135m-instruct"
ASKED = ["Name three fruits.", "What is 2 + 2?", "Say hello in French."]


@pytest.fixture(scope="module")
def loaded():
    return ayn.load(NAME)


@pytest.fixture(scope="module")
def server(loaded):
    encoder = ayn.load("all-minilm-l6-v2")
    lm = LocalModel(loaded.module, loaded.tokenizer, NAME, config=Engine.Config(blocks=256, max_batch=4))
    with serving(lm, embedder=encoder) as running:
        yield running


def test_chats_at_once(server, loaded):
    def answer(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        made = server.client.chat.completions.create(model=NAME, messages=messages, max_tokens=12, temperature=0)
        return made.choices[0].message.content

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(answer, ASKED))
    prompts = [loaded.chat_prompt([{"role": "user", "content": text}]) for text in ASKED]
    ids = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    for text, one in zip(found, ids, strict=True):
        steps = loaded.engine.steps([one], [Sampling(max_new_tokens=12, temperature=0)])
        assert text == loaded.tokenizer.decode([step.token for step in steps])


def test_remote_model_scores_as_the_local_one(server, loaded):
    remote = ayn.load(server.url)
    try:
        pairs = ["The capital of France is", "1, 2, 3,"], [" Paris", " 4"]
        assert remote.score(*pairs) == pytest.approx(loaded.score(*pairs), abs=2e-3)
        assert remote.generate(pairs[0], max_new_tokens=6, temperature=0.0) == loaded.generate(
            pairs[0], max_new_tokens=6, temperature=0.0
        )
    finally:
        remote.close()


def test_an_encoder_beside_it(server):
    names = [model.id for model in server.client.models.list()]
    assert names == [NAME, "all-minilm-l6-v2"]
    answer = server.client.embeddings.create(model="all-minilm-l6-v2", input=["a cat", "a kitten", "a tax form"])
    cat, kitten, form = (entry.embedding for entry in answer.data)
    assert sum(a * b for a, b in zip(cat, kitten, strict=True)) > sum(a * b for a, b in zip(cat, form, strict=True))
    long = server.post("/v1/embeddings", json={"model": "all-minilm-l6-v2", "input": "word " * 1000})
    assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"
    chat = server.post("/v1/completions", json={"model": "all-minilm-l6-v2", "prompt": "x"})
    assert chat.status_code == 400 and chat.json()["error"]["param"] == "model"


def test_tools_need_a_template_that_takes_them(server):
    tool = {"type": "function", "function": {"name": "f"}}
    sent = {"messages": [{"role": "user", "content": "x"}], "tools": [tool]}
    answer = server.post("/v1/chat/completions", json=sent)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"
