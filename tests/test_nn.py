"""Single parts against their equations in float64 or against `transformers`."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from allyouneed.core.errors import InputError
from allyouneed.nn.attention import Attention
from allyouneed.nn.initialise import Xavier
from allyouneed.nn.norms import LayerNorm, RMSNorm, weight_normalised
from allyouneed.nn.positions import Alibi, Positions, RelativeBias, Rotary, Sinusoidal
from allyouneed.nn.sight import Sight, whole_rows, within_segments

SIZES = {"dim": 24, "num_heads": 4, "head_dim": 6, "context": 32}


def line(length: int) -> torch.Tensor:
    return torch.arange(length)[None]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 8, 12, 16, 20, 71])
def test_alibi_slopes_are_blooms(heads):
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert (
        Alibi.Config().build(dim=heads, num_heads=heads, head_dim=1, context=1).slopes() - theirs
    ).abs().max() <= 1e-6


def test_alibi_bias_is_minus_slope_times_distance():
    part = Alibi.Config().build(**SIZES)
    bias = part.bias(torch.tensor([[7]]), line(8))[0, :, 0]
    for head, slope in enumerate([1 / 4, 1 / 16, 1 / 64, 1 / 256]):
        assert bias[head].tolist() == [-slope * (7 - key) for key in range(8)]


@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20), (16, 64)])
def test_relative_buckets_are_t5s(buckets, far):
    part = RelativeBias.Config(num_buckets=buckets, max_distance=far).build(**SIZES)
    distance = torch.arange(-5, 400)
    theirs = T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=buckets, max_distance=far
    )
    assert torch.equal(part.buckets(distance), theirs)


def test_sinusoids_follow_the_formula():
    part = Sinusoidal.Config().build(**SIZES)
    found = part.embed(torch.ones(1, 50, 24), line(50))[0].double() - 1
    for position in (0, 1, 7, 49):
        for i in range(12):
            angle = position / 10000 ** (2 * i / 24)
            assert abs(found[position, 2 * i] - math.sin(angle)) <= 1e-5
            assert abs(found[position, 2 * i + 1] - math.cos(angle)) <= 1e-5


@pytest.mark.parametrize("fraction", [1.0, 1 / 3])
def test_rotary_scores_depend_on_distance_alone(fraction):
    part = Rotary.Config(fraction=fraction).build(**SIZES)
    q, k = torch.randn(2, 1, 1, 1, 6, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        turned = [part.turn(x, part.rotation(torch.tensor([[p]]))) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()

    assert abs(score(3, 1) - score(20, 18)) <= 1e-5
    assert abs(score(3, 1) - score(3, 2)) > 1e-4


@pytest.mark.parametrize("fraction", [1.0, 1 / 3, 0.0])
def test_rotary_turns_pairs_and_its_gradient_turns_back(fraction):
    part = Rotary.Config(fraction=fraction).build(**SIZES)
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    rotation = part.rotation(torch.arange(5).expand(2, -1) + torch.tensor([[0], [7]]))
    expected, half = x.double().clone(), part.rotated // 2
    for row, first in enumerate((0, 7)):
        for token in range(5):
            for i in range(half):
                angle = (first + token) * 10000 ** (-i / half)
                a, b = x[row, :, token, i].double(), x[row, :, token, i + half].double()
                expected[row, :, token, i] = a * math.cos(angle) - b * math.sin(angle)
                expected[row, :, token, i + half] = b * math.cos(angle) + a * math.sin(angle)
    assert (part.turn(x, rotation) - expected).abs().max() <= 1e-5
    turned = part.turn(x.requires_grad_(), rotation)
    assert torch.equal(turned, part.turn(x.detach(), rotation))
    (gradient,) = torch.autograd.grad(turned, x, turned.detach())
    assert (gradient - x).abs().max() <= 1e-5
    assert torch.autograd.gradcheck(lambda y: part.turn(y, rotation), x.detach().double().requires_grad_())


def test_norms_in_float64():
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)) * 3 + 1
    layer, rms = LayerNorm.Config().build(24), RMSNorm.Config().build(24)
    wide = x.double()
    expected = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert (layer(x) - expected).abs().max() <= 1e-5
    assert (rms(x) - wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", [(2, 5, 24), (7, 24), (24,)])
def test_rms_norms_gradient_is_pytorchs(shape):
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, *shape, generator=generator) * 3 + 1
    part = RMSNorm.Config(eps=0.1).build(24)
    with torch.no_grad():
        part.weight.normal_(1.0, 0.3, generator=generator)
    x.requires_grad_()
    found = part(x)
    expected = torch.nn.functional.rms_norm(x, (24,), part.weight, 0.1)
    assert (found - expected).abs().max() <= 1e-5
    assert torch.equal(part(x.detach()), expected)  # PyTorch's own kernel, where no gradient is asked for
    leaves = (x, part.weight)
    sides = (torch.autograd.grad(y, leaves, gradient) for y in (found, expected))
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(*sides, strict=True))
    assert torch.autograd.gradcheck(part.double(), x.detach().double().requires_grad_())


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_attention_in_float64(window, kv_heads):
    torch.manual_seed(0)
    config = Attention.Config(num_heads=4, num_kv_heads=kv_heads, window=window, bias=True, out_bias=True, scale=0.7)
    part, positions = config.build(24), Alibi.Config().build(**SIZES)
    x = torch.randn(2, 9, 24)
    found = part(x, whole_rows(positions, x))
    wide = part.double()
    q, k, v = (layer(x.double()).unflatten(-1, (-1, 6)) for layer in (wide.q, wide.k, wide.v))  # (B, T, H, D)
    out = torch.zeros(2, 9, 4, 6, dtype=torch.double)
    for b in range(2):
        for h in range(4):
            shared = h // (4 // kv_heads)
            for t in range(9):
                first = 0 if window is None else max(0, t - window + 1)
                keys = range(first, t + 1)
                scores = [q[b, t, h] @ k[b, s, shared] * 0.7 - 2.0 ** (-2 * (h + 1)) * (t - s) for s in keys]
                weights = torch.stack(scores).softmax(0)
                out[b, t, h] = sum(w * v[b, s, shared] for w, s in zip(weights, keys, strict=True))
    assert (found - wide.out(out.flatten(2))).abs().max() <= 1e-5


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_with_a_learned_bias_is_sdpas(kv_heads, scale):
    """Ours is spelled out where the bias has a gradient; SDPA's fallback is its twin."""
    torch.manual_seed(0)
    part = Attention.Config(num_heads=4, num_kv_heads=kv_heads, scale=scale).build(24)
    positions = RelativeBias.Config().build(**SIZES)
    x, gradient = torch.randn(2, 9, 24), torch.randn(2, 9, 24)
    leaves = (positions.embedding.weight, *part.parameters())
    found = part(x, whole_rows(positions, x))
    mask = whole_rows(positions, x).view(None).mask
    q, k, v = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (part.q, part.k, part.v))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    expected = part.out(attended.transpose(1, 2).flatten(2))
    assert mask.requires_grad and (found - expected).abs().max() <= 1e-5
    sides = (torch.autograd.grad(y, leaves, gradient) for y in (found, expected))
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(*sides, strict=True))
    with torch.no_grad():
        assert (part(x, whole_rows(positions, x)) - expected).abs().max() <= 1e-5


