"""Packed linears and embeddings against the dequantised weight in float64, by the kernels and by PyTorch."""

from __future__ import annotations

import ctypes
import platform
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.nn import native
from allyouneed.nn.packed import KINDS, PackedEmbedding, PackedLinear, unpack

FEATURES, OUTPUTS = 96, 13  # three blocks a row; neither a multiple of a tile's rows
COUNTS = (1, 2, 3, 5, 8, 16, 33, 128, 300)
# What the kernels become on other processors: without wide registers, tuned for one where GCC would rather not fuse a
# multiplication and an addition, and without fused ones and half conversion.
BUILDS: dict[str, tuple[str, ...]] = {"here": native.FLAGS}
if platform.machine() == "x86_64":
    BUILDS["sse2"] = ("-O3",)
if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
    BUILDS["avx2"] = ("-O3", "-march=x86-64-v3")
    BUILDS["zen2"] = ("-O3", "-march=x86-64-v3", "-mtune=znver2")


def blocks_of(kind: Kind, outputs: int = OUTPUTS, features: int = FEATURES, seed: int = 0) -> np.ndarray:
    weight = np.random.default_rng(seed).standard_normal((outputs, features)).astype(np.float32)
    return gguf.quants.quantize(weight, kind)


def layer_of(kind: Kind, outputs: int = OUTPUTS, features: int = FEATURES, bias: bool = False) -> PackedLinear:
    offsets = torch.randn(outputs, generator=torch.Generator().manual_seed(1)) if bias else None
    return PackedLinear.from_blocks(blocks_of(kind, outputs, features), kind, features, offsets)


def exact(layer: PackedLinear, x: Tensor) -> Tensor:
    weight = gguf.quants.dequantize(layer.blocks.numpy(), layer.kind)
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), torch.from_numpy(weight.copy()).double(), bias)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def close(found: Tensor, wanted: Tensor) -> bool:
    """Within 1e-6 of the largest output: the rounding of fp32."""
    return bool((found.double() - wanted.double()).abs().max() <= 1e-6 * wanted.abs().max())


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ALLYOUNEED_CACHE", str(folder))
        native.library.cache_clear()
        yield folder
    native.library.cache_clear()


