"""The real SmolLM2 from its GGUF beside `transformers` reading the same file."""

from __future__ import annotations

import pytest
import torch
import transformers

import allyouneed as ayn
from allyouneed.data import materials
from allyouneed.generate.language_model import Sampling

NAME = "smollm2-135m-instruct"
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 4, 5,",
    "Der schnelle braune Fuchs",
    "Photosynthesis is the process by which",
    "Q: What is 12 + 7?\nA:",
    "SELECT name FROM users WHERE",
    "The theory of relativity was",
    "Dear Sir or Madam,",
    "水は",
    "<|im_start|>user\nName three fruits.<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def theirs():
    path = materials.path(NAME)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def lm():
    return ayn.load(NAME)


@torch.inference_mode()
@pytest.mark.parametrize("packed", [True, False])
def test_logits(theirs, lm, packed):
    module = lm.module if packed else ayn.load_module(NAME)
    worst = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([lm.tokenizer.encode(prompt)])
        worst = max(worst, (module(ids).logits - theirs(ids).logits).abs().max().item())
    print(f"largest difference of logits, packed={packed}: {worst:.1e}")
    assert worst <= 2e-3


@torch.inference_mode()
def test_greedy_continuations(theirs, lm):
    greedy = Sampling(max_new_tokens=48, temperature=0, ignore_eos=True)
    ours = lm.complete(PROMPTS, greedy)
    rows = [lm.tokenizer.encode(prompt) for prompt in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=48,
        min_new_tokens=48,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    for completion, sequence in zip(ours, out[:, width:].tolist(), strict=True):
        assert list(completion.token_ids) == sequence


def test_chat_uses_the_models_own_template(lm):
    messages = [{"role": "user", "content": "Hi"}]
    path = materials.path(NAME)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert lm.chat_prompt(messages) == expected
    assert lm.chat(messages, max_new_tokens=16, temperature=0.0)


def test_exported_model_is_the_same_for_transformers(theirs, lm, tmp_path):
    ayn.save(ayn.load_module(NAME), tmp_path, lm.tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(PROMPTS[2], return_tensors="pt").input_ids
    assert ids[0].tolist() == lm.tokenizer.encode(PROMPTS[2])
    with torch.inference_mode():
        assert (again(ids).logits - theirs(ids).logits).abs().max() <= 1e-4