def test_segments_see_their_own_document_only():
    part = Positions.Config().build(**SIZES)
    sight = within_segments(part, torch.tensor([[0, 1, 1, 2, 2, 2, 0]]))
    assert isinstance(sight, Sight) and sight.queries.tolist() == [[0, 0, 1, 0, 1, 2, 0]]
    seen = sight.view(None).mask[0, 0].isfinite()
    assert [row.nonzero().flatten().tolist() for row in seen] == [[0], [1], [1, 2], [3], [3, 4], [3, 4, 5], [6]]
    assert sight.view(2).mask[0, 0].isfinite()[5].nonzero().flatten().tolist() == [4, 5]


def test_impossible_heads_are_refused():
    with pytest.raises(InputError, match="num_heads=5 does not divide dim=24"):
        Attention.Config(num_heads=5).build(24)
    with pytest.raises(InputError, match="num_kv_heads=3 does not divide num_heads=4"):
        Attention.Config(num_heads=4, num_kv_heads=3).build(24)


@torch.no_grad()
def test_xavier_begins_matrices_by_their_sides_and_ends_tied_heads_as_embeddings():
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"wide": torch.nn.Linear(300, 700), "embedding": torch.nn.Embedding(900, 400)})
    module["head"] = torch.nn.Linear(400, 900, bias=False)
    module["head"].weight = module["embedding"].weight
    Xavier().apply(module, 1)
    assert abs(module["wide"].weight.std().item() / (2 / 1000) ** 0.5 - 1) <= 0.01
    assert abs(module["head"].weight.std().item() / 400**-0.5 - 1) <= 0.01
    assert module["wide"].bias.abs().max() == 0


@torch.no_grad()
def test_weight_normalised_rows_are_torchs():
    torch.manual_seed(0)
    v, gain = torch.randn(5, 7), torch.randn(5)
    assert (weight_normalised(v, gain) - torch._weight_norm(v, gain[:, None], 0)).abs().max() <= 1e-6
