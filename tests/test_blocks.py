"""Blocks and tables against a model that keeps every sequence whole: none lost, shared by mistake or freed twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from allyouneed.generate.blocks import BlockPool, chained
from allyouneed.generate.tables import BlockTable, Tables
from allyouneed.nn.caches import Cache, OwnKeyValues, RecurrentState, Rows
from allyouneed.nn.memories import Memories
from allyouneed.nn.paged import Bank, PagedKeyValues, Storage
from allyouneed.nn.sight import Memory

BLOCKS, SIZE = 12, 4


class Remembering:
    """A "model" whose keys are the tokens it read and whose state is their sum: what is kept can be read off."""

    answers = False

    def new_cache(self, batch: int, capacity: int, memory: None = None) -> Cache:
        rows = Rows(batch)
        layers = [OwnKeyValues(rows, torch.zeros(batch, 2, capacity, 1))]
        return Cache(rows, layers)


class Holding(RuleBasedStateMachine):
    """Sequences of few kinds of tokens, so that many begin alike. `texts` is the model: what each holds."""

    done = 0

    def __init__(self) -> None:
        super().__init__()
        self.tables = Tables(Remembering(), Storage(Remembering().new_cache(1, 0), BLOCKS, SIZE), share=True)
        self.texts: dict[BlockTable, list[int]] = {}

    def pick(self, place: int) -> BlockTable:
        return list(self.texts)[place % len(self.texts)]

    def write(self, table: BlockTable, new: list[int]) -> None:
        storage, whole = self.tables.storage, self.texts[table] + new
        cache = storage.cache([table.blocks], lengths=[table.length], slots=[table.slot], counts=[len(new)])
        (layer,) = cache.layers
        assert isinstance(layer, PagedKeyValues)
        keys = torch.tensor(new, dtype=torch.float32)[None, None, :, None].repeat(1, 2, 1, 1)
        found, negated = layer.extend(keys, -keys)
        assert found[0, 0, :, 0].tolist() == found[0, 1, :, 0].tolist() == whole
        assert (found == -negated).all()
        self.tables.commit(table, whole, len(whole))
        self.texts[table] = whole

    @rule(tokens=st.lists(st.integers(1, 2), min_size=1, max_size=14))
    def open(self, tokens: list[int]) -> None:
        Holding.done += 1
        table = self.tables.open()
        keys = self.tables.keys(tokens[:-1])
        self.tables.adopt(table, keys[: self.tables.found(keys)])
        self.texts[table] = tokens[: table.length]
        if self.tables.reserve(table, len(tokens) - table.length):
            self.write(table, tokens[table.length :])
        else:
            self.tables.close(table)
            del self.texts[table]

    @precondition(lambda self: self.texts)
    @rule(place=st.integers(0, 99), new=st.lists(st.integers(1, 3), min_size=1, max_size=6))
    def read_on(self, place: int, new: list[int]) -> None:
        Holding.done += 1
        table, free = self.pick(place), self.tables.pool.free
        if self.tables.reserve(table, len(new)):
            self.write(table, new)
        else:
            assert self.tables.pool.free == free

    @precondition(lambda self: self.texts)
    @rule(place=st.integers(0, 99))
    def fork(self, place: int) -> None:
        Holding.done += 1
        table = self.pick(place)
        self.texts[self.tables.fork(table)] = list(self.texts[table])

    @precondition(lambda self: self.texts)
    @rule(place=st.integers(0, 99))
    def close(self, place: int) -> None:
        Holding.done += 1
        table = self.pick(place)
        self.tables.close(table)
        del self.texts[table]

    @rule(really=st.integers(0, 9))
    def forget(self, really: int) -> None:
        Holding.done += 1
        if really == 0:
            self.tables.pool.forget()

    @invariant()
    def holders_are_counted(self) -> None:
        held = Counter(block for table in self.texts for block in table.blocks)
        assert all(self.tables.pool.holders(block) == held[block] for block in range(BLOCKS))

    @invariant()
    def no_block_is_lost(self) -> None:
        held = {block for table in self.texts for block in table.blocks}
        assert self.tables.pool.free + len(held) == BLOCKS
        pool = self.tables.pool
        assert sorted([*pool._blank, *pool._idle, *held]) == list(range(BLOCKS))

    @invariant()
    def each_holds_its_own_tokens(self) -> None:
        (keys,) = self.tables.storage.keys
        slots = [table.slot for table in self.texts]
        assert len(set(slots)) == len(slots)
        for table, text in self.texts.items():
            assert table.length == len(text) and len(table.blocks) >= -(-len(text) // SIZE)
            assert keys[table.blocks, 0, :, 0].flatten()[: len(text)].tolist() == text

    @invariant()
    def what_is_found_is_what_was_asked_for(self) -> None:
        (keys,) = self.tables.storage.keys
        for text in self.texts.values():
            for i, key in enumerate(self.tables.keys(text)):
                block = self.tables.pool.find(key)
                assert block is None or keys[block, 0, :, 0].tolist() == text[i * SIZE : (i + 1) * SIZE]

    def teardown(self) -> None:
        for table in self.texts:
            self.tables.close(table)
        assert self.tables.pool.free == BLOCKS


def test_no_operation_loses_a_block_or_mixes_contents_up():
    Holding.done = 0
    checked = settings(
        max_examples=320,
        stateful_step_count=60,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Holding, settings=checked)
    print(f"{Holding.done} operations")
    assert Holding.done >= 10_000


def test_the_one_let_go_longest_ago_is_taken_first():
    pool = BlockPool(3)
    blocks = [pool.take() for _ in range(3)]
    keys = [chained(b"", [i]) for i in range(3)]
    for block, key in zip(blocks, keys, strict=True):
        pool.name(block, key)
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.release(block)
    pool.hold(blocks[1])  # found again, and let go last of all
    pool.release(blocks[1])
    assert [pool.take() for _ in range(3)] == [blocks[0], blocks[2], blocks[1]]
    assert pool.evictions == 3 and [pool.find(key) for key in keys] == [None] * 3


def test_misuse_is_caught():
    pool = BlockPool(1)
    block = pool.take()
    with pytest.raises(AssertionError, match="no free block"):
        pool.take()
    pool.release(block)
    with pytest.raises(AssertionError, match="free already"):
        pool.release(block)
    with pytest.raises(AssertionError, match="holds nothing"):
        pool.hold(block)


class Summing(Remembering):
    def new_cache(self, batch: int, capacity: int, memory: None = None) -> Cache:
        rows = Rows(batch)
        return Cache(rows, [RecurrentState(rows, torch.zeros(batch, 1))])


def test_slots_keep_states_apart():
    """Forks begin with the state of what they fork and go their own ways; a slot that is used again begins anew."""
    storage = Storage(Summing().new_cache(1, 0), 0, SIZE)
    tables = Tables(Summing(), storage, share=True)

    def read(table: BlockTable, token: float) -> float:
        cache = storage.cache([table.blocks], lengths=[table.length], slots=[table.slot], counts=[1])
        (layer,) = cache.layers
        assert isinstance(layer, RecurrentState)
        layer.leave(layer.before[0] + token)
        cache.advance(1)
        tables.commit(table, [], table.length + 1)
        return float(storage.states[0][0][table.slot])

    one = tables.open()
    assert read(one, 1) == 1
    others = [tables.fork(one) for _ in range(5)]
    assert [read(other, i) for i, other in enumerate(others)] == [1, 2, 3, 4, 5] and read(one, 10) == 11
    slot = others[2].slot
    tables.close(others[2])
    again = tables.open()
    assert again.slot == slot and read(again, 7) == 7 and read(others[3], 1) == 5
    assert tables.keys([1] * 9) == []  # a state cannot be found by tokens alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_as_exact_as_their_scale(dtype):
    rows = Rows(1)
    like = Cache(rows, [OwnKeyValues(rows, torch.zeros(1, 2, 0, 8, dtype=dtype))])
    storage = Storage(like, 4, SIZE, eight_bits=True)
    source = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 6, 8, generator=source).to(dtype) for _ in range(2))
    keys[0, 1, 3] = 0
    (layer,) = storage.cache([[3, 1]], lengths=[0], slots=[0], counts=[6]).layers
    assert isinstance(layer, PagedKeyValues)
    for found, given in zip(layer.extend(keys, values), (keys, values), strict=True):
        assert found.dtype == dtype and found.shape == given.shape
        step = given.float().abs().amax(-1, keepdim=True) / 127
        rounding = 0 if dtype == torch.float32 else 2**-8 * given.float().abs()
        assert ((found.float() - given.float()).abs() <= 0.5 * step * 1.001 + rounding).all()
    assert storage.keys[0].dtype == torch.int8


def test_what_was_made_of_a_memory_keeps_nothing_else_alive():
    """Rows that were looked at together part without each other's padding."""
    memories = Memories()
    for slot, length in enumerate((2, 50)):
        memories.put(slot, Memory(torch.randn(1, length, 4)))
    together = memories.together([0, 1])
    assert together is not None
    whole = torch.randn(2, 3, 50, 4), torch.randn(2, 3, 50, 4)
    together.recall(0, lambda: whole)
    memories.drop(1)
    alone = memories.together([0])
    assert alone is not None
    for kept, made in zip(alone._made[0][0], whole, strict=True):
        assert torch.equal(kept, made[:1, :, :2]) and kept.untyped_storage().nbytes() == kept.nbytes


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says which pages there are")
def test_memory_comes_in_small_pages_and_only_where_it_is_written():
    """Pages of 2 MiB would be 2 MiB of every layer for the first token."""
    bank = Bank((4096, 2, 16, 64), torch.float32, torch.device("cpu"), eight_bits=False)
    before = mapping(bank.data[2048].data_ptr())  # of this bank, and of what the system joined to it
    bank.data[::512] = 1
    after = mapping(bank.data[2048].data_ptr())
    assert "hg" not in after["VmFlags:"].split() and after["AnonHugePages:"] == before["AnonHugePages:"]
    first, last = (int(fields["Rss:"].split()[0]) for fields in (before, after))
    assert 0 < last - first < bank.data.nbytes / 1024 / 100


def mapping(place: int) -> dict[str, str]:
    """What Linux says of the memory in which an address lies."""
    inside, fields = False, dict[str, str]()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, value = line.split(maxsplit=1)
        if not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= place < last
        elif inside:
            fields[name] = value
    return fields
