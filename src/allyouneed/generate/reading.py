"""One pass of a model over whatever sequences are due: each reads some tokens more, and of some logits are wanted.

Knows blocks and slots by number only; who holds them is said by the caller. Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from allyouneed.adapt.lora import adapted
from allyouneed.adapt.rows import Mix, chosen
from allyouneed.core.errors import InputError
from allyouneed.nn.paged import Storage
from allyouneed.nn.sight import Memory
from allyouneed.nn.watch import Watch

PADDED = 1.25  # rows are read together while their padded size is at most so much more than their tokens


class Continues(Protocol):
    """What the engine generates with: a decoder, one that has read its source, a recurrent model."""

    config: Any  # with `vocab_size`
    answers: bool  # whether what it writes follows from a memory

    @property
    def limit(self) -> int | None:
        """The longest text it continues; None: any."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def new_cache(self, batch: int, capacity: int, memory: Memory | None = None) -> Any:
        """An empty cache for `batch` rows of up to `capacity` tokens; one of a row and none says what is kept."""

    def hidden(
        self, ids: Tensor, segments: Tensor | None = None, cache: Any = None, counts: Tensor | None = None
    ) -> Tensor:
        """(B, T) -> (B, T, dim), keeping in the cache the first `counts` tokens of each row, or all."""

    def head(self, hidden: Tensor) -> Tensor:
        """(…, dim) -> logits (…, V)."""


@dataclass(frozen=True, eq=False)
class Piece:
    """What one sequence reads in a pass."""

    ids: Sequence[int]  # new tokens, at least one
    blocks: Sequence[int]  # its block table, room for the new tokens included
    length: int  # tokens it holds already
    wanted: int  # of so many of its last new tokens logits are wanted: 0 none, 1 to go on, more to judge drafts
    slot: int = 0  # of its state and its memory, where the model has such
    adapters: Mix = ()  # of the module, that read it, and how much of each


class Reader(Protocol):
    """Reads pieces of sequences into a storage."""

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """float32 logits on the CPU, (sum of `wanted`, V), pieces in order. No sequence has two pieces in a pass."""


def reader_of(module: Continues, storage: Storage) -> Reader:
    """The fastest reader there is for a module as it is now: of its native program where that can use the storage."""
    from allyouneed.generate.native_reader import native_reader

    return native_reader(module, storage) or TorchReader(module, storage)


class CurrentReader:
    """The fastest reader for what a module is at each pass: chosen anew once parts or weights of it were replaced,
    adapters merged or trained on, somebody listens in by a hook, or it was put into training mode.

    >>> from allyouneed.models import llama
    >>> model = llama.EXAMPLE.build().eval()
    >>> reader = CurrentReader(model, Storage(model.new_cache(1, 0), blocks=4, size=8))
    >>> model.grow(60)
    >>> reader.read([Piece([1, 59], [0], 0, wanted=1)]).shape
    torch.Size([1, 60])
    """

    def __init__(self, module: Continues, storage: Storage) -> None:
        self.module, self.storage = module, storage
        self.renew()

    def renew(self) -> None:
        """Forget what was made of the weights: to be called after gains or biases of 16 bits were written to."""
        self._reader = reader_of(self.module, self.storage)
        self._watch = Watch(self.module) if isinstance(self.module, nn.Module) else None
        self._adapted = adapted(self.module) if isinstance(self.module, nn.Module) else []
        self._merged = [dict(layer.merged) for layer in self._adapted]
        tensors = (p for layer in self._adapted for p in layer.adapters.parameters() if not p.is_inference())
        self._versions = [(p, p._version) for p in tensors]

    def stale(self) -> bool:
        """Whether what was read may have come of other weights: adapters were merged, unmerged, or written to in place
        other than by way of `.data`. Of the base's weights only `renew` tells.
        """
        return any(map(operator.ne, (layer.merged for layer in self._adapted), self._merged)) or any(
            p._version != version for p, version in self._versions
        )

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """(sum of `wanted`, V).

        Raises:
            InputError: a piece asks for an adapter, and some are merged.
        """
        if self.stale() or (self._watch is not None and self._watch.changed()):
            self.renew()
        if any(self._merged) and any(piece.adapters for piece in pieces):
            raise InputError("an adapter that a request asked for was merged since; unmerge it, or ask anew")
        return self._reader.read(pieces)


