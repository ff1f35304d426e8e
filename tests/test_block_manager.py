"""T2, T3, T5 and T7 for the block manager, by a state machine that also plays the memory.

Every physical slot of both pools is a cell of a dictionary.  What a token leaves in its cell
is the whole prefix up to it, as keys and values do.  Tokens are written where the table says,
copies are performed as ordered, freed cells are scratched.  If each sequence then reads its
own history through its table, no write ever reached a sibling, and no cached block was found
behind another prefix.
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
from minipaged.memory.prefix_cache import PrefixCache

which = st.integers(0, 30)  # an index into the living sequences, modulo their number
some_sequence = precondition(lambda self: self.history)
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=9)  # so that prefixes often agree


class BlockManagerMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(1, 14),
        num_host=st.integers(0, 14),
        extra=st.sampled_from([None, "prefix cache", 1, 2, 3, 5, 9]),
    )
    def build(self, block_size, num_blocks, num_host, extra):
        self.window = extra if isinstance(extra, int) else None
        cache = PrefixCache(block_size) if extra == "prefix cache" else None
        self.manager = BlockManager(
            block_size, num_blocks, num_host, self.scratch, self.window, cache
        )
        assert self.manager.host.num_blocks <= num_blocks, "there is never more to swap"
        self.device, self.host = {}, {}  # slot -> prefix
        self.history = {}  # sequence -> its tokens
        self.root = {}  # sequence -> the first of its group
        self.count = 0

    def pick(self, index):
        return list(self.history)[index % len(self.history)]

    def family(self, index):
        """A sequence and all that were forked from it or together with it: a sequence group."""
        seq = self.pick(index)
        return [other for other in self.history if self.root[other] == self.root[seq]]

    def begin(self, tokens, root=None):
        self.count += 1
        self.history[self.count] = list(tokens)
        self.root[self.count] = self.count if root is None else root
        return self.count

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

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def new_sequence(self, tokens):
        self.add(tokens)

    @some_sequence
    @rule(which=which, blocks=st.integers(1, 4))
    def new_sequence_that_begins_alike(self, which, blocks):
        """Of full blocks, all of which may be known: and one token is to be computed."""
        prompt = self.history[self.pick(which)][: blocks * self.manager.block_size]
        if prompt:  # a fork of nothing has none yet
            self.add(prompt)

    def add(self, tokens):
        """It begins with what the prefix cache knows, if there is one, and computes the rest."""
        manager, device = self.manager, self.manager.device
        known = manager.cached_prefix(tokens)
        held = [block for block in known if device.ref_count(block) > 0]
        if manager.blocks_for(len(tokens)) - len(held) > device.num_free:
            return
        free = device.num_free
        found = manager.adopt_prefix(self.count + 1, tokens)
        assert found == len(known) * manager.block_size < len(tokens)
        # Cached blocks that nobody held were free ones.
        assert free - device.num_free == len(known) - len(held)
        seq = self.begin(tokens[:found])
        self.write([seq], tokens[found:])

    @some_sequence
    @rule(which=which, tokens=tokens)
    def append(self, which, tokens):
        self.append_to([self.pick(which)], tokens)

    @some_sequence
    @rule(which=which, tokens=tokens)
    def append_to_a_group(self, which, tokens):
        """Sequences that may share blocks write, one after the other, in the same step.

        Every other one goes on differently, so that none finds in its slots what it would write.
        """
        self.append_to(self.family(which), tokens)

    def append_to(self, seqs, tokens):
        seqs = [seq for seq in seqs if not self.on_host(seq)]
        needed = self.manager.blocks_needed((seq, len(tokens)) for seq in seqs)
        if needed <= self.manager.device.num_free:
            self.write(seqs, tokens)
        elif len(seqs) == 1:
            before = repr(self.manager)
            with pytest.raises(OutOfBlocksError):
                self.manager.append(seqs[0], len(tokens))
            assert repr(self.manager) == before, "an append that does not fit changes nothing"

    def write(self, seqs, tokens):
        """Take the slots, copy what must be copied, write, and only then tell the manager.

        Every other sequence writes the opposite of these tokens.
        """
        manager, n = self.manager, len(tokens)
        needed = manager.blocks_needed((seq, n) for seq in seqs)
        free = manager.device.num_free
        copies = [copy for seq in seqs for copy in manager.append(seq, n)]
        assert free - manager.device.num_free == needed
        self.copy(self.device, self.device, copies)
        for number, seq in enumerate(seqs):
            for token in tokens:
                history = self.history[seq]
                slot = manager.tables[seq].slot(len(history))
                history.append(token ^ number % 2)
                self.device[slot] = tuple(history)
        for seq in seqs:
            manager.mark_computed(seq, self.history[seq])

    @some_sequence
    @rule(which=which, times=st.integers(1, 3), following=st.just([]) | tokens)
    def fork(self, which, times, following):
        """Children share all blocks, and may at once go on, each in its own way."""
        parent = self.pick(which)
        used = self.manager.device.num_used, self.manager.host.num_used
        for _ in range(times):
            child = self.begin(self.history[parent], self.root[parent])
            self.manager.fork(parent, child)
        assert used == (self.manager.device.num_used, self.manager.host.num_used)
        if following:
            self.append_to(self.family(which), following)

    @some_sequence
    @precondition(lambda self: self.window is None)
    @rule(which=which, length=st.integers(0, 12))
    def fork_a_prefix(self, which, length):
        parent = self.pick(which)
        length = min(length, len(self.history[parent]))
        whole = length - length % self.manager.block_size
        child = self.begin(self.history[parent][:whole], self.root[parent])
        self.manager.fork(parent, child, length)

    @some_sequence
    @rule(which=which)
    def free(self, which):
        seq = self.pick(which)
        self.manager.free(seq)
        del self.history[seq]
        assert seq not in self.manager.tables

    @some_sequence
    @rule(which=which)
    def swap_out(self, which):
        self.swap(self.family(which), False, self.manager.swap_out, self.device, self.host)

    @some_sequence
    @rule(which=which)
    def swap_in(self, which):
        self.swap(self.family(which), True, self.manager.swap_in, self.host, self.device)

    def swap(self, group, from_host, move, source, target):
        tables = [self.manager.tables.get(seq) for seq in group]
        if not all(tables) or any(self.on_host(seq) != from_host for seq in group):
            return
        pool = self.manager.device if from_host else self.manager.host
        blocks = {block for table in tables for block in table.held_blocks}
        assert len(blocks) == self.manager.num_blocks_held(group)
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
            if not history:
                continue
            table = self.manager.tables[seq]
            first = table.num_dropped * self.manager.block_size
            # The next token sees the last window - 1 tokens, and they are all there.
            assert first <= max(0, len(history) - (self.window or len(history)) + 1)
            memory = self.host if self.on_host(seq) else self.device
            read = [memory.get(table.slot(i)) for i in range(first, len(history))]
            expected = [tuple(history[: i + 1]) for i in range(first, len(history))]
            assert read == expected, f"sequence {seq} of {self.manager}"

    @invariant()
    def everything_is_accounted_for(self):
        if not hasattr(self, "manager"):
            return
        manager = self.manager
        manager.check_integrity()
        for table in manager.tables.values():
            in_sight = table.num_tokens
            if self.window is not None:
                in_sight = min(in_sight, self.window - 1)
            # T7: less than a block is empty, and less than one more is out of sight.
            unused = len(table.held_blocks) * manager.block_size - in_sight
            assert unused < manager.block_size * (1 if self.window is None else 2)

    def teardown(self):
        if hasattr(self, "manager"):
            for seq in list(self.manager.tables):
                self.manager.free(seq)
            assert self.manager.device.num_used == self.manager.host.num_used == 0
            assert not self.manager.host.num_cached


class TestBlockManager(BlockManagerMachine.TestCase):
    settings = settings(stateful_step_count=60)


@pytest.mark.parametrize(
    ("block_size", "num_blocks", "message"),
    [(0, 4, "block_size is 0"), (16, 0, "num_blocks is 0"), (16, -3, "num_blocks is -3")],
)
def test_sizes_that_cannot_be(block_size, num_blocks, message):
    with pytest.raises(ConfigurationError, match=message):
        BlockManager(block_size, num_blocks)


def test_a_prefix_cache_needs_the_whole_prefix():
    with pytest.raises(ConfigurationError, match="sliding window of 8 tokens"):
        BlockManager(4, 4, sliding_window=8, prefix_cache=PrefixCache(4))


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


def test_the_last_holder_of_a_shared_block_writes_in_place():
    manager = BlockManager(4, 5)
    manager.append(1, 5)  # 1: [b0, b1]
    manager.fork(1, 2)
    manager.fork(1, 3)
    # All three write into b1: two take copies, the third has it to itself then.
    assert manager.blocks_needed([(1, 1), (2, 1), (3, 1)]) == 2
    copies = [manager.append(seq, 1) for seq in (1, 2, 3)]
    assert [len(copy) for copy in copies] == [1, 1, 0]
    assert {copy.source for (copy,) in copies[:2]} == {manager.tables[3].blocks[-1]}


def test_two_that_compute_the_same_prefix_end_up_with_the_same_blocks():
    manager = BlockManager(2, 8, prefix_cache=PrefixCache(2))
    for seq in (1, 2):  # both arrive before either is computed
        assert manager.adopt_prefix(seq, [5, 6, 7, 8, seq]) == 0
        manager.append(seq, 5)
    assert manager.device.num_used == 6
    for seq in (1, 2):
        manager.mark_computed(seq, [5, 6, 7, 8, seq])
    # 1: [b0, b1, b2]   2: [b0, b1, b5]
    assert manager.tables[1].blocks[:2] == manager.tables[2].blocks[:2]
    assert manager.device.num_used == 4


def test_a_window_frees_blocks_while_the_sequence_lives():
    manager = BlockManager(2, 4, sliding_window=3)
    for length in range(1, 30):
        manager.append(1, 1)
        manager.mark_computed(1, range(length))
        assert manager.device.num_used <= manager.most_blocks_each(length, 1) <= 3
    with pytest.raises(IndexError, match="has no slot"):
        manager.tables[1].slot(0)
