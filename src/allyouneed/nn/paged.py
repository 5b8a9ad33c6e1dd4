"""Storage for many sequences that come and go: keys and values in blocks, states in slots (Kwon et al. 2023, sec. 4).

A block holds `size` consecutive tokens of one sequence; all layers have the same block numbers. Who holds which block
is said by the caller, as tables of block numbers. What a model reads and writes in one pass is a `Cache` over some rows
of the storage, so that no model knows of blocks.

Shapes: N blocks, S tokens a block, B rows, n blocks a row, T new tokens, H key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from allyouneed.nn.caches import Cache, KeyValues, LayerCache, OwnKeyValues, RecurrentState, Rows
from allyouneed.nn.memories import Memories

INT8 = 127.0
ALIGNED = 64  # bytes


class Room:
    """Memory for what is gathered, used again by every layer: the system takes longer to hand out new than to copy."""

    def __init__(self) -> None:
        self._kept = torch.empty(0)

    def of(self, rows: int, width: int, like: Tensor) -> Tensor:
        """(rows, width), of the type and on the device of `like`."""
        if len(self._kept) < rows * width or self._kept.dtype != like.dtype:
            self._kept = torch.empty(rows * width, dtype=like.dtype, device=like.device)
        return self._kept[: rows * width].view(rows, width)


class Bank:
    """Keys or values of one layer: `data` (N, H, S, D), in 8 bits with `scales` (N, H, S), one a token and head.

    >>> bank = Bank((4, 1, 2, 3), torch.float32, torch.device("cpu"), eight_bits=True)
    >>> bank.write(torch.tensor([2, 3]), torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]))
    >>> found = bank.read(torch.tensor([[[1]]]), Room())
    >>> found.shape, round(found[0, 0, 0, 2].item(), 3)
    (torch.Size([1, 1, 2, 3]), 4.0)
    """

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, *, eight_bits: bool
    ) -> None:
        self.dtype = dtype
        self.data = _zeros(shape, torch.int8 if eight_bits else dtype, device)
        self.scales = _zeros(shape[:3], torch.float32, device) if eight_bits else None

    def write(self, places: Tensor, x: Tensor) -> None:
        """Put vectors (L, D) at `places` (L,), counted over blocks, heads and tokens."""
        if self.scales is not None:
            scales = x.abs().amax(-1).float() / INT8
            self.scales.view(-1).index_copy_(0, places, scales)
            x = (x / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
        self.data.view(-1, self.data.shape[-1]).index_copy_(0, places, x.to(self.data.dtype))

    def read(self, index: Tensor, room: Room) -> Tensor:
        """Blocks of rows one after another, `index` (B, H, n) counted over blocks and heads: (B, H, n·S, D). It lies in
        `room` until that is used again.
        """
        _, _, size, width = self.data.shape
        batch, heads, count = index.shape
        found = room.of(index.numel(), size * width, self.data)
        torch.index_select(self.data.view(-1, size * width), 0, index.flatten(), out=found)
        found = found.view(batch, heads, count * size, width)
        if self.scales is None:
            return found
        scales = self.scales.view(-1, size).index_select(0, index.flatten()).view(batch, heads, count * size, 1)
        return (found * scales).to(self.dtype)

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """The contents of some blocks in others."""
        self.data[targets] = self.data[sources]
        if self.scales is not None:
            self.scales[targets] = self.scales[sources]


class Places:
    """Where the rows of one pass lie: which blocks each reads, and where its new tokens go; the same in all layers."""

    def __init__(self, tables: Tensor, lengths: Sequence[int], counts: Sequence[int], size: int) -> None:
        """`tables` (B, n); each row holds `lengths` tokens and gets `counts` new ones, padded to the most of them."""
        self.tables, self.width = tables, max(counts)
        positions = torch.tensor([range(length, length + self.width) for length in lengths])
        real = torch.arange(self.width) < torch.tensor(counts)[:, None]
        self._chosen = None if bool(real.all()) else real.flatten().nonzero()[:, 0]
        blocks = tables.gather(1, (positions // size).clamp(max=tables.shape[1] - 1))
        self._block, self._offset = blocks[real], positions[real] % size
        self._size, self._known = size, dict[int, tuple[Tensor, Tensor]]()
        ends = torch.tensor([length + count for length, count in zip(lengths, counts, strict=True)])
        self._unseen = (torch.arange(max(lengths) + self.width) >= ends[:, None]).nonzero(as_tuple=True)

    def of(self, heads: int) -> tuple[Tensor, Tensor]:
        """What is read, (B, H, n), and where what is new is written, (L·H,), in a layer of so many heads."""
        if heads not in self._known:
            head = torch.arange(heads)
            read = self.tables[:, None] * heads + head[:, None]
            written = (self._block[:, None] * heads + head) * self._size + self._offset[:, None]
            self._known[heads] = (read, written.flatten())
        return self._known[heads]

    def clean(self, found: Tensor) -> Tensor:
        """What was read, (B, H, up to the longest row's end, D), with zeros behind each row's own: what others left
        there may not be finite, and an infinity would spoil sums, however little attention it is given.
        """
        if len(self._unseen[0]):
            rows, positions = (x.to(found.device) for x in self._unseen)
            found[rows, :, positions] = 0
        return found

    def real(self, x: Tensor) -> Tensor:
        """New keys or values (B, H, T, D) without what pads rows, token by token: (L·H, D)."""
        tokens = x.transpose(1, 2).flatten(0, 1)
        return (tokens if self._chosen is None else tokens[self._chosen.to(x.device)]).reshape(-1, x.shape[-1])


class PagedKeyValues(KeyValues):
    """One layer's keys and values of the rows of one pass."""

    def __init__(self, rows: Rows, banks: tuple[Bank, Bank], places: Places, rooms: tuple[Room, Room]) -> None:
        super().__init__(rows)
        self.banks, self.places, self.rooms = banks, places, rooms

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, H, T, D) after each row's last; everything up to the longest row's end, through
        which no gradient flows.
        """
        total = self.rows.longest + keys.shape[2]
        read, written = (x.to(keys.device) for x in self.places.of(keys.shape[1]))
        for bank, new in zip(self.banks, (keys, values), strict=True):
            bank.write(written, self.places.real(new.detach()))
        pairs = zip(self.banks, self.rooms, strict=True)
        found = [self.places.clean(bank.read(read, room)[:, :, :total]) for bank, room in pairs]
        return found[0], found[1]


class SlotState(RecurrentState):
    """One layer's states of the rows of one pass, which go back to their slots when the cache advances."""

    def __init__(self, rows: Rows, slots: Tensor, kept: Sequence[Tensor]) -> None:
        super().__init__(rows, *(x.index_select(0, slots) for x in kept))
        self.slots, self.kept = slots, kept

    def advance(self) -> None:
        """Go on from what was left, and keep it."""
        super().advance()
        for whole, part in zip(self.kept, self.before, strict=True):
            whole.index_copy_(0, self.slots, part.to(whole.dtype))


