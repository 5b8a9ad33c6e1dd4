"""Numbers in blocks of codes, and layers over them: against bitsandbytes, against the equations in float64, and the
kernels against PyTorch.
"""

from __future__ import annotations

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from test_packed import cache, path  # noqa: F401  (fixtures)
from torch import Tensor, nn

from allyouneed.core.errors import InputError
from allyouneed.evaluate.memory import kept_allocated
from allyouneed.evaluate.rounding import gaussian_error
from allyouneed.nn import native
from allyouneed.nn.blockwise import Blocks, blockwise, decode, encode
from allyouneed.nn.codebooks import BOOKS, DYNAMIC, integers
from allyouneed.nn.quantised import FEW, QuantisedEmbedding, QuantisedLinear, QuantisedWeight

KINDS = list(BOOKS)
THEIRS = ("nf4", "fp4")  # of bitsandbytes
SHAPES = ((64, 64), (130, 96), (3, 50), (7, 33), (1, 1), (1, 63), (5, 8192))  # most no multiple of a block


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes").functional


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(
    kind: str, outputs: int = 13, inputs: int = 128, *, double: bool = True, block: int = 64
) -> QuantisedLinear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(normal(outputs, inputs, seed=1))
        layer.bias.copy_(normal(outputs, seed=2))
    return QuantisedLinear.of(layer, kind, block, double=double)


# code books