@pytest.fixture(params=[*BUILDS, "pytorch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each build of the kernels, and none."""
    flags = BUILDS.get(request.param)
    kernels = flags and native.declared(ctypes.CDLL(str(native.built(flags))))
    monkeypatch.setattr(native, "library", lambda: kernels)
    return request.param


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_products_are_those_of_the_dequantised_weight(path: str, kind: Kind, threads: int) -> None:
    for layer in (layer_of(kind), layer_of(kind, 1), layer_of(kind, 8, 64, bias=True), layer_of(kind, 301, 256)):
        for count in COUNTS:
            x = inputs(count, layer.in_features)
            assert close(layer(x), exact(layer, x)), (count, layer)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_unpacked_numbers_are_exactly_the_format_s(path: str, kind: Kind) -> None:
    blocks = blocks_of(kind).view(np.uint8)
    blocks[0, :2] = 1  # for kinds with a scale: a subnormal half
    wanted = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    assert torch.equal(PackedLinear.from_blocks(blocks, kind, FEATURES).dequantised(), wanted)
    ids = torch.tensor([[3, 0], [12, 3]])
    assert torch.equal(PackedEmbedding.from_blocks(blocks, kind, FEATURES)(ids), wanted[ids])


@pytest.mark.parametrize("sign", [0, 0x8000])
def test_every_finite_half(path: str, sign: int) -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).reshape(-1, 32) | np.uint16(sign)
    found = unpack(torch.from_numpy(halves.view(np.uint8)), Kind.F16, 32)
    assert np.array_equal(found.numpy().view(np.int32), halves.view(np.float16).astype(np.float32).view(np.int32))


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_inputs_of_any_shape_and_stride(path: str, kind: Kind) -> None:
    layer = layer_of(kind, bias=True)
    for x in (
        inputs(FEATURES),
        inputs(2, 3, 4, FEATURES),
        inputs(FEATURES, 6).T,
        inputs(6, 2 * FEATURES)[::2, ::2],
        inputs(1, 1, FEATURES).expand(4, 2, FEATURES),
        inputs(3, 5, FEATURES + 1)[..., 1:],
    ):
        assert layer(x).shape == (*x.shape[:-1], OUTPUTS)
        assert close(layer(x), exact(layer, x))
    assert layer(inputs(0, 3, FEATURES)).shape == (0, 3, OUTPUTS)
    assert layer(inputs(2, FEATURES).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_gradient_reaches_the_input(path: str, kind: Kind) -> None:
    layer, x, gradient = layer_of(kind, bias=True), inputs(2, 3, FEATURES).requires_grad_(), inputs(2, 3, OUTPUTS)
    layer(x).backward(gradient)
    assert x.grad is not None
    wanted = gradient.double() @ layer.dequantised().double()
    assert close(x.grad, wanted)
    assert not list(layer.parameters())


@pytest.mark.parametrize("build", BUILDS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    build: str, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    kernels = native.declared(ctypes.CDLL(str(native.built(BUILDS[build]))))
    monkeypatch.setattr(native, "library", lambda: kernels)
    for kind in KINDS:
        layer, x = layer_of(kind, 301, 256), inputs(300, 256)
        alone = {row: layer(x[row]) for row in (0, 1, 4, 15, 32, 127, 255, 256, 299)}
        for count in COUNTS:
            found = layer(x[:count])
            assert all(torch.equal(found[row], bits) for row, bits in alone.items() if row < count), (kind, count)


def test_one_and_two_threads_give_the_same_bits() -> None:
    layer, x, found, before = layer_of(Kind.Q4_1, 301, 256), inputs(40, 256), [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(layer(x))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_kernels_and_pytorch_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(Kind.Q4_1, 301, 256), inputs(7, 256)
    assert native.library() is not None
    found = layer(x)
    assert layer.unpacked is None
    monkeypatch.setattr(native, "library", lambda: None)
    assert (found - layer(x)).abs().max() <= 1e-5 * found.abs().max()
    assert layer.unpacked is not None


def test_kinds_the_kernels_do_not_know() -> None:
    layer, x = layer_of(Kind.Q5_1), inputs(4, FEATURES)
    assert close(layer(x), exact(layer, x))
    odd = PackedLinear.from_blocks(blocks_of(Kind.F16, features=33), Kind.F16, 33)
    assert close(odd(inputs(4, 33)), exact(odd, inputs(4, 33)))


def test_fused_layers_give_what_each_gives() -> None:
    layers = [layer_of(Kind.Q4_1, outputs, bias=True) for outputs in (5, 3, 16)]
    x = inputs(2, 3, FEATURES)
    for found, layer in zip(PackedLinear.fused(layers)(x), layers, strict=True):
        assert torch.equal(found, layer(x))


def test_the_head_and_the_embedding_share_one_buffer() -> None:
    table = PackedEmbedding.from_blocks(blocks_of(Kind.Q8_0), Kind.Q8_0, FEATURES)
    head = PackedLinear(table.blocks, Kind.Q8_0, FEATURES)
    assert head.blocks.data_ptr() == table.blocks.data_ptr()
    with pytest.raises(IndexError):
        table(torch.tensor([OUTPUTS]))


def test_a_read_only_memory_map_is_shared_without_a_warning(tmp_path: Path) -> None:
    raw = blocks_of(Kind.Q4_1)
    raw.tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", mode="r", shape=raw.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = PackedLinear.from_blocks(mapped, Kind.Q4_1, FEATURES)
    assert layer.blocks.data_ptr() == mapped.ctypes.data
    assert torch.equal(layer(inputs(2, FEATURES)), layer_of(Kind.Q4_1)(inputs(2, FEATURES)))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"rows of 128 numbers in Q4_1 are 80 bytes, found \(13, 60\)"):
        PackedLinear.from_blocks(blocks_of(Kind.Q4_1), Kind.Q4_1, 128)
    with pytest.raises(ValueError, match="x has 32 features where the layer takes 96"):
        layer_of(Kind.Q4_1)(inputs(1, 32))


def test_one_warning_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    native.library.cache_clear()
    layer, x = layer_of(Kind.Q4_1), inputs(2, FEATURES)
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler.*unpacked to fp32.*install g\\+\\+") as seen:
        assert close(layer(x), exact(layer, x))
        layer(x)
    assert len(seen) == 1
    native.library.cache_clear()


def test_the_environment_turns_kernels_off_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLYOUNEED_NATIVE", "0")
    native.library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library() is None
    native.library.cache_clear()


def compiler_at(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_without_openmp_builds_for_one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuses = 'for option; do [ "$option" = -fopenmp ] && exit 1; done; exec g++ "$@"'
    monkeypatch.setenv("CXX", compiler_at(tmp_path / "cc", refuses))
    monkeypatch.setenv("ALLYOUNEED_CACHE", str(tmp_path))
    native.library.cache_clear()
    layer, x = layer_of(Kind.Q4_1), inputs(40, FEATURES)
    assert close(layer(x), exact(layer, x))
    assert layer.unpacked is None
    native.library.cache_clear()


def test_a_failing_compiler_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fails = '[ "$1" = --version ] && exit 0; echo "disk full" >&2; exit 1'
    monkeypatch.setenv("CXX", compiler_at(tmp_path / "cc", fails))
    monkeypatch.setenv("ALLYOUNEED_CACHE", str(tmp_path))
    native.library.cache_clear()
    with pytest.warns(RuntimeWarning, match="disk full"):
        assert native.library() is None
    assert not list((tmp_path / "native").iterdir())
    native.library.cache_clear()


def test_processes_may_race_for_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALLYOUNEED_CACHE", str(tmp_path))
    build = [sys.executable, "-c", "from allyouneed.nn import native; native.built()"]
    racers = [subprocess.Popen(build) for _ in range(2)]
    assert [racer.wait(300) for racer in racers] == [0, 0]
    assert list((tmp_path / "native").iterdir()) == [native.built()]
    assert stat.S_IMODE((tmp_path / "native").stat().st_mode) == 0o700


def test_code_is_loaded_only_from_a_folder_that_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    native.built().parent.chmod(0o777)
    assert stat.S_IMODE(native.built().parent.stat().st_mode) == 0o700

    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(f"{path} is another user's")

    monkeypatch.setattr(Path, "chmod", refuse)
    native.library.cache_clear()
    with pytest.warns(RuntimeWarning, match="another user's"):
        assert native.library() is None
    native.library.cache_clear()


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLYOUNEED_CACHE", "/a")
    assert native.folder() == Path("/a/native")
    monkeypatch.delenv("ALLYOUNEED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert native.folder() == Path("/b/allyouneed/native")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert native.folder() == Path.home() / ".cache/allyouneed/native"


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_torch_and_the_kernels_have_one_openmp_runtime() -> None:
    """In a process of its own: other packages bring runtimes of theirs."""
    program = "import torch; from allyouneed.nn import native; assert native.library() is not None; "
    program += "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert len(done.stdout.split()) == 1, done.stdout
