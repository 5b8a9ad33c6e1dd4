"""Numbers stored as codes of 4 or 8 bits, in blocks that share a scale: a tensor to codes and scales, and back.

The layout is bitsandbytes': the numbers of a tensor in one row, cut into blocks of `block`; the scale of a block is its
largest absolute value; of two 4-bit codes in a byte the first stands high. Double quantisation (Dettmers et al. 2023,
sec. 3) stores the scales themselves in 8 bits, less their mean and in blocks of 256.

Shapes: n numbers, S = ⌈n / block⌉ scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from allyouneed.core.errors import InputError, unknown
from allyouneed.nn.codebooks import BOOKS, DYNAMIC, Book

NESTED = 256  # scales to a block of theirs
AT_ONCE = 1 << 22  # numbers that are looked at together: what they take besides is 20 times as much
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Scales:
    """A block's scale each: `values` (S,) fp32; or what `codes` (S,) uint8 stand for times the `values` (⌈S/256⌉,) of
    their blocks, and `offset` () added.
    """

    values: Tensor
    codes: Tensor | None = None
    offset: Tensor | None = None

    def doubled(self) -> Scales:
        """The same in 8 bits."""
        offset = self.values.mean()
        codes, scales = encode(self.values - offset, DYNAMIC, NESTED)
        return Scales(scales, codes, offset)

    def exact(self) -> Tensor:
        """(S,) fp32: what blocks are multiplied by."""
        if self.codes is None or self.offset is None:
            return self.values
        return decode(self.codes, self.values, DYNAMIC, NESTED, len(self.codes)) + self.offset

    def at(self, places: Tensor) -> Tensor:
        """Those of some blocks by their numbers: (…) integers -> (…) fp32, the same bits."""
        if self.codes is None or self.offset is None:
            return self.values[places]
        book = DYNAMIC.values.to(self.codes.device)
        return book[self.codes[places].int()] * self.values[places // NESTED] + self.offset


@dataclass(frozen=True)
class Blocks:
    """A tensor of `shape` in blocks of a `kind` of code: `codes` (n,) uint8, or (⌈n/2⌉,) where a byte holds two."""

    kind: str
    block: int
    shape: torch.Size
    codes: Tensor
    scales: Scales

    def dequantised(self) -> Tensor:
        """`shape`, fp32: code by code the number of the book times the scale of the block."""
        return decode(self.codes, self.scales.exact(), BOOKS[self.kind], self.block, self.shape.numel()).view(
            self.shape
        )

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a matrix whose rows are whole blocks: (…) integers -> (…, K) fp32."""
        count, features = self.shape
        if not ids.numel():
            return self.scales.values.new_empty(*ids.shape, features)
        codes, each = self.codes.view(count, -1)[ids], features // self.block
        scales = self.scales.at(ids[..., None] * each + torch.arange(each, device=ids.device)).flatten()
        return decode(codes.flatten(), scales, BOOKS[self.kind], self.block, ids.numel() * features).view(
            *ids.shape, features
        )

    @property
    def nbytes(self) -> int:
        """Of all that is stored for this tensor alone."""
        scales = (self.scales.values, self.scales.codes, self.scales.offset)
        return self.codes.nbytes + sum(part.nbytes for part in scales if part is not None)


def blockwise(x: Tensor, kind: str, block: int = 64, *, double: bool = True) -> Blocks:
    """`x` stored in 4 or 8 bits (Dettmers et al. 2023, sec. 3).

    Args:
        x: of any shape; finite.
        kind: `nf4` (quantiles of a normal distribution), `fp4` (a sign, two bits of exponent, one of mantissa), `int4`
            and `int8` (symmetric integers).
        block: numbers that share a scale.
        double: the scales in 8 bits as well; 0.127 bits a number instead of 0.5, at a block of 64.

    Raises:
        InputError: another kind or block, nothing in x, or a number in it that is not finite.

    >>> blockwise(torch.tensor([[-2.0, 0.0], [1.0, 2.0]]), "nf4", double=False).dequantised()
    tensor([[-2.0000,  0.0000],
            [ 0.8814,  2.0000]])
    """
    check(kind, block)
    if not x.numel() or not torch.isfinite(x).all():
        raise InputError(f"{kind}: a tensor of {tuple(x.shape)} that holds no finite numbers everywhere; mend it first")
    codes, values = encode(x.detach().float(), BOOKS[kind], block)
    scales = Scales(values)
    return Blocks(kind, block, x.shape, codes, scales.doubled() if double else scales)


def check(kind: str, block: int) -> None:
    """Refuse kinds and blocks that there are not.

    Raises:
        InputError: says which there are.
    """
    if kind not in BOOKS:
        raise unknown("kind of quantisation", kind, BOOKS)
    if block not in BLOCKS:
        raise InputError(f"block={block}; one of {', '.join(map(str, BLOCKS))} is accepted")


def encode(x: Tensor, book: Book, block: int) -> tuple[Tensor, Tensor]:
    """(…) fp32 -> the codes of its numbers, two to a byte where they have 4 bits, and (S,) scales.

    A block of zeros has the scale 0 and the codes of zero.
    """
    codes, scales = [], []
    for some in x.flatten().split(AT_ONCE):
        blocks = F.pad(some, (0, -len(some) % block)).view(-1, block)
        scale = blocks.abs().amax(1)
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        inverse = inverse.where(inverse.isfinite(), 0.0)  # below 2⁻¹²⁸ there is nothing to tell apart
        codes.append(book.nearest((blocks * inverse[:, None]).clamp_(-1, 1)).flatten()[: len(some)])
        scales.append(scale)
    found = torch.cat(codes)
    return (_paired(found, book) if book.bits == 4 else found), torch.cat(scales)


def decode(codes: Tensor, scales: Tensor, book: Book, block: int, count: int) -> Tensor:
    """The first `count` numbers, (count,) fp32, of codes and (S,) scales, which `encode` made."""
    if book.bits == 4:  # both numbers of a byte are looked up together
        high, low = book.values.repeat_interleave(16), book.values.repeat(16)
        table = torch.stack((high, low), 1).to(codes.device)
    else:
        table = book.values[:, None].to(codes.device)
    found = F.embedding(codes.int(), table).flatten()[:count]
    whole = count // block * block
    found[:whole].view(-1, block).mul_(scales[: whole // block, None])
    found[whole:].mul_(scales[-1])
    return found


def _paired(codes: Tensor, book: Book) -> Tensor:
    """(n,) -> (⌈n/2⌉,): what is left over shares its byte with a zero."""
    if len(codes) % 2:
        codes = torch.cat((codes, book.nearest(codes.new_zeros(1, dtype=torch.float32))))
    return codes[::2] << 4 | codes[1::2]