def test_nf4_is_quantiles_of_the_normal_distribution() -> None:
    """Eight steps of equal probability from the outermost quantile to the middle, and seven on the other side."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    assert outermost == pytest.approx(0.9677083, abs=1e-7)
    steps = [torch.linspace(outermost, 0.5, count, dtype=torch.float64)[:-1] for count in (9, 8)]
    above, below = (torch.from_numpy(scipy.stats.norm.ppf(step)) for step in steps)
    wanted = torch.cat((-below, torch.zeros(1), above.flip(0))) / above.max()
    assert (BOOKS["nf4"].values.double() - wanted).abs().max() < 1e-6


def test_fp4_is_a_small_float() -> None:
    """(−1)^s · 2^e · (1 + m/2), the exponents in an order of their own, and 1/192 of the largest below them."""
    by_exponent = {0b001: 1 / 192, 0b110: 1 / 6, 0b111: 1 / 4, 0b100: 1 / 3, 0b101: 1 / 2, 0b010: 2 / 3, 0b011: 1.0}
    values = BOOKS["fp4"].values
    assert values[0] == values[8] == 0
    for code, value in by_exponent.items():
        assert values[code].item() == pytest.approx(value, abs=1e-7) and values[code | 8] == -values[code]


@pytest.mark.parametrize("kind", THEIRS)
def test_code_books_are_bitsandbytes_s(bnb, kind: str) -> None:
    assert torch.equal(BOOKS[kind].values, bnb.get_4bit_type(kind, device="cpu"))
    assert torch.equal(DYNAMIC.values, bnb.create_dynamic_map())


@pytest.mark.parametrize("kind", [*KINDS, "dynamic"])
def test_the_nearest_code_is_the_nearest(kind: str) -> None:
    book = BOOKS.get(kind, DYNAMIC)
    x = torch.cat((book.values, book.edges, normal(5000).clamp(-1, 1)))
    distances = (x.double()[:, None] - book.values.double()).abs()
    chosen = distances.gather(1, book.nearest(x).long()[:, None])[:, 0]
    assert (chosen - distances.amin(1)).max() <= 2**-24  # edges are rounded to fp32, by half of that
    assert torch.equal(book.values[book.nearest(book.values).long()], book.values)


# blocks


@pytest.mark.parametrize("block", [64, 256])
@pytest.mark.parametrize("kind", THEIRS)
def test_bytes_scales_and_numbers_are_bitsandbytes_s(bnb, kind: str, block: int) -> None:
    for seed, shape in enumerate(SHAPES):
        x = normal(*shape, seed=seed)
        ours = blockwise(x, kind, block, double=False)
        codes, state = bnb.quantize_4bit(x.view(1, -1), blocksize=block, quant_type=kind)  # one row, since 0.50.2 takes
        assert torch.equal(ours.codes, codes.flatten()), shape  # every row of 96 for one of whole blocks
        assert torch.equal(ours.scales.values, state.absmax), shape
        assert torch.equal(ours.dequantised().view(1, -1), bnb.dequantize_4bit(codes, state)), shape


@pytest.mark.parametrize("kind", THEIRS)
def test_double_quantisation_is_bitsandbytes_s(bnb, kind: str) -> None:
    for seed, shape in enumerate(SHAPES):
        x = normal(*shape, seed=seed)
        ours = blockwise(x, kind)
        codes, state = bnb.quantize_4bit(x.view(1, -1), blocksize=64, quant_type=kind, compress_statistics=True)
        assert torch.equal(ours.codes, codes.flatten())
        if state.state2.absmax.any():  # else what stands for 0 times 0 is all one
            assert torch.equal(ours.scales.codes, state.absmax)
        assert torch.equal(ours.scales.values, state.state2.absmax) and torch.equal(ours.scales.offset, state.offset)
        assert torch.equal(ours.dequantised().view(1, -1), bnb.dequantize_4bit(codes, state)), shape


def test_scales_of_a_large_matrix_are_bitsandbytes_s(bnb) -> None:
    """All but a few of 13,824: its CPU kernel looks a value up in a table of 2^16 entries, so that of those within 2^−16
    of where the nearest changes some go to the neighbour; ours are the nearest.
    """
    x = normal(1536, 576)
    ours, values = blockwise(x, "nf4").scales, blockwise(x, "nf4", double=False).scales.values
    theirs = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)[1]
    assert torch.equal(ours.values, theirs.state2.absmax)
    relative = (values - values.mean()) / ours.values.repeat_interleave(256)[: len(values)]
    distances = (relative[:, None] - DYNAMIC.values).abs()
    assert torch.equal(distances.argmin(1), ours.codes.long())
    other = theirs.absmax != ours.codes
    edge = (relative[other, None] - DYNAMIC.edges).abs().amin(1)
    assert other.float().mean() < 0.005 and edge.max() <= 2**-16 + 1e-7
    assert ((theirs.absmax.int() - ours.codes.int()).abs() <= 1).all()


@pytest.mark.parametrize(("kind", "most"), [("int4", 7), ("int8", 127)])
def test_integers_are_the_equation_in_float64(kind: str, most: int) -> None:
    x = normal(6, 100).double()
    for found, row in zip(
        blockwise(x.flatten(), kind, double=False).dequantised().split(64), x.flatten().split(64), strict=True
    ):
        scale = row.abs().max()
        wanted = (row / scale * most).round() / most * scale
        apart = (found - wanted).abs() > 1e-6
        tie = ((row / scale * most) % 1 - 0.5).abs() < 1e-4  # there, half a step either way is right
        assert not (apart & ~tie).any()


def test_integers_of_four_bits_are_symmetric() -> None:
    assert (integers(4)[:15] * 7).tolist() == pytest.approx(range(-7, 8))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_the_largest_stays_itself(kind: str, double: bool) -> None:
    x = torch.zeros(4, 64)
    x[1, 5], x[2, 0], x[2, 63] = -3.0, 1e-30, 5e-31
    found = blockwise(x, kind, double=double).dequantised()
    assert torch.equal(found[[0, 3]], torch.zeros(2, 64))
    if not double:
        assert found[1, 5] == -3.0 and found[2, 0] == pytest.approx(1e-30)
    assert (blockwise(torch.zeros(5), kind, double=double).dequantised() == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_no_more_than_half_a_step(kind: str) -> None:
    x = normal(100, 64)
    book = BOOKS[kind].values.sort().values
    widest = (book[1:] - book[:-1]).max() / 2
    apart = (blockwise(x, kind, double=False).dequantised() - x).abs().amax(1) / x.abs().amax(1)
    assert (apart <= widest + 1e-6).all() and apart.max() > 0.8 * widest


def test_many_numbers_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(37, 50)
    whole = encode(x, BOOKS["nf4"], 64)
    monkeypatch.setattr("allyouneed.nn.blockwise.AT_ONCE", 640)
    assert all(map(torch.equal, whole, encode(x, BOOKS["nf4"], 64)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    x = normal(3, 64)
    x[1, 1] = value
    with pytest.raises(InputError, match=r"nf4: .*\(3, 64\).*finite"):
        blockwise(x, "nf4")


def test_other_kinds_and_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="'nf3'; did you mean 'nf4'"):
        blockwise(normal(64), "nf3")
    with pytest.raises(InputError, match="block=48; one of 32, 64"):
        blockwise(normal(64), "nf4", 48)
    with pytest.raises(InputError, match="finite"):
        blockwise(torch.empty(0, 64), "nf4")


def test_bits_of_a_number() -> None:
    """4 + 8/64 + 32/(64·256) with double quantisation, 4 + 32/64 without (Dettmers et al. 2023, sec. 3)."""
    x = normal(1024, 1024)
    assert blockwise(x, "nf4").nbytes * 8 / x.numel() == pytest.approx(4.127, abs=5e-4)
    assert blockwise(x, "nf4", double=False).nbytes * 8 / x.numel() == 4.5


# layers


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_numbers_have_the_bits_that_pytorch_finds(kind: str, double: bool, threads: int) -> None:
    for shape, block in (((5, 64), 64), ((301, 256), 32), ((2, 512), 256)):
        blocks = blockwise(normal(*shape), kind, block, double=double)
        assert torch.equal(QuantisedWeight(blocks).dequantised(), slow(blocks))


def slow(blocks: Blocks) -> Tensor:
    """Number by number as the format says."""
    values, nibbles = BOOKS[blocks.kind].values, BOOKS[blocks.kind].bits == 4
    codes = [code for byte in blocks.codes.tolist() for code in ((byte >> 4, byte & 15) if nibbles else (byte,))]
    scales = blocks.scales.values
    if blocks.scales.codes is not None:
        each = [DYNAMIC.values[code] * scales[i // 256] for i, code in enumerate(blocks.scales.codes.tolist())]
        scales = torch.stack(each) + blocks.scales.offset
    found = values[codes].view(-1, blocks.block) * scales[:, None]
    return found.view(blocks.shape)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dequantised_weight(kind: str, threads: int) -> None:
    for layer in (layer_of(kind), layer_of(kind, 1, 64), layer_of(kind, 8, 96), layer_of(kind, 301, 256, double=False)):
        for count in (1, 3, FEW, FEW + 1):
            x = normal(count, layer.in_features)
            weight = layer.dequantised().double()
            apart = (layer(x).double() - F.linear(x.double(), weight, layer.bias.double())).abs()
            assert (apart <= 1e-6 * F.linear(x.double().abs(), weight.abs())).all(), (count, layer)


def test_inputs_of_any_shape_stride_and_dtype() -> None:
    layer = layer_of("nf4")
    for x in (
        normal(128),
        normal(2, 3, 128),
        normal(128, 6).T,
        normal(6, 256)[::2, ::2],
        normal(1, 128).expand(4, 2, 128),
    ):
        wanted = F.linear(x, layer.dequantised(), layer.bias)
        assert torch.allclose(layer(x), wanted, atol=1e-4)
    assert layer(normal(0, 128)).shape == (0, 13) and layer(normal(2, 128).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="127 features where the layer takes 128"):
        layer(normal(2, 127))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_the_input_and_nothing_else(kind: str) -> None:
    layer, x, gradient = layer_of(kind), normal(2, 3, 128).requires_grad_(), normal(2, 3, 13)
    layer(x).backward(gradient)
    wanted = gradient.double() @ layer.dequantised().double()
    assert x.grad is not None and (x.grad.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert not list(layer.parameters())


def test_nothing_is_kept_unpacked() -> None:
    """Between forward and backward there is the output, and not the weight: 4 MB, of which it is a fiftieth."""
    layer, x = layer_of("nf4", 1024, 1024), normal(16, 1024).requires_grad_()
    layer(x)
    assert kept_allocated(lambda: layer(x)) <= 2 * 16 * 1024 * 4 < layer.dequantised().nbytes / 10


def test_a_change_of_dtype_leaves_the_weight_alone() -> None:
    layer = layer_of("nf4")
    before = layer.dequantised()
    assert torch.equal(layer.bfloat16().dequantised(), before)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_table(kind: str, double: bool) -> None:
    weight = QuantisedWeight(blockwise(normal(11, 128), kind, double=double))
    ids = torch.tensor([[3, 0], [10, 3]])
    assert torch.equal(QuantisedEmbedding(weight)(ids), weight.dequantised()[ids])
    with pytest.raises(InputError, match="96 numbers are not of whole blocks"):
        QuantisedEmbedding(QuantisedWeight(blockwise(normal(4, 96), kind)))


def test_without_a_compiler_all_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of("nf4"), normal(3, 128)
    found = layer(x)
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.allclose(layer(x), found, atol=1e-5)
    assert torch.equal(decode(*_parts(layer), 64, 13 * 128).view(13, 128), layer.dequantised())


def _parts(layer: QuantisedLinear) -> tuple:
    blocks = layer.weight.blocks
    return blocks.codes, blocks.scales.exact(), BOOKS["nf4"]


# what rounding costs


@pytest.mark.parametrize("block", [2, 64])
@pytest.mark.parametrize("kind", [*KINDS, "coarse"])
def test_the_error_of_normal_numbers_in_closed_form(kind: str, block: int) -> None:
    """Against numbers drawn in float64 and rounded one by one; its interval at 4 standard errors."""
    values = BOOKS[kind].values if kind in BOOKS else torch.tensor([-0.5, 0.0, 0.9])  # no code for the largest itself
    x = torch.randn(4000, block, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scale = x.abs().amax(1, keepdim=True)
    book = values.double()
    chosen = book[(x / scale)[..., None].sub(book).abs().argmin(-1)]
    errors = (chosen * scale - x).square().mean(1)
    assert abs(errors.mean() - gaussian_error(values, block)) < 4 * errors.std() / len(errors) ** 0.5