class Storage:
    """All that is kept of the sequences of one model.

    Args:
        like: an empty cache of the model, which says what each layer keeps.
        blocks: how many there are.
        size: tokens a block.
        eight_bits: keys and values in 8 bits, scaled by the largest of each token and head.

    >>> from allyouneed.models import llama
    >>> model = llama.EXAMPLE.build().eval()
    >>> storage = Storage(model.new_cache(1, 0), blocks=8, size=4)
    >>> cache = storage.cache([[5, 2]], lengths=[0], slots=[0], counts=[6])
    >>> model(torch.tensor([[1, 2, 3, 4, 5, 6]]), cache=cache).logits.shape
    torch.Size([1, 6, 53])
    """

    def __init__(self, like: Cache, blocks: int, size: int, *, eight_bits: bool = False) -> None:
        self.blocks, self.size, self.device = blocks, size, like.lengths.device
        self.banks: dict[int, tuple[Bank, Bank]] = {}
        self.states: dict[int, list[Tensor]] = {}
        self.memories, self.rooms, self._layers = Memories(), (Room(), Room()), len(like.layers)
        for i, layer in enumerate(like.layers):
            if isinstance(layer, OwnKeyValues):
                _, heads, _, width = layer.keys.shape
                shape = (blocks, heads, size, width)
                pair = [Bank(shape, layer.keys.dtype, self.device, eight_bits=eight_bits) for _ in range(2)]
                self.banks[i] = (pair[0], pair[1])
            elif isinstance(layer, RecurrentState):
                self.states[i] = [x[:0] for x in layer.before]

    @property
    def keys(self) -> list[Tensor]:
        """Of each layer that has keys, (N, H, S, D)."""
        return [keys.data for keys, _ in self.banks.values()]

    @property
    def values(self) -> list[Tensor]:
        """Of each layer that has values, (N, H, S, D)."""
        return [values.data for _, values in self.banks.values()]

    @property
    def scales(self) -> list[tuple[Tensor, Tensor]]:
        """Where eight bits are kept: of each layer, those of keys and of values, (N, H, S)."""
        pairs = [(keys.scales, values.scales) for keys, values in self.banks.values()]
        return [(keys, values) for keys, values in pairs if keys is not None and values is not None]

    def begin(self, slot: int, first: Cache) -> None:
        """Have a sequence begin in a slot as an empty cache of one row says."""
        for i, kept in self.states.items():
            layer = first.layers[i]
            assert isinstance(layer, RecurrentState)
            for place, (whole, state) in enumerate(zip(kept, layer.before, strict=True)):
                kept[place] = whole if slot < len(whole) else _doubled(whole, slot + 1)
                kept[place][slot] = state[0]
        if first.memory is not None:
            self.memories.put(slot, first.memory)

    def fork(self, source: int, target: int) -> None:
        """What is in a slot in another, too."""
        for kept in self.states.values():
            for place, whole in enumerate(kept):
                kept[place] = whole if target < len(whole) else _doubled(whole, target + 1)
                kept[place][target] = kept[place][source]
        self.memories.copy(source, target)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (from, to) each."""
        sources, targets = torch.tensor(pairs, device=self.device).T
        for banks in self.banks.values():
            for bank in banks:
                bank.copy(sources, targets)

    def cache(
        self, tables: Sequence[Sequence[int]], *, lengths: Sequence[int], slots: Sequence[int], counts: Sequence[int]
    ) -> Cache:
        """What one pass reads and writes: rows that hold `lengths` tokens in the blocks of `tables` and the state of
        `slots`, and are given `counts` new ones, for which their tables have room.
        """
        rows, together = Rows.of(lengths, self.device), self.memories.together(slots)
        places = self._places(tables, lengths, counts) if self.banks else None
        where = torch.tensor(slots, device=self.device)
        layers: list[LayerCache] = []
        for i in range(self._layers):
            if i in self.states:
                layers.append(SlotState(rows, where, self.states[i]))
            else:
                assert places is not None
                layers.append(PagedKeyValues(rows, self.banks[i], places, self.rooms))
            if together is not None:
                layers[i].recalling = partial(together.recall, i)
        return Cache(rows, layers, memory=None if together is None else together.memory)

    def _places(self, tables: Sequence[Sequence[int]], lengths: Sequence[int], counts: Sequence[int]) -> Places:
        needed = [-(-(length + count) // self.size) for length, count in zip(lengths, counts, strict=True)]
        widest = -(-(max(lengths) + max(counts)) // self.size)
        padded = [[*table[:n], *[0] * (widest - n)] for table, n in zip(tables, needed, strict=True)]
        return Places(torch.tensor(padded), lengths, counts, self.size)


def bytes_per_block(like: Cache, size: int, *, eight_bits: bool = False) -> int:
    """What a block of `size` tokens takes in all layers together; 0 where none keeps keys."""
    heads = [layer.keys.shape[1] for layer in like.layers if isinstance(layer, OwnKeyValues)]
    widths = [
        layer.keys.shape[3] + 4 if eight_bits else layer.keys.shape[3] * layer.keys.element_size()
        for layer in like.layers
        if isinstance(layer, OwnKeyValues)
    ]
    return sum(2 * size * h * w for h, w in zip(heads, widths, strict=True))


def _doubled(x: Tensor, least: int) -> Tensor:
    """Room for `least` rows or twice as many as there are."""
    return torch.cat((x, x.new_zeros((max(least, 2 * len(x)) - len(x), *x.shape[1:]))))


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU memory that the system hands out page by page as it is written, which PyTorch's are not, and
    that begins where a vector of the processor may.
    """
    if device.type != "cpu":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    size = prod(shape) * torch.empty((), dtype=dtype).element_size()
    raw = np.zeros(size + ALIGNED, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNED
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(tuple(shape))