class TorchReader:
    """Reads with the module itself, for any module: rows of one token together, longer ones in groups of like length.

    >>> from allyouneed.models import llama
    >>> model = llama.EXAMPLE.build().eval()
    >>> reader = TorchReader(model, Storage(model.new_cache(1, 0), blocks=4, size=8))
    >>> reader.read([Piece([1, 2, 3], [0], 0, wanted=1), Piece([4], [2], 0, wanted=1)]).shape
    torch.Size([2, 53])
    """

    def __init__(self, module: Continues, storage: Storage) -> None:
        self.module, self.storage = module, storage

    @torch.inference_mode()
    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """(sum of `wanted`, V)."""
        *starts, total = accumulate((piece.wanted for piece in pieces), initial=0)
        found: list[Tensor] = []
        places: list[int] = []
        for group in self._groups(pieces):
            found.append(self._wanted([pieces[i] for i in group]))
            places += [starts[i] + n for i in group for n in range(pieces[i].wanted)]
        if not total:
            return torch.zeros(0, self.module.config.vocab_size)
        hidden = torch.cat(found)
        if places != list(range(total)):
            hidden = hidden[torch.tensor(places).argsort().to(hidden.device)]
        with self._chosen(piece.adapters for piece in pieces for _ in range(piece.wanted)):
            return self.module.head(hidden).float().cpu()

    def _wanted(self, pieces: Sequence[Piece]) -> Tensor:
        """What the head sees where logits are wanted, (sum of `wanted`, dim)."""
        hidden = self._hidden(pieces)
        width, rows = hidden.shape[1], hidden.flatten(0, 1)
        ends = [row * width + len(piece.ids) for row, piece in enumerate(pieces)]
        chosen = [n for end, piece in zip(ends, pieces, strict=True) for n in range(end - piece.wanted, end)]
        return rows if len(chosen) == len(rows) else rows[torch.tensor(chosen, dtype=torch.long).to(rows.device)]

    def _hidden(self, pieces: Sequence[Piece]) -> Tensor:
        """(B, T, dim), rows padded on the right."""
        counts = [len(piece.ids) for piece in pieces]
        width = max(counts)
        ids = torch.tensor([[*piece.ids, *[0] * (width - len(piece.ids))] for piece in pieces])
        cache = self.storage.cache(
            [piece.blocks for piece in pieces],
            lengths=[piece.length for piece in pieces],
            slots=[piece.slot for piece in pieces],
            counts=counts,
        )
        padded = min(counts) < width
        device = self.module.device
        with self._chosen(piece.adapters for piece in pieces):
            return self.module.hidden(ids.to(device), cache=cache, counts=torch.tensor(counts) if padded else None)

    def _chosen(self, mixes: Iterable[Mix]) -> AbstractContextManager[None]:
        """The adapters of each row; only modules themselves can be asked for them."""
        return chosen(list(mixes), self.module.device) if isinstance(self.module, nn.Module) else nullcontext()

    def _groups(self, pieces: Sequence[Piece]) -> Iterator[list[int]]:
        """Which pieces to read together: those of like length, and those whose memory no layer has looked at apart."""

        def kind(i: int) -> tuple[bool, int]:
            return self.storage.memories.fresh(pieces[i].slot), len(pieces[i].ids)

        group: list[int] = []
        total = 0
        for i in sorted(range(len(pieces)), key=kind, reverse=True):
            total += len(pieces[i].ids)
            if group and not self._alike(pieces, group[0], i, len(group) + 1, total):
                yield group
                group, total = [], len(pieces[i].ids)
            group.append(i)
        if group:
            yield group

    def _alike(self, pieces: Sequence[Piece], first: int, other: int, rows: int, total: int) -> bool:
        fresh, width = self.storage.memories.fresh, len(pieces[first].ids)
        if fresh(pieces[first].slot) != fresh(pieces[other].slot) or (width > 1) != (len(pieces[other].ids) > 1):
            return False
        if self.module.limit is not None and pieces[other].length + width > self.module.limit:
            return False  # its padding would stand where there are no positions
        return width * rows <= PADDED * total
