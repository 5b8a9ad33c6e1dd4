"""Our decoders against `transformers`: logits, gradients, files both ways, padding and packing, generation."""

from __future__ import annotations

import json
from pathlib import Path

import oracles
import pytest
import torch
import transformers

from allyouneed.core.errors import InputError
from allyouneed.generate.beams import beam_search, gnmt, power
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.models.checkpoints import huggingface

TOLERANCE = 1e-4
VARIANTS = {
    **{name: (make, {}) for name, make in oracles.ALL.items()},
    "gpt2 gelu, odd hidden, untied": (
        oracles.gpt2,
        {"activation_function": "gelu", "n_inner": 77, "tie_word_embeddings": False},
    ),
    "llama tied, biased, wide heads": (
        oracles.llama,
        {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 14, "num_key_value_heads": 3},
    ),
    "llama one kv head, other base": (
        oracles.llama,
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "gpt_neox one branch after the other": (oracles.gpt_neox, {"use_parallel_residual": False}),
    "gpt_neox half turned, other base, tied, no attention bias": (
        oracles.gpt_neox,
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
            "attention_bias": False,
            "hidden_act": "gelu_new",
        },
    ),
    "mixtral one expert a token, tied": (oracles.mixtral, {"num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "mixtral three of four experts, other base": (
        oracles.mixtral,
        {
            "num_experts_per_tok": 3,
            "num_local_experts": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "bloom 10 heads": (oracles.bloom, {"hidden_size": 40, "n_head": 10}),
}


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def pair(request, tmp_path_factory):
    """A random model of theirs, and ours read from the folder that it was saved to."""
    make, changes = VARIANTS[request.param]
    theirs = make(**changes)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, huggingface.load(folder)


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
def test_logits(pair):
    theirs, ours = pair
    x = ids(2, 40)
    expected = theirs(x).logits
    assert expected.std() > 0.1  # else equality would say nothing
    assert difference(expected, ours(x).logits) <= TOLERANCE


def test_gradients_of_one_step(pair):
    theirs, ours = pair
    x = ids(2, 24, seed=1)
    their_loss = theirs(x, labels=x, use_cache=False).loss  # RWKV's cache is written in place, against autograd
    theirs.zero_grad()
    their_loss.backward()
    ours.zero_grad()
    logits = ours(x).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    loss.backward()
    assert abs(their_loss.item() - loss.item()) <= TOLERANCE
    (family,) = huggingface.FAMILIES[theirs.config.model_type]
    rules = family.rules(ours.config)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    mapped = huggingface.to_theirs(rules, ours.config.layers, gradients)
    theirs_by_name = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    expected = oracles.on_disk(theirs.config.model_type, theirs_by_name)
    assert set(mapped) == set(expected)
    for name, gradient in mapped.items():
        assert difference(gradient, expected[name]) <= TOLERANCE, name
    ours.zero_grad()


@torch.no_grad()
def test_their_loader_reads_what_we_save(pair, tmp_path):
    theirs, ours = pair
    huggingface.save(ours, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(theirs)
    x = ids(2, 30)
    assert difference(theirs(x).logits, again(x).logits) <= TOLERANCE
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@torch.no_grad()
def test_shards_both_ways(pair, tmp_path):
    theirs, ours = pair
    huggingface.save(ours, tmp_path, max_shard_bytes=60_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    x = ids(1, 20)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert difference(theirs(x).logits, again(x).logits) <= TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert difference(theirs(x).logits, huggingface.load(tmp_path / "theirs")(x).logits) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_single_sequences(pair, side):
    _, ours = pair
    rows = [ids(1, n, seed=n)[0] for n in (5, 17, 1, 11)]
    width = 20
    padded, segments = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        padded[i, place], segments[i, place] = row, 1
    logits = ours(padded, segments=segments).logits
    assert logits.isfinite().all()
    for i, row in enumerate(rows):
        assert difference(logits[i][segments[i] == 1], ours(row[None]).logits[0]) <= TOLERANCE


@torch.no_grad()
def test_packed_rows_equal_single_sequences(pair):
    _, ours = pair
    documents = [ids(1, n, seed=n)[0] for n in (5, 17, 1, 11)]
    segments = torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents, 1)] + [torch.zeros(3).long()])
    packed = torch.cat([*documents, torch.zeros(3).long()])
    logits = ours(packed[None], segments=segments[None]).logits[0]
    for i, document in enumerate(documents, 1):
        assert difference(logits[segments == i], ours(document[None]).logits[0]) <= TOLERANCE


def test_greedy_tokens_equal_theirs(pair):
    theirs, ours = pair
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (5, 9, 1)]
    greedy = Sampling(max_new_tokens=12, temperature=0)
    produced: list[list[int]] = [[], [], []]
    for step in Engine(ours).steps(prompts, [greedy] * 3):
        produced[step.request].append(step.token)
    for prompt, tokens in zip(prompts, produced, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert out[0, len(prompt) :].tolist() == tokens


def test_beams_equal_theirs(pair):
    theirs, ours = pair
    prompt = ids(1, 6, seed=3)
    out = theirs.generate(
        prompt,
        max_new_tokens=10,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=2,
        pad_token_id=0,
        use_cache=False,  # RWKV's is not reordered as beams fork
    )
    hypotheses = beam_search(Engine(ours, [2]), prompt[0].tolist(), beams=4, max_new_tokens=10, penalty=power(1.0))
    for hypothesis, sequence, score in zip(hypotheses, out.sequences, out.sequences_scores.tolist(), strict=True):
        produced, end = sequence[6:].tolist(), len(hypothesis.tokens)
        assert list(hypothesis.tokens) == produced[:end] and not any(produced[end:])  # the rest is padding
        assert abs(hypothesis.score - score) <= TOLERANCE


def test_beam_scores_are_the_models_own(pair):
    _, ours = pair
    prompt = ids(1, 6, seed=4)[0].tolist()
    for hypothesis in beam_search(Engine(ours, [2]), prompt, beams=3, max_new_tokens=6, penalty=gnmt(0.6)):
        whole = torch.tensor([prompt + list(hypothesis.tokens)])
        logprobs = ours(whole).logits.detach().double().log_softmax(-1)[0, len(prompt) - 1 : -1]
        total = logprobs.gather(1, whole[0, len(prompt) :, None]).sum().item()
        assert abs(total - hypothesis.logprob) <= TOLERANCE
        assert abs(hypothesis.score - total / ((5 + len(hypothesis.tokens)) / 6) ** 0.6) <= TOLERANCE


def test_config_and_weights_must_belong_together(tmp_path: Path):
    oracles.llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    for field, value in (("hidden_size", 64), ("num_hidden_layers", 4), ("num_attention_heads", 0), ("vocab_size", 98)):
        path.write_text(json.dumps(json.loads(text) | {field: value}))
        with pytest.raises(InputError, match=r"config\.json"):
            huggingface.load(tmp_path)
