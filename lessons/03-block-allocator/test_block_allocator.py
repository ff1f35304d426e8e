"""Lesson 3: one pool of physical blocks, its free list and its reference counts (T2)."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from turned import must_find, must_let_pass

from minipaged.course.narration import Narrated, story
from minipaged.course.notation import pool_state
from minipaged.errors import OutOfBlocksError
from minipaged.memory.block_allocator import BlockAllocator

sizes = st.integers(1, 6)
choices = st.lists(st.integers(0, 99), max_size=40)


def new_pool(num_blocks, kind=BlockAllocator):
    """A pool whose story is told from here on."""
    story.begin()
    made_by = f"BlockAllocator({num_blocks})"
    return Narrated(kind(num_blocks), "pool", pool_state, made_by, quiet=("ref_count",))


@pytest.mark.task("3.1")
@given(num_blocks=sizes)
def test_every_block_is_given_out_once(num_blocks):
    pool = new_pool(num_blocks)
    taken = []
    for n in range(num_blocks):
        block = pool.allocate()
        assert block not in taken, f"block {block} was given out while somebody held it"
        count = pool._ref_counts[block]
        assert count == 1, f"block {block} has one holder now, but its count is {count}"
        taken.append(block)
        assert pool.num_free == num_blocks - n - 1, f"after {n + 1} blocks were taken"
    assert sorted(taken) == list(range(num_blocks)), "a pool of n blocks has the blocks 0 .. n - 1"


@pytest.mark.task("3.1")
def test_an_empty_pool_says_so_and_changes_nothing():
    pool = new_pool(2)
    pool.allocate()
    pool.check_available(1)
    with pytest.raises(OutOfBlocksError, match=r"2 blocks are needed and 1 of 2 are free; ."):
        pool.check_available(2)
    pool.allocate()
    with pytest.raises(OutOfBlocksError, match=r"1 blocks are needed and 0 of 2 are free; ."):
        pool.allocate()
    assert pool.num_free == 0


@pytest.mark.task("3.2")
@given(num_blocks=sizes, choices=choices)
def test_a_block_that_is_given_back_is_free(num_blocks, choices):
    pool = new_pool(num_blocks)
    held = []
    for choice in choices:
        if choice % 2 and held:
            pool.free(held.pop(choice // 2 % len(held)))
        elif pool.num_free:
            block = pool.allocate()
            assert block not in held, f"block {block} was given out while somebody held it"
            held.append(block)
        assert pool.num_free == num_blocks - len(held), f"{len(held)} blocks are held: {held}"


@pytest.mark.task("3.2")
@pytest.mark.parametrize("block", [0, 1, 7, -1])
def test_a_block_that_nobody_holds_cannot_be_given_back(block):
    pool = new_pool(2)
    pool.allocate(), pool.allocate()
    pool.free(0)
    pool.free(1)
    if block == -1:  # block 1, the last one of the pool, is held: it is not block -1
        while pool.num_free:
            pool.allocate()
    free = pool.num_free
    with pytest.raises(ValueError, match=f"block {block} is freed but not in use"):
        pool.free(block)
    assert pool.num_free == free, "a refused call must change nothing"


@pytest.mark.task("3.2")
def test_whoever_asked_is_told_of_a_freed_block():
    freed = []
    story.begin()
    pool = BlockAllocator(2, on_free=freed.append)
    pool = Narrated(pool, "pool", pool_state, "BlockAllocator(2, on_free=freed.append)")
    block = pool.allocate()
    pool.free(block)
    assert freed == [block], "on_free is called with the block that became free"


@pytest.mark.task("3.3")
@given(num_blocks=sizes, choices=choices)
def test_a_block_is_free_when_its_last_holder_has_let_go(num_blocks, choices):
    pool = new_pool(num_blocks)
    holds = Counter()  # block -> how many hold it
    for choice in choices:
        held, which = sorted(holds), choice // 3
        if choice % 3 == 0 and pool.num_free:
            block = pool.allocate()
            assert block not in holds, f"block {block} was given out while {holds[block]} held it"
            holds[block] = 1
        elif choice % 3 == 1 and held:
            block = held[which % len(held)]
            pool.share(block)
            holds[block] += 1
        elif held:
            block = held[which % len(held)]
            pool.free(block)
            holds -= Counter([block])
        for block in range(num_blocks):
            count = pool.ref_count(block)
            assert count == holds[block], f"block {block} is held {holds[block]} times, not {count}"
        assert pool.num_free == num_blocks - len(holds), (
            f"{len(holds)} blocks have a holder left, the others are free: the last `free` of a "
            "block frees it, and no earlier one"
        )
        assert pool.num_used == len(holds), "a shared block is one block"
        assert pool.num_used + pool.num_free == num_blocks


@pytest.mark.task("3.3")
def test_only_the_last_goodbye_is_told():
    freed = []
    story.begin()
    pool = BlockAllocator(2, on_free=freed.append)
    pool = Narrated(pool, "pool", pool_state, "BlockAllocator(2, on_free=freed.append)")
    block = pool.allocate()
    pool.share(block)
    pool.free(block)
    assert freed == [], "somebody still holds the block, so it did not become free"
    pool.free(block)
    assert freed == [block], "on_free is called when the last holder has let go"


@pytest.mark.task("3.3")
def test_a_block_that_nobody_holds_cannot_be_shared():
    pool = new_pool(2)
    block = pool.allocate()
    pool.free(block)
    with pytest.raises(ValueError, match=f"block {block} is shared but not in use"):
        pool.share(block)
    assert pool.num_used == 0, "a refused call must change nothing"


# The property that the learner writes must find each of these wrong pools.  They are made of the
# learner's own pool: its books are right, until something happens to them.


class GivesABlockTwice(BlockAllocator):
    """A block that was taken is still in the free list."""

    def allocate(self):
        block = super().allocate()
        self._free[block] = None
        return block


class LosesAFreedBlock(BlockAllocator):
    """A freed block is in no table and not in the free list."""

    def free(self, block):
        super().free(block)
        self._free.pop(block, None)


class NeverLetsGo(BlockAllocator):
    """Giving a block back does nothing: its count stays, and it is never free again."""

    def free(self, block):
        pass


class ForgetsASharer(BlockAllocator):
    """A second holder is not counted."""

    def share(self, block):
        super().share(block)
        self._ref_counts[block] -= 1


class CountsAHolderTooMany(BlockAllocator):
    """A block is counted as held twice from the beginning."""

    def allocate(self):
        block = super().allocate()
        self._ref_counts[block] = 2
        return block


class FreesWithTheFirstGoodbye(BlockAllocator):
    """A block is free although somebody still holds it."""

    def free(self, block):
        super().free(block)
        self._free[block] = None


class ForgetsToCountDown(BlockAllocator):
    """A freed block is in the free list, and its count says that it is held."""

    def free(self, block):
        super().free(block)
        self._ref_counts[block] += 1


class MixesUpTwoBlocks(BlockAllocator):
    """The count of a block is written down for its neighbour: all sums are right."""

    def allocate(self):
        block = super().allocate()
        other = (block + 1) % self.num_blocks
        counts = self._ref_counts
        counts[block], counts[other] = counts[other], counts[block]
        return block


class TakesTheLowestBlock(BlockAllocator):
    """Right: it gives out the lowest free block."""

    def allocate(self):
        self._free = dict.fromkeys(sorted(self._free, reverse=True))
        return super().allocate()


class TakesTheOldestBlock(BlockAllocator):
    """Right: its free list is a queue."""

    def free(self, block):
        super().free(block)
        if block in self._free:
            self._free = {block: None, **self._free}


WRONG = [
    GivesABlockTwice,
    LosesAFreedBlock,
    NeverLetsGo,
    ForgetsASharer,
    CountsAHolderTooMany,
    FreesWithTheFirstGoodbye,
    ForgetsToCountDown,
    MixesUpTwoBlocks,
]
RIGHT = [BlockAllocator, TakesTheLowestBlock, TakesTheOldestBlock]


def live(kind):
    """A life of a pool; after every call its books are checked against what is held."""
    pool = new_pool(3, kind)
    holds = Counter()
    pool.check_integrity(holds)

    def take():
        block = pool.allocate()
        holds[block] += 1
        pool.check_integrity(dict(holds))
        return block

    def share(block):
        pool.share(block)
        holds[block] += 1
        pool.check_integrity(dict(holds))

    def let_go(block):
        nonlocal holds
        pool.free(block)
        holds -= Counter([block])
        pool.check_integrity(dict(holds))

    a, b = take(), take()
    share(a)
    let_go(b)
    let_go(a)
    b = take()
    let_go(a)
    let_go(b)


@pytest.mark.task("3.4")
@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_the_property_finds_a_wrong_pool(kind):
    must_find(live, kind, RIGHT)


@pytest.mark.task("3.4")
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_the_property_lets_a_right_pool_pass(kind):
    must_let_pass(live, kind, WRONG)
