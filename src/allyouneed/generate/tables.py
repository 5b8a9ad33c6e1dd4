"""Block tables: what is held of each sequence, and how it is opened, shared, grown, forked, cut and closed.

Joins the bookkeeping of blocks with the storage behind it. Sequences of a model that keeps no keys have empty tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from allyouneed.adapt.lora import mix_of
from allyouneed.adapt.rows import Mix
from allyouneed.generate.blocks import BlockPool, Key, chained
from allyouneed.generate.reading import Continues, Piece
from allyouneed.nn.paged import Storage
from allyouneed.nn.sight import Memory


@dataclass(eq=False)
class BlockTable:
    """What is held of one sequence: `length` tokens in `blocks`, the last of which may be partly filled."""

    slot: int  # of its state and its memory
    adapters: Mix = ()  # that read it: what is kept of a token depends on them
    blocks: list[int] = field(default_factory=list)
    length: int = 0
    named: int = 0  # so many of its blocks, the first ones, were given their keys
    key: Key = b""  # of the last of these


class Tables:
    """The block tables over one storage.

    Args:
        share: what was read for one sequence may serve others. Where a state or a memory has to be the same besides,
            blocks are not found by their tokens.
    """

    def __init__(self, module: Continues, storage: Storage, *, share: bool) -> None:
        self.module, self.storage, self.size = module, storage, storage.size
        self.pool = BlockPool(storage.blocks)
        self.forks, self.share = share, share and not (storage.states or module.answers)
        self._slots: list[int] = []
        self._opened = self._epoch = 0

    def open(self, memory: Memory | None = None, adapters: Mix | None = None) -> BlockTable:
        """An empty table; with a slot of its own. `adapters` None: those that are in use now."""
        mix = mix_of(self.module) if adapters is None else adapters
        table = BlockTable(self._slot(), mix, key=self._root(mix))
        self.storage.begin(table.slot, self.module.new_cache(1, 0, memory))
        return table

    def adopt(self, table: BlockTable, keys: Sequence[Key]) -> None:
        """Hold the blocks that are found by `keys`, in an empty table."""
        for key in keys:
            block = self.pool.find(key)
            assert block is not None, "a key that nothing is found by"
            self.pool.hold(block)
            table.blocks.append(block)
            table.key = key
        table.named = len(table.blocks)
        table.length = table.named * self.size

    def found(self, keys: Sequence[Key]) -> int:
        """How many of `keys`, from the first on, blocks are found by."""
        return next((i for i, key in enumerate(keys) if self.pool.find(key) is None), len(keys))

    def keys(self, tokens: Sequence[int], adapters: Mix = ()) -> list[Key]:
        """The keys of the full blocks of tokens that a sequence begins with, as some adapters read them."""
        found, key = [], self._root(adapters)
        for start in range(0, len(tokens) // self.size * self.size if self.share else 0, self.size):
            key = chained(key, tokens[start : start + self.size])
            found.append(key)
        return found

    def count(self, length: int) -> int:
        """How many blocks so many tokens take."""
        return -(-length // self.size) if self.storage.banks else 0

    def reserve(self, table: BlockTable, count: int, spare: int = 0) -> bool:
        """Room for `count` tokens more, in blocks that nobody else looks at; False, and nothing done, where that would
        leave fewer than `spare` free.
        """
        if not self.storage.banks:
            return True
        partial = table.length // self.size
        shared = table.length % self.size != 0 and self.pool.holders(table.blocks[partial]) > 1
        missing = self.count(table.length + count) - len(table.blocks)
        if max(missing, 0) + shared + spare > self.pool.free:
            return False
        if shared:  # copy on write
            new = self.pool.take()
            self.storage.copy([(table.blocks[partial], new)])
            self.pool.release(table.blocks[partial])
            table.blocks[partial] = new
        table.blocks += [self.pool.take() for _ in range(missing)]
        return True

    def piece(self, table: BlockTable, ids: Sequence[int], wanted: int = 1) -> Piece:
        """What a sequence reads in a pass; room must be reserved."""
        assert len(table.blocks) >= self.count(table.length + len(ids)), "no room reserved"
        return Piece(ids, table.blocks, table.length, wanted, slot=table.slot, adapters=table.adapters)

    def commit(self, table: BlockTable, tokens: Sequence[int], length: int) -> None:
        """Hold the first `length` of a sequence's `tokens`, which were read; blocks that became full can be found."""
        table.length = length
        while self.share and (table.named + 1) * self.size <= length:
            start = table.named * self.size
            table.key = chained(table.key, tokens[start : start + self.size])
            self.pool.name(table.blocks[table.named], table.key)
            table.named += 1

    def trim(self, table: BlockTable) -> None:
        """Give back the blocks beyond what is held: drafts that were not kept."""
        while len(table.blocks) > self.count(table.length):
            self.pool.release(table.blocks.pop())

    def fork(self, table: BlockTable) -> BlockTable:
        """Another table that holds the same; what it shares is copied when one of them writes on."""
        blocks = table.blocks[: self.count(table.length)]
        other = BlockTable(self._slot(), table.adapters, blocks, table.length, table.named, table.key)
        for block in other.blocks:
            self.pool.hold(block)
        self.storage.fork(table.slot, other.slot)
        return other

    def close(self, table: BlockTable) -> None:
        """Hold nothing any more; the last blocks are the first to be taken again, as those before them lead there."""
        for block in reversed(table.blocks):
            self.pool.release(block)
        self.storage.memories.drop(table.slot)
        self._slots.append(table.slot)
        table.blocks, table.length, table.slot = [], 0, -1

    def forget(self) -> None:
        """Have nothing be found any more, neither what is still being read."""
        self.pool.forget()
        self._epoch += 1

    def _root(self, adapters: Mix) -> Key:
        return root(adapters) + (b"@%d" % self._epoch if self._epoch else b"")

    def _slot(self) -> int:
        if self._slots:
            return self._slots.pop()
        self._opened += 1
        return self._opened - 1


def root(adapters: Mix) -> Key:
    """What the keys of blocks begin with: those that other adapters filled are not found.

    >>> root(()), root((("a", 1.0),)) == root((("b", 1.0),))
    (b'', False)
    """
    return repr(adapters).encode() if adapters else b""
