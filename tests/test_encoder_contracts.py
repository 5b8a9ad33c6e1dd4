"""What every registered encoder and every kind of positions in one must do; a new one is tested by being registered."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.generate.language_model import LanguageModel, Sampling
from allyouneed.generate.local_encoder import LocalEncoder
from allyouneed.models import bert
from allyouneed.models.checkpoints import huggingface
from allyouneed.models.checkpoints.loading import load_module, save
from allyouneed.models.encoder import Encoder, MaskedModel
from allyouneed.nn.block import PreNorm
from allyouneed.nn.norms import LayerNorm
from allyouneed.nn.positions import Alibi, Positions, RelativeBias

FAMILIES = {
    family.architecture: family.example
    for families in huggingface.FAMILIES.values()
    for family in families
    if isinstance(family.example, Encoder.Config)
}
POSITIONS = {
    f"positions {part.__name__}": bert.EXAMPLE.replace(positions=part.Config())
    for part in (Positions, *Positions.__subclasses__())
    if part not in (Alibi, RelativeBias)  # their bias is that of sight in one direction
}
PRE_NORM = bert.EXAMPLE.replace(
    blocks=(bert.EXAMPLE.blocks[0].replace(placement=PreNorm()),), norm=LayerNorm.Config(), types=0
)
CONFIGS = {**FAMILIES, **POSITIONS, "pre norm, no types": PRE_NORM}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> Encoder:
    return oracles.randomised(CONFIGS[request.param])


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 53, (rows, length), generator=torch.Generator().manual_seed(seed))


def outputs(model: Encoder, x: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
    """What the model says of each token: (B, T, …)."""
    found = model(x, **others)
    return found.logits if isinstance(model, MaskedModel) else found


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance


def test_forward_and_backward(model):
    x = ids(3, 12)
    types = torch.randint(0, model.config.types, (3, 12)) if model.config.types else None
    found = model(x, types=types)
    hidden = found.logits if isinstance(model, MaskedModel) else found
    assert hidden.shape[:2] == (3, 12) and hidden.isfinite().all()
    total = hidden.pow(3).mean()
    if isinstance(model, MaskedModel):
        assert hidden.shape[2] == 53 and found.pairs.shape == (3, 2)
        total = total + found.pairs.pow(2).sum()
    elif model.pooler is not None:
        total = total + model.pool(hidden).pow(2).sum()
    model.zero_grad()
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name.endswith("k.bias"), name
    model.zero_grad()


@torch.no_grad()
def test_later_and_earlier_tokens_are_seen(model):
    x = ids(1, 16)
    for changed_place, looked_at in ((13, 2), (2, 13)):
        changed = x.clone()
        changed[:, changed_place] = (x[:, changed_place] + 1) % 53
        assert (outputs(model, x)[:, looked_at] - outputs(model, changed)[:, looked_at]).abs().max() > 1e-4


@torch.no_grad()
def test_other_rows_do_not_matter(model):
    x = ids(5, 12)
    whole = outputs(model, x)
    for row in range(5):
        close(whole[row : row + 1], outputs(model, x[row : row + 1]))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(model, side):
    rows, width = [ids(1, n, seed=n)[0] for n in (5, 17, 1, 11)], 20
    padded, segments = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        padded[i, place], segments[i, place] = row, 1
    found = outputs(model, padded, segments=segments)
    assert found.isfinite().all()
    for i, row in enumerate(rows):
        close(found[i][segments[i] == 1], outputs(model, row[None])[0])


@torch.no_grad()
def test_packing_does_not_matter(model):
    parts = [ids(1, n, seed=n)[0] for n in (4, 7, 2)]
    packed = torch.cat([torch.zeros(2).long(), *parts, torch.zeros(3).long()])
    segments = torch.tensor([0] * 2 + [1] * 4 + [2] * 7 + [3] * 2 + [0] * 3)
    found = outputs(model, packed[None], segments=segments[None])[0]
    for number, part in enumerate(parts, 1):
        close(found[segments == number], outputs(model, part[None])[0])


@torch.no_grad()
def test_bfloat16(model):
    x = ids(1, 10)
    half = model.config.build().bfloat16().eval()
    half.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    found = outputs(half, x)
    assert found.dtype == torch.bfloat16
    scale = outputs(model, x).std()
    assert (found.float() - outputs(model, x)).abs().mean() <= 0.05 * scale


@torch.no_grad()
def test_saved_and_loaded(model, tmp_path):
    save(model, tmp_path)
    again = load_module(tmp_path)
    assert type(again) is type(model) and again.config == model.config and not again.training
    close(outputs(again, ids(2, 12)), outputs(model, ids(2, 12)), 0.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_config_survives_json(model):
    assert Config.from_json(model.config.to_json()) == model.config


def test_parameters_counted_on_meta(model):
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())


def test_local_encoder_is_a_language_model_that_only_embeds(model):
    module = model.config.replace(vocab_size=257, context=64).build().eval()
    lm = LocalEncoder(module, byte_tokenizer(), "tiny", batch=3)
    assert isinstance(lm, LanguageModel)
    texts = ["three", "a", "two words", "abcde", "x" * 200, "b"]
    vectors = lm.embed(texts)
    assert vectors.shape == (6, model.config.dim) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(lm.embed([text])[0], vector, atol=1e-5)
    assert lm.embed([]).shape == (0, model.config.dim)
    for ask in (
        lambda: lm.generate(["a"]),
        lambda: lm.complete(["a"], Sampling()),
        lambda: lm.stream("a", Sampling()),
        lambda: lm.chat([{"role": "user", "content": "a"}]),
        lambda: lm.chat_stream([{"role": "user", "content": "a"}], Sampling()),
        lambda: lm.score(["a"], ["b"]),
    ):
        with pytest.raises(InputError, match="tiny is an encoder: it cannot"):
            ask()
