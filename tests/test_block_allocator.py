"""T2 for one pool: nothing is lost, nothing is freed twice."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.errors import ConfigurationError, OutOfBlocksError
from minipaged.memory.block_allocator import BlockAllocator


@given(num_blocks=st.integers(1, 8), choices=st.lists(st.integers(0, 10**6), max_size=60))
def test_free_and_used_blocks_add_up(num_blocks, choices):
    """Any mix of allocate, share and free keeps count and free list in step."""
    pool = BlockAllocator(num_blocks)
    holds = Counter()
    for choice in choices:
        held = sorted(holds.elements())
        kind, which = choice % 3, choice // 3
        if kind == 0 and pool.num_free:
            block = pool.allocate()
            assert block not in holds, f"block {block} was handed out while held: {holds}"
            holds[block] = 1
        elif kind == 1 and held:
            pool.share(held[which % len(held)])
            holds[held[which % len(held)]] += 1
        elif held:
            pool.free(held[which % len(held)])
            holds -= Counter([held[which % len(held)]])
        pool.check_integrity(holds)
        assert pool.num_used == len(holds)


def test_an_empty_pool_says_so():
    pool = BlockAllocator(2)
    pool.allocate(), pool.allocate()  # free: {}
    with pytest.raises(OutOfBlocksError, match=r"1 blocks are needed and 0 of 2 are free"):
        pool.allocate()


def test_every_block_is_handed_out_once():
    pool = BlockAllocator(100)
    assert sorted(pool.allocate() for _ in range(100)) == list(range(100))


@pytest.mark.parametrize("block", [0, 1, 7, -1])
def test_a_block_that_nobody_holds_cannot_be_freed_or_shared(block):
    pool = BlockAllocator(2)
    pool.free(pool.allocate())  # free: {0, 1}
    for verb in (pool.free, pool.share):
        with pytest.raises(ValueError, match=f"block {block} is .* but not in use"):
            verb(block)


def test_the_last_holder_frees_the_block_and_reports_it():
    freed = []
    pool = BlockAllocator(3, on_free=freed.append)
    block = pool.allocate()
    pool.share(block)  # reference count 2
    pool.free(block)
    assert freed == []
    assert pool.ref_count(block) == 1
    pool.free(block)
    assert freed == [block]
    assert pool.num_free == 3


def test_the_integrity_check_can_fail():
    pool = BlockAllocator(3)
    block = pool.allocate()
    for wrong in ({}, {block: 2}, {block: 1, (block + 1) % 3: 1}):
        with pytest.raises(AssertionError):
            pool.check_integrity(wrong)


def test_a_pool_cannot_be_negative():
    with pytest.raises(ConfigurationError, match="-1 blocks"):
        BlockAllocator(-1)
