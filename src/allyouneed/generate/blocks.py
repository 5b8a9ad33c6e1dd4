"""Who holds which block: pure bookkeeping, which knows no tensor.

A block has holders, which are counted; one that nobody holds is free. A full block can be given the key of what it
holds, by which others find it and hold it too. When nobody does any longer it stays findable until it is taken for
something else, the one that was let go longest ago first (Kwon et al. 2023, sec. 4.4 and 4.5).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

Key = bytes


class BlockPool:
    """Blocks 0 … total − 1.

    >>> pool = BlockPool(2)
    >>> block = pool.take()
    >>> pool.name(block, chained(b"", [1, 2]))
    >>> pool.release(block)
    >>> pool.find(chained(b"", [1, 2])) == block, pool.free, pool.cached
    (True, 2, 1)
    """

    def __init__(self, total: int) -> None:
        self.total, self.evictions = total, 0
        self._blank = list(range(total - 1, -1, -1))  # free, and nothing of use in them
        self._holders = [0] * total
        self._keys: dict[int, Key] = {}  # of blocks that can be found
        self._blocks: dict[Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # free but findable, let go longest ago first

    @property
    def free(self) -> int:
        """How many blocks can be taken."""
        return len(self._blank) + len(self._idle)

    @property
    def cached(self) -> int:
        """How many of the free ones can be found."""
        return len(self._idle)

    def holders(self, block: int) -> int:
        """How many hold it."""
        return self._holders[block]

    def take(self) -> int:
        """A free block, now with one holder; what it held is found no more."""
        assert self.free, "no free block: ask `free` first"
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._blocks[self._keys.pop(block)]
            self.evictions += 1
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One holder more, of a block that is held or was found."""
        assert self._holders[block] or block in self._idle, f"block {block} holds nothing"
        self._idle.pop(block, None)
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """One holder less."""
        assert self._holders[block] > 0, f"block {block} is free already"
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._keys:
                self._idle[block] = None
            else:
                self._blank.append(block)

    def name(self, block: int, key: Key) -> None:
        """Have a held block be found by the key of what it holds; where another is found by it, that stays so."""
        assert self._holders[block] > 0 and block not in self._keys
        if key not in self._blocks:
            self._keys[block], self._blocks[key] = key, block

    def find(self, key: Key) -> int | None:
        """The block that holds what the key stands for."""
        return self._blocks.get(key)

    def forget(self) -> None:
        """Have nothing be found any more."""
        self._blank += self._idle
        self._idle.clear()
        self._keys.clear()
        self._blocks.clear()


def chained(before: Key, tokens: Sequence[int]) -> Key:
    """The key of a block: of its tokens and all before them, `before` being the key of the block before.

    >>> chained(chained(b"", [1]), [2]) == chained(chained(b"", [3]), [2])
    False
    """
    return blake2b(before + np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()
