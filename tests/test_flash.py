"""The Triton kernels, interpreted, against the softmax in float64; and compiled for a GPU that is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
import triton
from attention_cases import KINDS, Case, random_case
from torch import Tensor
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from allyouneed.core.errors import InputError
from allyouneed.models import llama
from allyouneed.nn import flash
from allyouneed.nn.kernels import Flash
from allyouneed.nn.positions import Positions, RelativeBias
from allyouneed.nn.recomputed import attend
from allyouneed.nn.sight import whole_rows

TILES = ((16, 16), (32, 16), (16, 32), (32, 32))
SHAPES = 24  # of each of the nine kinds: 216
KERNELS = (flash.FORWARD_TUNED, flash.QUERIES_TUNED, flash.KEYS_TUNED)


@pytest.fixture
def tile(monkeypatch):
    """Choose a tile, which the interpreter cannot tune."""

    def choose(number: int) -> None:
        m, n = TILES[number % len(TILES)]
        for kernel in KERNELS:
            monkeypatch.setattr(kernel, "configs", [triton.Config({"M": m, "N": n})])

    return choose


def cases(kind: str) -> Iterator[tuple[int, Case]]:
    return ((seed, random_case(seed, kind, longest=40, pairs=2 if seed % 8 else 4)) for seed in range(SHAPES))


def unrounded(case: Case) -> list[Tensor]:
    """Output and gradients in float32, before they are rounded to the type of the inputs."""
    tiles, scale = flash.FlashTiles(), case.q.shape[-1] ** -0.5
    out, level = tiles.forward(case.q, case.k, case.v, case.view, scale)
    sums = (out * case.gradient).sum(-1)
    return [out, *tiles.backward(case.q, case.k, case.v, case.view, scale, case.gradient, level, sums, ())]


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind, tile):
    """No element of the output or of a gradient is further than 1e-5 from the softmax in float64."""
    for seed, case in cases(kind):
        tile(seed)
        leaves = case.leaves()
        out, logsumexp = attend(flash.FlashTiles(), *leaves, case.view)
        found = [out, *torch.autograd.grad(out, leaves, case.gradient)]
        for a, b in zip(found, case.expected(), strict=True):
            assert a.isfinite().all() and (a - b).abs().max() <= 1e-5, str(case)
        empty = ~case.seen.any(-1)[:, None].expand(out.shape[:3])
        assert torch.equal(logsumexp.isneginf(), empty) and not out[empty].any()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, tile):
    """Of bfloat16 and float16 inputs, no element of the output or of a gradient, before the last rounding, is further
    from the softmax in float64 than 2e-3 of the largest element.
    """
    for seed, case in cases(kind):
        tile(seed)
        case = case.to((torch.bfloat16, torch.float16)[seed % 2])
        for a, b in zip(unrounded(case), case.expected(), strict=True):
            assert a.dtype == torch.float32 and a.isfinite().all()
            assert (a - b).abs().max() <= 2e-3 * b.abs().max() + 1e-6, str(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(dtype):
    case = random_case(5, "packed", longest=40, pairs=2).to(dtype)
    leaves = case.leaves()
    out, _ = attend(flash.FlashTiles(), *leaves, case.view)
    found = [out, *torch.autograd.grad(out, leaves, case.gradient)]
    for a, b in zip(found, case.expected(), strict=True):
        assert a.dtype == dtype
        assert ((a - b).abs() <= torch.finfo(dtype).eps / 2 * b.abs() + 1e-5).all()


@pytest.fixture
def tf32(monkeypatch):
    """Products that ask for TF32 get what a GPU has and the interpreter has not: factors of ten binary digits. How
    many were rounded.
    """
    rounded, exact = [], InterpreterBuilder.create_dot

    def dot(self, a, b, d, input_precision, most):
        if input_precision == INPUT_PRECISION.TF32:
            a, b = (TensorHandle(to_tf32(x.data), x.dtype) for x in (a, b))
            rounded.append(a)
        return exact(self, a, b, d, input_precision, most)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    return rounded


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to the nearest of ten digits after the first."""
    assert x.dtype == np.float32
    return ((np.ascontiguousarray(x).view(np.uint32) + (1 << 12)) & ~np.uint32((1 << 13) - 1)).view(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_tf32_is_near_enough(kind, tile, tf32):
    """The kernels' products with P and dS, taken in TF32, stay within 2e-3 of the largest element, and those of float32
    inputs do not use it.
    """
    for seed, case in islice(cases(kind), 8):
        tile(seed)
        case = case.to(torch.bfloat16)
        for a, b in zip(unrounded(case), case.expected(), strict=True):
            assert (a - b).abs().max() <= 2e-3 * b.abs().max() + 1e-6, str(case)
    assert tf32
    tf32.clear()
    unrounded(random_case(0, kind, longest=40, pairs=2))
    assert not tf32


@torch.no_grad()
def test_a_model_generates_through_it(tile):
    tile(0)
    config = llama.architecture(vocab_size=50, context=32, dim=24, num_layers=1, num_heads=2, num_kv_heads=1)
    torch.manual_seed(0)
    plain, fast = config.build().eval(), config.with_kernel(Flash()).build().eval()
    fast.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 50, (2, 18), generator=torch.Generator().manual_seed(0))
    whole, cache, pieces = plain(ids).logits, fast.new_cache(2, 18), []
    for piece in ids.split([16, 1, 1], 1):
        pieces.append(fast(piece, cache=cache).logits)
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 1e-5
    assert (fast(ids).logits - whole).abs().max() <= 1e-5


