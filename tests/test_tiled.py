"""Attention in tiles against its softmax in float64, and as a part of models; views against their rules spelled out."""

from __future__ import annotations

import json
import subprocess
import sys

import attention_cases
import oracles
import pytest
import torch
from attention_cases import KINDS, random_case

from allyouneed.core.errors import InputError
from allyouneed.models import bert, llama, marian, t5
from allyouneed.models.checkpoints.loading import save
from allyouneed.nn.attention import Attention, use_kernel
from allyouneed.nn.kernels import Tiled
from allyouneed.nn.positions import Positions, RelativeBias
from allyouneed.nn.recomputed import attend
from allyouneed.nn.sight import whole_rows
from allyouneed.nn.tiled import PlainTiles

SIZES = ((16, 16), (16, 32), (7, 5), (64, 128))


@pytest.mark.parametrize("kind", KINDS)
def test_views_follow_their_rules(kind):
    for seed in range(40):
        case = random_case(seed, kind)
        queries, keys = case.seen.shape[1:]
        whole = case.view.tile(slice(None), slice(None)).expand(len(case.q), case.q.shape[1], queries, keys)
        bias = torch.zeros(()) if case.bias is None else case.bias
        assert torch.equal(whole, torch.where(case.seen[:, None], bias, -torch.inf).expand_as(whole)), str(case)
        assert case.view.mask is None or torch.equal(case.view.mask.expand_as(whole), whole)
        part = case.view.tile(slice(queries // 2, None), slice(keys // 3, keys)).expand(*whole.shape[:2], -1, -1)
        assert torch.equal(part.expand(-1, -1, queries - queries // 2, -1), whole[:, :, queries // 2 :, keys // 3 :])


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_miss_no_key_that_is_seen(kind):
    for seed in range(40):
        case = random_case(seed, kind)
        for span in case.view.spans(case.seen.shape[1], 16):
            seen, read = case.seen[:, span.rows], torch.zeros(case.seen.shape[2], dtype=torch.bool)
            for columns, whole in span.tiles(8):
                read[columns] = True
                assert not whole or seen[:, :, columns].all(), str(case)
            assert not seen[:, :, ~read].any(), str(case)


@pytest.mark.parametrize("kind", KINDS)
def test_in_float64(kind):
    """fp32: no element of output or gradients further than 1e-5 from the softmax in float64."""
    for seed in range(24):
        case, size = random_case(seed, kind), SIZES[seed % len(SIZES)]
        leaves = case.leaves()
        out, logsumexp = attend(PlainTiles(*size), *leaves, case.view)
        found = [out, *torch.autograd.grad(out, leaves, case.gradient)]
        for a, b in zip(found, case.expected(), strict=True):
            assert a.isfinite().all() and (a - b).abs().max() <= 1e-5, str(case)
        empty = ~case.seen.any(-1)[:, None].expand(out.shape[:3])
        assert torch.equal(logsumexp.isneginf(), empty) and not out[empty].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision(kind, dtype):
    """Nothing but the last rounding is lost: half a unit in the last place, as of the softmax in float64."""
    for seed in range(12):
        case = random_case(seed, kind).to(dtype)
        leaves = case.leaves()
        out, _ = attend(PlainTiles(16, 16), *leaves, case.view)
        for found, b in zip((out, *torch.autograd.grad(out, leaves, case.gradient)), case.expected(), strict=True):
            assert found.dtype == dtype
            assert ((found - b).abs() <= torch.finfo(dtype).eps / 2 * b.abs() + 1e-5 * b.abs().max().clamp(min=1)).all()


def test_gradients_by_differences():
    for kind in KINDS:
        case = random_case(3, kind, longest=17, head_dims=(3,)).to(torch.float64)
        assert torch.autograd.gradcheck(
            lambda q, k, v, view=case.view: attend(PlainTiles(5, 4), q, k, v, view, scale=0.7)[0], case.leaves()
        )


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_learned_biases_have_their_gradient_tile_by_tile(kv_heads):
    torch.manual_seed(0)
    config = Attention.Config(num_heads=4, num_kv_heads=kv_heads)
    plain, tiled = config.build(24), config.replace(kernel=Tiled(queries=16, keys=8)).build(24)
    tiled.load_state_dict(plain.state_dict())
    positions = RelativeBias.Config(num_buckets=8, max_distance=30).build(dim=24, num_heads=4, head_dim=6, context=64)
    x, gradient = torch.randn(2, 41, 24), torch.randn(2, 41, 24)
    outs = [part(x, whole_rows(positions, x)) for part in (plain, tiled)]
    assert (outs[0] - outs[1]).abs().max() <= 1e-5
    sides = [
        torch.autograd.grad(out, (positions.embedding.weight, *part.parameters()), gradient)
        for part, out in zip((plain, tiled), outs, strict=True)
    ]
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(*sides, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("config", [t5.EXAMPLE, marian.EXAMPLE, bert.EXAMPLE], ids=["t5", "marian", "bert"])
def test_models_that_read_both_ways_and_remember(config):
    """Encoders, memories with padding, learned biases of both stacks: as with PyTorch's kernel."""
    module = oracles.randomised(config)
    ids = torch.randint(3, 50, (3, 13), generator=torch.Generator().manual_seed(0))
    segments = torch.ones_like(ids)
    segments[1, 5:] = segments[2, 12:] = 0
    given = (ids, segments) if config is bert.EXAMPLE else (ids, ids[:, :9], segments, segments[:, :9])
    expected = module(*given).logits
    use_kernel(module, Tiled(queries=4, keys=4))
    assert (module(*given).logits - expected).abs().max() <= 1e-4


def test_under_autocast_sums_stay_exact():
    case = random_case(1, "packed").to(torch.bfloat16)
    leaves = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attend(PlainTiles(16, 16), *leaves, case.view)
        gradients = torch.autograd.grad(out, leaves, case.gradient)
    plain, _ = attend(PlainTiles(16, 16), *leaves, case.view)
    assert torch.equal(out, plain)
    expected = torch.autograd.grad(plain, leaves, case.gradient)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_what_tiles_cannot_do_is_refused():
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 3, 3, 8)
    view = whole_rows(Positions.Config().build(dim=32, num_heads=4, head_dim=8, context=8), torch.zeros(1, 3)).view(
        None
    )
    with pytest.raises(InputError, match="Tiled: queries, keys and values have head_dim 8, 6, 8"):
        Tiled()(q, q[..., :6], q, view)
    with pytest.raises(InputError, match="tiles of 0 × 256; at least 1 × 1"):
        Tiled(queries=0)
    with pytest.raises(InputError, match="Tiled: queries, keys and values have 4, 3, 3 heads"):
        Tiled()(q, k, k, view)
    with pytest.raises(InputError, match=r"Tiled has no dropout of the attention weights; dropout=0\.1 needs Sdpa"):
        Tiled()(q, q, q, view, dropout=0.1)
    assert len(attention_cases.KIND) == len(KINDS)


PROGRAM = """
import sys, torch
from allyouneed.nn.kernels import Tiled, attention_weights
from allyouneed.nn.positions import Positions
from allyouneed.nn.sight import whole_rows

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

def attend(length, kernel):
    part = Positions.Config().build(dim=64, num_heads=1, head_dim=64, context=length)
    q, k, v = torch.randn(3, 1, 1, length, 64).requires_grad_()
    out = kernel(q, k, v, whole_rows(part, q.transpose(1, 2)).view(None))
    torch.autograd.grad(out.sum(), (q, k, v))

def naive(q, k, v, view):
    return attention_weights(q, k) @ v  # without the mask, which would be one matrix more

kernel = {"naive": naive, "tiled": Tiled()}[sys.argv[1]]
attend(64, kernel)  # libraries are loaded, threads started
before = status("VmRSS")
attend(8192, kernel)
print(status("VmHWM") - before)
"""


def test_memory_at_8192_tokens_is_a_twentieth_of_the_naive_one():
    """Resident memory of a fresh process at its highest, forward and backward, beyond what stood before."""
    naive, tiled = (
        float(subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True).stdout)
        for way in ("naive", "tiled")
    )
    assert naive > 2**8  # MiB: one matrix of scores alone
    assert tiled <= naive / 20


def test_a_kernel_does_not_change_the_layout_on_disk(tmp_path):
    config = llama.EXAMPLE.with_kernel(Tiled())
    save(config.build(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
