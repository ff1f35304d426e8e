"""T2 for contiguous runs: nothing is lost, nothing is given out twice, free buddies are joined."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.errors import ConfigurationError, OutOfBlocksError
from minipaged.memory.buddy_allocator import BuddyAllocator, run_length


@given(
    num_blocks=st.integers(0, 40),
    choices=st.lists(st.tuples(st.booleans(), st.integers(1, 20), st.integers(0, 99)), max_size=60),
)
def test_runs_never_overlap_and_come_back_whole(num_blocks, choices):
    pool = BuddyAllocator(num_blocks)
    used = {}
    for takes, wanted, which in choices:
        if takes:
            length = run_length(wanted)
            room = pool.num_free_within(length)
            if room < length:
                with pytest.raises(OutOfBlocksError, match=f"run of {length} blocks .* none"):
                    pool.allocate(wanted)
                continue
            start = pool.allocate(wanted)
            run = set(range(start, start + length))
            assert run <= set(range(num_blocks))
            assert not any(run & other for other in used.values()), f"{run} but {used}"
            assert pool.num_free_within(length) == room - length, "a run too many was broken up"
            used[start] = run
        elif used:
            start = sorted(used)[which % len(used)]
            del used[start]
            pool.free(start)
        pool.check_integrity()
        assert pool.num_used == sum(map(len, used.values()))
    for start in used:
        pool.free(start)
    assert repr(pool) == repr(BuddyAllocator(num_blocks)), "free again, and joined as at first"


def test_the_paper_s_external_fragmentation():
    pool = BuddyAllocator(8)
    # free: {8: [0]}
    first, second = pool.allocate(2), pool.allocate(2)
    pool.free(first)
    # used: [2, 3]   free: {2: [0], 4: [4]}, six blocks, of which no run of eight can be had
    assert (second, pool.num_free) == (2, 6)
    assert pool.num_free_within(8) == 0
    with pytest.raises(OutOfBlocksError, match="none is free, although 6 of 8 blocks are"):
        pool.allocate(5)


def test_freed_blocks_are_reported():
    freed = []
    pool = BuddyAllocator(12, on_free=freed.append)
    pool.free(pool.allocate(3))
    assert len(freed) == 4


@pytest.mark.parametrize("block", [1, 3, 12, -1])
def test_only_the_beginning_of_a_run_can_be_freed(block):
    pool = BuddyAllocator(12)
    pool.allocate(4), pool.allocate(4)
    with pytest.raises(ValueError, match=f"block {block} is freed but no run in use begins there"):
        pool.free(block)


def test_a_pool_cannot_be_negative():
    with pytest.raises(ConfigurationError, match="a pool of -1 blocks cannot be"):
        BuddyAllocator(-1)