def test_wide_heads_and_few_queries_have_their_own_tiles():
    tunings = [triton.Config({"M": m, "N": n}) for m, n in ((16, 16), (16, 128), (64, 32), (128, 128))]

    def tried(**given):
        return [(t.kwargs["M"], t.kwargs["N"]) for t in flash._fitting(tunings, given)]

    assert tried(D=64, PRECISION="tf32", SHORT=False) == [(64, 32), (128, 128)]
    assert tried(D=256, PRECISION="tf32", SHORT=False) == [(64, 32)]
    assert tried(D=256, PRECISION="ieee", SHORT=False) == [(16, 16)]
    assert tried(D=64, PRECISION="tf32", SHORT=True) == [(16, 16), (16, 128)]


def test_what_the_kernels_cannot_do_is_refused():
    q = torch.randn(1, 2, 3, 8)
    part = RelativeBias.Config().build(dim=16, num_heads=2, head_dim=8, context=8)
    view = whole_rows(part, torch.zeros(1, 3)).view(None)
    with pytest.raises(InputError, match="Flash cannot make the bias of RelativeBias, only one of slopes: use Tiled"):
        Flash()(q, q, q, view)
    with pytest.raises(InputError, match=r"takes float32, float16 and bfloat16, not torch\.float64"):
        Flash()(*[q.double()] * 3, view)
    with pytest.raises(InputError, match="heads of up to 256 dimensions, not head_dim=300"):
        Flash()(*[torch.randn(1, 1, 3, 300)] * 3, view)
    with pytest.raises(InputError, match="Flash: queries, keys and values have head_dim 8, 6, 8"):
        Flash()(q, q[..., :6], q, view)


def without_interpreter(program: str) -> str:
    """What a fresh process prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_gpu_one_line_says_so():
    printed = without_interpreter("""
import torch
from allyouneed.core.errors import InputError
from allyouneed.models import llama
from allyouneed.nn.kernels import Flash
config = llama.architecture(vocab_size=50, context=32, dim=24, num_layers=1, num_heads=2).with_kernel(Flash())
try:
    config.build()(torch.zeros(1, 4, dtype=torch.long))
except InputError as error:
    print(error)
""")
    assert printed.startswith(
        "kernel Flash needs a CUDA device, these tensors are on cpu: use Tiled, or TRITON_INTERPRET"
    )
    assert printed.count("\n") == 1


def test_rows_and_heads_lie_on_the_long_axis():
    """CUDA's first axis takes 2^31 − 1 programs, the others 65,535."""
    q = torch.empty(1, 1, 1, 16).expand(40_000, 2, 3, 16)
    part = Positions.Config().build(dim=32, num_heads=2, head_dim=16, context=3)
    grid, _, _ = flash._arguments(q, q, q, whole_rows(part, torch.zeros(40_000, 3)).view(None), 1.0)
    assert grid(3, "M", 2)({"M": 2}) == (80_000, 2)


VARIANTS = {  # of each kernel, and whether products go to tensor cores
    "bfloat16": ({"PRECISION": "tf32", "SHARED": False, "SHORT": False}, True),
    "shared keys": ({"PRECISION": "tf32", "SHARED": True, "SHORT": False}, True),
    "few queries": ({"PRECISION": "tf32", "SHARED": False, "SHORT": True}, True),
    "float32": ({"PRECISION": "ieee", "SHARED": False, "SHORT": False}, False),
}


@pytest.mark.parametrize("kernel", ["_forward", "_gather_queries", "_gather_keys"])
def test_compiles_for_a_gpu(kernel):
    """For compute capability 8.0 and heads of 64, within its 163 KB."""
    printed = without_interpreter(f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from allyouneed.nn import flash
kernel, tunings = flash.{kernel}, flash.FORWARD if "{kernel}" == "_forward" else flash.BACKWARD
for constants, _ in {VARIANTS}.values():
    tuning = flash._fitting(tunings, constants | dict(D=64))[-1]
    exact = constants["PRECISION"] == "ieee"
    constants |= dict(D=64, SLOPES=True, FACTOR=flash.tl.float32 if exact else flash.tl.bfloat16) | tuning.kwargs
    kinds = dict.fromkeys(("q", "k", "v", "gradient"), "*fp32" if exact else "*bf16") | dict(scale="fp32")
    kinds |= dict.fromkeys(("bounds", "places", "key_places"), "*i32")
    kinds |= dict.fromkeys(("out", "dq", "dk", "dv", "level", "sums", "slopes"), "*fp32")
    signature = {{n: "constexpr" if n in constants else kinds.get(n, "i32") for n in kernel.arg_names}}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = dict(num_warps=tuning.num_warps, num_stages=tuning.num_stages)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    print(made.metadata.shared, "mma.sync" in made.asm["ptx"], len(made.asm["cubin"]) > 0)
""")
    for line, (_, on_tensor_cores) in zip(printed.splitlines(), VARIANTS.values(), strict=True):
        shared, tensor_cores, compiled = line.split()
        assert int(shared) <= 163 * 1024 and compiled == "True" and tensor_cores == str(on_tensor_cores)
