"""What every registered decoder and every kind of positions must do; a new one is tested by being registered."""

from __future__ import annotations

import copy

import numpy as np
import oracles
import pytest
import torch

from allyouneed.core.config import Config
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import LanguageModel, Sampling
from allyouneed.generate.local import LocalModel
from allyouneed.models import llama, rwkv
from allyouneed.models.checkpoints import huggingface
from allyouneed.models.checkpoints.loading import load_module, save
from allyouneed.models.decoder import Decoder
from allyouneed.nn.attention import Attention, use_kernel
from allyouneed.nn.block import PostNorm
from allyouneed.nn.kernels import Tiled
from allyouneed.nn.moe import Experts, MoE
from allyouneed.nn.positions import Positions
from allyouneed.nn.routers import Top1, Top2


def with_heirs(kind: type) -> list[type]:
    return [kind, *(heir for child in kind.__subclasses__() for heir in with_heirs(child))]


FAMILIES = {
    family.model_type: family.example
    for families in huggingface.FAMILIES.values()
    for family in families
    if isinstance(family.example, Decoder.Config)  # translators are held to theirs in test_seq2seq
}
POSITIONS = {
    f"positions {part.__name__}": llama.EXAMPLE.replace(positions=part.Config()) for part in with_heirs(Positions)
}
POST_NORM = llama.EXAMPLE.replace(blocks=(llama.EXAMPLE.blocks[0].replace(placement=PostNorm()),))
SCALED = llama.EXAMPLE.replace(embedding_scale=3.0)
TILES = Tiled(queries=4, keys=4)
TILED = {
    f"{name} in tiles": {**FAMILIES, **POSITIONS}[name].with_kernel(TILES) for name in ("gpt_neo", "llama", "bloom")
}
TILED["positions RelativeBias in tiles"] = POSITIONS["positions RelativeBias"].with_kernel(TILES)
HYBRID = llama.EXAMPLE.replace(blocks=(*rwkv.EXAMPLE.blocks, *llama.EXAMPLE.blocks))
ARRANGED = {"post norm": POST_NORM, "scaled embeddings": SCALED, "states and keys": HYBRID}
ROUTERS = {
    f"router {router.__name__}": llama.EXAMPLE.replace(
        blocks=(
            llama.EXAMPLE.blocks[0],
            llama.EXAMPLE.blocks[0].replace(
                channel=MoE.Config(router=router.Config(), experts=Experts.Config(num_experts=3, hidden_dim=20))
            ),
        )
    )
    for router in (Top1, Top2)
}
CONFIGS = {**FAMILIES, **POSITIONS, **ROUTERS, **ARRANGED, **TILED}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> Decoder:
    return oracles.randomised(CONFIGS[request.param])


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 53, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance


def test_forward_and_backward(model):
    x = ids(2, 12)
    logits = model(x).logits
    assert logits.shape == (2, 12, 53) and logits.isfinite().all()
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name.endswith("k.bias"), (
            name
        )  # softmax does not see a shift of all keys
    model.zero_grad()


@torch.no_grad()
def test_no_token_sees_a_later_one(model):
    x, model = ids(1, 16), copy.deepcopy(model).double()
    changed = x.clone()
    changed[:, 9:] = ids(1, 7, seed=1)
    logits, others = model(x).logits, model(changed).logits
    close(logits[:, :9], others[:, :9], 1e-12)
    assert (logits[:, 9:] - others[:, 9:]).abs().max() > 1e-3


@torch.no_grad()
def test_earlier_tokens_matter(model):
    x = ids(1, 16)
    changed = x.clone()
    changed[:, 13] = (x[:, 13] + 1) % 53
    assert (model(x).logits[:, 15] - model(changed).logits[:, 15]).abs().max() > 1e-4


@torch.no_grad()
def test_other_rows_do_not_matter(model):
    x = ids(5, 12)
    whole = model(x).logits
    for row in range(5):
        close(whole[row : row + 1], model(x[row : row + 1]).logits)


@torch.no_grad()
@pytest.mark.parametrize("steps", [[1] * 12, [5, 7], [4, 1, 1, 6], [12]])
def test_cached_equals_uncached(model, steps):
    x = ids(2, 12)
    cache = model.new_cache(2, 12)
    pieces = []
    for piece in x.split(steps, 1):
        pieces.append(model(piece, cache=cache).logits)
    close(torch.cat(pieces, 1), model(x).logits)


