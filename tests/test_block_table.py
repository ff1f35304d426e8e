"""The table of one sequence: slots, the waste of less than a block (T7), copy-on-write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.errors import OutOfBlocksError
from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.block_table import BlockCopy, BlockTable


@given(block_size=st.integers(1, 9), appends=st.lists(st.integers(1, 20), max_size=12))
def test_slots_are_distinct_and_less_than_a_block_is_wasted(block_size, appends):
    pool = BlockAllocator(300)
    table = BlockTable(block_size, pool)
    for n in appends:
        needed, free = table.blocks_needed(n), pool.num_free
        assert table.append(n) is None, "nothing is shared, so nothing is copied"
        assert free - pool.num_free == needed
        table.check_integrity()
        slots = [table.slot(i) for i in range(table.num_tokens)]
        assert len(set(slots)) == len(slots)
        assert {slot // block_size for slot in slots} == set(table.blocks)
        assert len(table.blocks) * block_size - len(slots) < block_size
    table.free()
    assert pool.num_free == 300


@given(block_size=st.integers(1, 6), prefix=st.integers(1, 20), new=st.integers(1, 20))
def test_a_fork_copies_only_a_shared_last_block_that_is_written(block_size, prefix, new):
    pool = BlockAllocator(100)
    parent = BlockTable(block_size, pool)
    parent.append(prefix)
    child = parent.fork()
    used = pool.num_used
    assert used == len(parent.blocks), "a fork takes no block"

    needed, last = child.blocks_needed(new), child.blocks[-1]
    copy = child.append(new)
    assert pool.num_used - used == needed
    if prefix % block_size:
        assert copy == BlockCopy(last, child.blocks[len(parent.blocks) - 1])
        assert copy.destination not in parent.blocks
    else:
        assert copy is None, "the last block is full: it is never written again"
    full = prefix // block_size
    assert child.blocks[:full] == parent.blocks[:full]
    assert not set(child.blocks[full:]) & set(parent.blocks)
    # The parent is the only holder of its last block now: it writes in place.
    assert parent.append(1) is None


def test_the_example_of_figure_8():
    # block size 4   A1 and A2 share a prompt of 7 tokens: A1: [b0, b1]   A2: [b0, b1]
    pool = BlockAllocator(4)
    a1 = BlockTable(4, pool)
    a1.append(7)
    a2 = a1.fork()
    b0, b1 = a1.blocks
    assert [pool.ref_count(b0), pool.ref_count(b1)] == [2, 2]
    # A1 writes its 8th token into block b1, which is shared: it gets a copy, b3 of the figure.
    copy = a1.append(1)
    assert copy.source == b1
    assert a1.blocks == [b0, copy.destination]
    assert a2.blocks == [b0, b1]
    assert [pool.ref_count(b0), pool.ref_count(b1), pool.ref_count(copy.destination)] == [2, 1, 1]
    # A2 writes its own 8th token in place.
    assert a2.append(1) is None
    a1.free(), a2.free()
    assert pool.num_free == 4


@given(block_size=st.integers(1, 4), first=st.integers(0, 8), new=st.integers(1, 40))
def test_an_append_that_does_not_fit_changes_nothing(block_size, first, new):
    pool = BlockAllocator(8)
    table = BlockTable(block_size, pool)
    table.append(first)
    before = (list(table.blocks), table.num_tokens, pool.num_free)
    if table.blocks_needed(new) <= pool.num_free:
        table.append(new)
    else:
        with pytest.raises(OutOfBlocksError):
            table.append(new)
        assert (table.blocks, table.num_tokens, pool.num_free) == before
    table.free()


@given(block_size=st.integers(1, 5), tokens=st.integers(0, 12), new=st.integers(0, 12))
def test_n_tokens_never_need_more_than_n_blocks(block_size, tokens, new):
    """The scheduler's short cut: with n blocks free, n tokens always fit."""
    pool = BlockAllocator(50)
    table = BlockTable(block_size, pool)
    table.append(tokens)
    sibling = table.fork()
    assert table.blocks_needed(new) <= new
    assert sibling.blocks_needed(new) <= new


@pytest.mark.parametrize("position", [-1, 5])
def test_only_filled_slots_can_be_asked_for(position):
    table = BlockTable(4, BlockAllocator(2))
    table.append(5)
    with pytest.raises(IndexError, match=f"token {position} of a sequence of 5"):
        table.slot(position)
