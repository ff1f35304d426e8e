"""T2, T3 and T5 for the block manager, by a state machine that also plays the memory.

Every physical slot of both pools is a cell of a dictionary.  A token is written where the
table says, copies are performed as ordered, freed cells are scratched.  If each sequence
then reads its own history through its table, no write ever reached a sibling.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from minipaged.errors import ConfigurationError, OutOfBlocksError
from minipaged.memory.block_manager import BlockManager

which = st.integers(0, 30)  # an index into the living sequences, modulo their number
some_sequence = precondition(lambda self: self.history)


class BlockManagerMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.integers(1, 5), num_blocks=st.integers(1, 12), num_host=st.integers(0, 12)
    )
    def build(self, block_size, num_blocks, num_host):
        self.manager = BlockManager(block_size, num_blocks, num_host, on_free=self.scratch)
        self.device, self.host = {}, {}  # slot -> token
        self.history = {}  # sequence -> its tokens
        self.count = 0

    def pick(self, index):
        return list(self.history)[index % len(self.history)]

    def scratch(self, block):
        for offset in range(self.manager.block_size):
            self.device.pop(block * self.manager.block_size + offset, None)

    def copy(self, source, target, pairs):
        size = self.manager.block_size
        contents = [[source.get(s * size + i) for i in range(size)] for s, _ in pairs]
        for (_, t), block in zip(pairs, contents, strict=True):
            for i, token in enumerate(block):
                target[t * size + i] = token

    def on_host(self, seq):
        table = self.manager.tables.get(seq)
        return table is not None and table.allocator is self.manager.host

    @rule()
    def new_sequence(self):
        self.count += 1
        self.history[self.count] = []

    @some_sequence
    @rule(which=which, n=st.integers(1, 9))
    def append(self, which, n):
        seq = self.pick(which)
        if self.on_host(seq):
            return
        if self.manager.blocks_needed(seq, n) > self.manager.device.num_free:
            before = repr(self.manager)
            with pytest.raises(OutOfBlocksError):
                self.manager.append(seq, n)
            assert repr(self.manager) == before, "an append that does not fit changes nothing"
            return
        copy = self.manager.append(seq, n)
        if copy is not None:
            self.copy(self.device, self.device, [copy])
        for _ in range(n):
            token = (seq, len(self.history[seq]))
            self.device[self.manager.tables[seq].slot(len(self.history[seq]))] = token
            self.history[seq].append(token)

    @some_sequence
    @rule(which=which)
    def fork(self, which):
        parent = self.pick(which)
        if parent not in self.manager.tables:
            return
        self.count += 1
        used = self.manager.device.num_used, self.manager.host.num_used
        self.manager.fork(parent, self.count)
        assert used == (self.manager.device.num_used, self.manager.host.num_used)
        self.history[self.count] = list(self.history[parent])

    @some_sequence
    @rule(which=which)
    def free(self, which):
        seq = self.pick(which)
        self.manager.free(seq)
        del self.history[seq]
        assert seq not in self.manager.tables

    @some_sequence
    @rule(group=st.sets(which, min_size=1, max_size=4))
    def swap_out(self, group):
        self.swap(group, False, self.manager.swap_out, self.device, self.host)

    @some_sequence
    @rule(group=st.sets(which, min_size=1, max_size=4))
    def swap_in(self, group):
        self.swap(group, True, self.manager.swap_in, self.host, self.device)

    def swap(self, group, from_host, move, source, target):
        group = {self.pick(index) for index in group}
        tables = [self.manager.tables.get(seq) for seq in group]
        if not all(tables) or any(self.on_host(seq) != from_host for seq in group):
            return
        pool = self.manager.device if from_host else self.manager.host
        blocks = {block for table in tables for block in table.blocks}
        before = repr(self.manager)
        if len(blocks) > pool.num_free:
            with pytest.raises(OutOfBlocksError):
                move(group)
            assert repr(self.manager) == before, "a move that does not fit changes nothing"
            return
        contents = dict(source)  # the copies read what was there before the blocks were freed
        pairs = move(group)
        assert {pair.source for pair in pairs} == blocks, "shared blocks are moved once"
        self.copy(contents, target, pairs)

    @invariant()
    def every_sequence_reads_its_own_history(self):
        for seq, history in getattr(self, "history", {}).items():
            if history:
                table = self.manager.tables[seq]
                memory = self.host if self.on_host(seq) else self.device
                read = [memory[table.slot(i)] for i in range(len(history))]
                assert read == history, f"sequence {seq} of {self.manager}"

    @invariant()
    def everything_is_accounted_for(self):
        if hasattr(self, "manager"):
            self.manager.check_integrity()
            size = self.manager.block_size
            tables = self.manager.tables.values()
            assert all(table.num_empty_slots < size for table in tables)

    def teardown(self):
        if hasattr(self, "manager"):
            for seq in list(self.manager.tables):
                self.manager.free(seq)
            assert self.manager.device.num_used == self.manager.host.num_used == 0


class TestBlockManager(BlockManagerMachine.TestCase):
    settings = settings(stateful_step_count=60)


@pytest.mark.parametrize(
    ("block_size", "num_blocks", "message"),
    [(0, 4, "block_size is 0"), (16, 0, "num_blocks is 0"), (16, -3, "num_blocks is -3")],
)
def test_sizes_that_cannot_be(block_size, num_blocks, message):
    with pytest.raises(ConfigurationError, match=message):
        BlockManager(block_size, num_blocks)


def test_a_sequence_has_one_table():
    manager = BlockManager(4, 4)
    manager.append(1, 3)
    manager.append(2, 3)
    with pytest.raises(ValueError, match="sequence 2 has a block table already"):
        manager.fork(1, 2)


def test_wasted_slots_of_a_shared_last_block_count_once():
    manager = BlockManager(4, 4)
    manager.append(1, 5)  # 1: [b0, b1]   3 slots of b1 are empty
    manager.fork(1, 2)
    assert manager.num_wasted_slots == 3
    manager.append(2, 1)  # 2: [b0, b2]   3 of b1 and 2 of b2
    assert manager.num_wasted_slots == 5