@torch.no_grad()
def test_rows_of_unequal_length_share_a_cache(model):
    rows = [ids(1, n, seed=n)[0] for n in (3, 9, 1)]
    new = ids(3, 4, seed=5)
    cache = model.new_cache(3, 13)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    model(padded, cache=cache, counts=torch.tensor([len(row) for row in rows]))
    logits = model(new, cache=cache).logits
    fork, kept = cache.lengths.clone(), torch.tensor([2, 0])
    cache.select(kept)
    assert cache.lengths.tolist() == fork[kept].tolist()
    last = model(new[kept, :1], cache=cache).logits
    for i, row in enumerate(rows):
        close(logits[i], model(torch.cat((row, new[i]))[None]).logits[0, len(row) :])
    for place, i in enumerate(kept.tolist()):
        close(last[place, 0], model(torch.cat((rows[i], new[i], new[i, :1]))[None]).logits[0, -1])


@torch.no_grad()
def test_alternatives_do_not_see_each_other(model):
    context, ends = ids(1, 6), [ids(1, n, seed=n)[0] for n in (3, 1, 4)]
    cache = model.new_cache(1, 14)
    model(context, cache=cache)
    segments = torch.tensor([[1] * 3 + [2] + [3] * 4])
    logits = model(torch.cat(ends)[None], segments=segments, cache=cache).logits[0]
    for number, end in enumerate(ends, 1):
        whole = model(torch.cat((context[0], end))[None]).logits[0, 6:]
        close(logits[segments[0] == number], whole)


@torch.no_grad()
def test_padding_and_packing_do_not_matter(model):
    parts = [ids(1, n, seed=n)[0] for n in (4, 7, 2)]
    packed = torch.cat([torch.zeros(2).long(), *parts, torch.zeros(3).long()])
    segments = torch.tensor([0] * 2 + [1] * 4 + [2] * 7 + [3] * 2 + [0] * 3)
    logits = model(packed[None], segments=segments[None]).logits[0]
    for number, part in enumerate(parts, 1):
        close(logits[segments == number], model(part[None]).logits[0])


@torch.no_grad()
def test_bfloat16(model):
    x = ids(1, 10)
    half = model.config.build().bfloat16().eval()
    half.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    logits = half(x).logits
    assert logits.dtype == torch.bfloat16
    scale = model(x).logits.std()
    assert (logits.float() - model(x).logits).abs().mean() <= 0.05 * scale


@torch.no_grad()
def test_saved_and_loaded(model, tmp_path):
    save(model, tmp_path)
    again = load_module(tmp_path)
    for kernel in {part.kernel for part in model.modules() if isinstance(part, Attention)}:
        use_kernel(again, kernel)  # which is no part of a checkpoint
    x = ids(2, 12)
    close(again(x).logits, model(x).logits, 0.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not again.training


def test_config_survives_json(model):
    assert Config.from_json(model.config.to_json()) == model.config


def test_parameters_counted_on_meta(model):
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_greedy_generation_is_argmax_of_forward(model):
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (3, 8)]
    produced: list[list[int]] = [[], []]
    for step in Engine(model).steps(prompts, [Sampling(max_new_tokens=6, temperature=0)] * 2):
        produced[step.request].append(step.token)
    for prompt, tokens in zip(prompts, produced, strict=True):
        logits = model(torch.tensor([prompt + tokens])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def test_local_model_is_a_language_model(model):
    module = model.config.replace(vocab_size=257, context=64).build().eval()
    lm = LocalModel(module, byte_tokenizer(), "tiny")
    assert isinstance(lm, LanguageModel)
    assert lm.generate(["ab", "c"], max_new_tokens=4, seed=1) == lm.generate(["ab", "c"], max_new_tokens=4, seed=1)
    vectors = lm.embed(["one", "two", "three"])
    assert vectors.shape == (3, model.config.dim) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    one, both = lm.score(["ab"], ["cd"])[0], lm.score(["ab", "abc"], ["c", "d"])
    assert abs(one - sum(both)) <= 1e-4
