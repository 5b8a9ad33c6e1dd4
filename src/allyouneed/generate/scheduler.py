"""Who reads in the next pass, and who waits: continuous batching (Yu et al. 2022, sec. 3.1) with prompts read in chunks
beside those that are being continued (Agrawal et al. 2023).

Higher priorities come first; within one, the client that was served least (Sheng et al. 2024, sec. 3.2: counters of
tokens, lifted when a client comes back), and then the oldest. A request is admitted when blocks for all its tokens are
free. When blocks run out, the youngest of the lowest priority loses its own and waits again; it later reads its tokens
anew.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence

from allyouneed.generate.continuation import Continuation
from allyouneed.generate.tables import Tables

ECHOED = 128  # most tokens of a prompt read at once of which all logits are wanted: bounds the memory that these take

Turns = dict[Continuation, int]  # who reads, and how many tokens


class Scheduler:
    """Holds who waits and who runs.

    Args:
        tables: what is held of sequences.
        max_batch: most that run at once.
        chunk: most tokens of prompts in one pass.
    """

    def __init__(self, tables: Tables, *, max_batch: int, chunk: int) -> None:
        self.tables, self.max_batch, self.chunk = tables, max_batch, chunk
        self.waiting: list[Continuation] = []
        self.running: list[Continuation] = []
        self.preemptions = 0
        self.shared = 0  # tokens that were found or forked instead of read
        self._served: dict[str, int] = {}  # tokens read for each client that has something to do
        self._turns: Turns = {}

    def add(self, one: Continuation) -> None:
        """Have it wait its turn."""
        client = one.request.client
        if client not in self._served:  # one that comes back is not owed for the time it was away
            self._served[client] = min(self._served.values(), default=0)
        self.waiting.append(one)

    def remove(self, one: Continuation) -> None:
        """It is finished or no longer wanted; what it held is free at once."""
        (self.waiting if one.table is None else self.running).remove(one)
        self._let_go(one)
        client = one.request.client
        if all(other.request.client != client for other in (*self.waiting, *self.running)):
            del self._served[client]

    def plan(self) -> Turns:
        """Who reads how much in the next pass; nothing only where nobody waits or runs."""
        self._turns = {}
        self._continue()
        budget = self._read_on(self.chunk)
        if len(self.running) < self.max_batch or self._outranked():
            self._admit_all(budget)
        return self._turns

    def interrupt_all(self) -> list[Continuation]:
        """Have those that run wait again, holding nothing: a pass broke off."""
        found = list(self.running)
        for one in found:
            self._interrupt(one)
        return found

    def fork(self, leader: Continuation) -> list[Continuation]:
        """Those that wait with the very prompt that `leader` has just read: they hold what it holds, and run from now
        on. None passes another whose turn is sooner, unless there is room for both.
        """
        found: list[Continuation] = []
        if not self.tables.forks or all(one.whole != leader.whole for one in self.waiting):
            return found
        places, blocks = self.max_batch - len(self.running), self.tables.pool.free - len(self.running)
        for one in self._queue():
            alike = one.whole == leader.whole and not (one.echoing or one.made)
            needed = min(1, self.tables.count(1)) if alike else self.tables.count(len(one.tokens))
            places, blocks = places - 1, blocks - needed
            if places < 0 or (needed and blocks < 0):
                break
            if alike:
                self._fork(one, leader)
                found.append(one)
        return found

    def _fork(self, one: Continuation, leader: Continuation) -> None:
        one.table = self.tables.fork(leader.held)
        self.shared += one.table.length
        one.cached = one.table.length
        self._served[one.request.client] += 1  # as one that finds all but the last token of its prompt
        self.waiting.remove(one)
        self.running.append(one)

    def _continue(self) -> None:
        """A turn for those that have one token to read, after room was made for it."""
        for one in sorted(self.running, key=_order):
            while one.table is not None and one.unread == 1 and not self.tables.reserve(one.table, 1 + one.ahead):
                self._interrupt(max(self.running, key=_order))
            if one.table is not None and one.unread == 1:
                self._give(one, 1)

    def _read_on(self, budget: int) -> int:
        """A turn for those that are reading their prompts, and what is left of the budget."""
        for one in sorted(self.running, key=_order):
            if one.unread > 1 and budget:
                budget -= self._give(one, budget)
        return budget

    def _give(self, one: Continuation, most: int) -> int:
        unread = (
            one.unread - 1 if one.pace and one.made and one.unread > 1 else one.unread
        )  # drafts follow the last one
        count = min(most, unread, ECHOED if one.echoing else most)
        self._turns[one] = count
        self._served[one.request.client] += count
        return count

    def _outranked(self) -> bool:
        """Whether one waits that comes before one that runs."""
        most = max((one.request.priority for one in self.waiting), default=None)
        return most is not None and any(one.request.priority < most for one in self.running)

    def _admit_all(self, budget: int) -> None:
        """A turn for those that wait, as long as there is room."""
        for one in self._queue():
            if budget <= 0:
                break
            if self._being_read(one):
                continue
            if not self._admit(one):
                break
            budget -= self._give(one, budget)

    def _queue(self) -> Iterator[Continuation]:
        """Those that wait: higher priorities first, then the client that was served least so far, then the oldest."""
        queues: dict[tuple[int, str], deque[Continuation]] = {}
        for one in sorted(self.waiting, key=_order):
            queues.setdefault((-one.request.priority, one.request.client), deque()).append(one)
        while queues:
            first = min(queues, key=lambda key: (key[0], self._served[key[1]], queues[key][0].number))
            yield queues[first].popleft()
            if not queues[first]:
                del queues[first]

    def _admit(self, one: Continuation) -> bool:
        """Have it run, if there is room or lower priorities can make some."""
        while len(self.running) == self.max_batch or not self._open(one):
            lower = [other for other in self.running if other.request.priority < one.request.priority]
            if not lower or not self._room_without(lower, one):
                return False
            self._interrupt(max(lower, key=_order))
        self.waiting.remove(one)
        self.running.append(one)
        return True

    def _room_without(self, lower: Sequence[Continuation], one: Continuation) -> bool:
        """Whether `_open` would find room if `lower` were interrupted: blocks that others hold, too, stay taken."""
        needed = self.tables.count(len(one.tokens))
        if not needed:
            return True
        pool, held = self.tables.pool, Counter(block for other in lower for block in other.held.blocks)
        keys = [] if one.echoing else one.keys[: self.tables.found(one.keys)]
        found = [block for key in keys if (block := pool.find(key)) is not None]
        needed -= sum(pool.holders(block) > held[block] for block in found)  # no block is taken for these
        freed = sum(pool.holders(block) == count for block, count in held.items())
        return needed + len(self.running) - len(lower) <= pool.free + freed

    def _open(self, one: Continuation) -> bool:
        """Take the blocks for all its tokens: those that can be found, and room for the rest."""
        needed = self.tables.count(len(one.tokens))
        spare = len(self.running) if needed else 0  # those that run will soon want a block each, where there are any
        keys = [] if one.echoing else one.keys[: self.tables.found(one.keys)]
        if needed - len(keys) + spare > self.tables.pool.free:
            return False
        table = self.tables.open(one.request.memory, one.adapters)
        self.tables.adopt(table, keys)
        if not self.tables.reserve(table, len(one.tokens) - table.length, spare):
            self.tables.close(table)
            return False
        self.shared += table.length
        one.table, one.cached = table, one.cached if one.made else table.length
        return True

    def _being_read(self, one: Continuation) -> bool:
        """Whether one that runs is about to read what this one could then find or fork."""
        if one.echoing or one.made or not self.tables.forks:
            return False
        found = self.tables.found(one.keys)
        for other in self.running:
            if not other.made:
                further = found < min(len(one.keys), len(other.keys)) and one.keys[found] == other.keys[found]
                if further or one.whole == other.whole:
                    return True
        return False

    def _interrupt(self, one: Continuation) -> None:
        self._turns.pop(one, None)
        self._let_go(one)
        self.running.remove(one)
        self.waiting.append(one)
        self.preemptions += 1

    def _let_go(self, one: Continuation) -> None:
        if one.table is not None:
            self.tables.close(one.table)
            one.table = None


def _order(one: Continuation) -> tuple[int, int]:
    """Who comes first, where it does not matter whose they are: higher priorities, then the oldest."""
    return -one.request.priority, one.number
