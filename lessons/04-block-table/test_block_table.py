"""Lesson 4: the table of one sequence, its slots, and how it grows (T7)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from turned import must_find, must_let_pass

from minipaged.course.narration import Narrated, story
from minipaged.course.notation import table_state
from minipaged.errors import OutOfBlocksError
from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.block_table import BlockTable

sizes = st.sampled_from([4, 2, 3, 1])
block_ids = st.sampled_from([7, 1, 3, 5, 0, 2, 4, 6])  # the paper's first
tokens = st.integers(1, 4)


@st.composite
def filled_tables(draw):
    """Block size, physical blocks and number of tokens of a table; the last block may be full."""
    block_size = draw(sizes)
    blocks = draw(st.lists(block_ids, unique=True, min_size=1, max_size=4))
    return block_size, blocks, len(blocks) * block_size - draw(st.integers(0, block_size - 1))


def by_hand(block_size, blocks, num_tokens):
    """A table that is made without its own functions, and told from here on."""
    story.begin()
    pool = BlockAllocator(8)
    table = BlockTable(block_size, pool)
    table.blocks = [pool.take(block) for block in blocks]
    table.num_tokens = num_tokens
    return Narrated(table, "table", table_state, f"BlockTable({block_size}, pool)  # by hand")


def new_table(block_size, pool, name="table"):
    """A table in which nothing is yet; the story has begun."""
    table = BlockTable(block_size, pool)
    return Narrated(table, name, table_state, f"BlockTable({block_size}, pool)")


def blocks_for(num_tokens, block_size):
    """Counted with the fingers: a block for every token that has no room in those before."""
    return sum(position % block_size == 0 for position in range(num_tokens))


@pytest.mark.task("4.1")
@given(shape=filled_tables())
def test_a_token_lies_in_the_physical_block_of_its_logical_block(shape):
    block_size, blocks, num_tokens = shape
    table = by_hand(*shape)
    for position in range(num_tokens):
        logical, offset = position // block_size, position % block_size
        slot = table.slot(position)
        assert slot // block_size == blocks[logical], (
            f"token {position} is in logical block {logical}, which lies in physical block "
            f"{blocks[logical]}; slot {slot} is in physical block {slot // block_size}"
        )
        assert slot % block_size == offset, (
            f"token {position} is number {offset} of its block, counted from 0; "
            f"slot {slot} is number {slot % block_size} of its block"
        )


@pytest.mark.task("4.1")
@given(shape=filled_tables(), beyond=st.integers(0, 3))
def test_only_tokens_have_slots(shape, beyond):
    table = by_hand(*shape)
    _, _, num_tokens = shape
    for position in (num_tokens + beyond, -1 - beyond):
        try:
            slot = table.slot(position)
        except IndexError:
            continue
        raise AssertionError(
            f"the sequence has the tokens 0 to {num_tokens - 1}; slot({position}) must raise an "
            f"IndexError, but gives {slot}"
        )


@pytest.mark.task("4.1")
@given(shape=filled_tables())
def test_the_waste_is_what_is_left_of_the_last_block(shape):
    block_size, blocks, num_tokens = shape
    table = by_hand(*shape)
    empty = table.num_empty_slots
    assert empty + num_tokens == len(blocks) * block_size, (
        f"{len(blocks)} blocks of {block_size} have {len(blocks) * block_size} slots; {num_tokens} "
        f"hold a token, and num_empty_slots says that {empty} are empty"
    )


@pytest.mark.task("4.2")
@given(shape=filled_tables(), new=st.integers(0, 9))
def test_a_block_is_needed_for_every_token_that_begins_one(shape, new):
    block_size, _, num_tokens = shape
    table = by_hand(*shape)
    begin = [p for p in range(num_tokens, num_tokens + new) if p % block_size == 0]
    needed = table.blocks_needed(new)
    assert needed == len(begin), (
        f"{new} tokens come after the first {num_tokens}. Those that begin a block of "
        f"{block_size} are {begin}: that takes {len(begin)} blocks, not {needed}"
    )


@pytest.mark.task("4.2")
@given(block_size=sizes, new=st.integers(0, 9))
def test_a_new_table_needs_blocks_for_all_its_tokens(block_size, new):
    story.begin()
    pool = BlockAllocator(2)
    table = new_table(block_size, pool)
    expected, needed = blocks_for(new, block_size), table.blocks_needed(new)
    assert needed == expected, f"{new} tokens take {expected} blocks of {block_size}, not {needed}"
    assert (table.blocks, table.num_tokens, pool.num_free) == ([], 0, 2), (
        "asking what it would take changes nothing, even if the pool does not have so much"
    )


@pytest.mark.task("4.3")
@given(block_size=sizes, appends=st.lists(tokens, min_size=1, max_size=4))
def test_a_table_grows_by_just_enough_blocks(block_size, appends):
    story.begin()
    pool = BlockAllocator(blocks_for(sum(appends), block_size) + 1)
    table = new_table(block_size, pool)
    num_tokens = 0
    for new in appends:
        before = list(table.blocks)
        copy = table.append(new)
        num_tokens += new
        assert copy is None, f"nothing is shared, so there is nothing to copy; it says {copy}"
        assert table.num_tokens == num_tokens, f"{num_tokens} tokens were appended"
        expected = blocks_for(num_tokens, block_size)
        assert len(table.blocks) == expected, (
            f"{num_tokens} tokens fill {expected} blocks of {block_size}; "
            f"the table has {len(table.blocks)}"
        )
        assert table.blocks[: len(before)] == before, (
            f"the table was {before} before: tokens that are in the cache cannot move"
        )
        assert all(pool.ref_count(block) == 1 for block in table.blocks), (
            "each block of the table is taken from the pool, and held once"
        )
        assert pool.num_used == expected, (
            f"{pool.num_used} blocks of the pool are taken, {expected} stand in the table"
        )


@pytest.mark.task("4.3")
@given(
    block_size=sizes,
    appends=st.lists(st.tuples(st.booleans(), tokens), min_size=1, max_size=6),
)
def test_two_sequences_share_a_pool_and_no_slot(block_size, appends):
    story.begin()
    sums = [sum(n for second, n in appends if second == which) for which in (False, True)]
    pool = BlockAllocator(sum(blocks_for(n, block_size) for n in sums))
    a, b = new_table(block_size, pool, "a"), new_table(block_size, pool, "b")
    for second, new in appends:
        (b if second else a).append(new)
        common = set(a.blocks) & set(b.blocks)
        assert not common, f"both tables have the blocks {common}"
    assert [a.num_tokens, b.num_tokens] == sums
    assert pool.num_free == 0, "all slots were needed, so that every block is taken now"


@pytest.mark.task("4.3")
@given(
    block_size=sizes,
    num_blocks=st.integers(1, 4),
    used=st.integers(0, 16),
    too_many=st.integers(1, 6),
)
def test_an_append_that_does_not_fit_changes_nothing(block_size, num_blocks, used, too_many):
    story.begin()
    pool = BlockAllocator(num_blocks)
    table = new_table(block_size, pool)
    used = min(used, num_blocks * block_size)
    if used:
        table.append(used)
    before = (list(table.blocks), table.num_tokens)
    free = pool.num_free
    new = num_blocks * block_size - used + too_many
    try:
        table.append(new)
    except OutOfBlocksError:
        pass
    else:
        raise AssertionError(
            f"{used + new} tokens do not fit into {num_blocks} blocks of {block_size}: "
            f"append({new}) must raise an OutOfBlocksError"
        )
    now = (list(table.blocks), table.num_tokens)
    assert now == before, f"a refused append changes nothing; the table was {before}, is {now}"
    assert pool.num_free == free, (
        f"a refused append takes nothing: {free} blocks were free before, {pool.num_free} are now"
    )


@pytest.mark.task("4.4")
@given(block_size=sizes, lives=st.lists(st.lists(tokens, max_size=3), min_size=1, max_size=3))
def test_a_freed_table_is_as_new(block_size, lives):
    story.begin()
    num_blocks = max(blocks_for(sum(life), block_size) for life in lives) or 1
    pool = BlockAllocator(num_blocks)
    table = new_table(block_size, pool)
    for life in lives:
        for new in life:
            table.append(new)
        table.free()
        assert pool.num_free == num_blocks, (
            f"{num_blocks - pool.num_free} blocks did not come back to the pool"
        )
        assert table.blocks == [], "a table that was freed names no block"
        assert table.num_tokens == 0, "a table that was freed has no token"


@pytest.mark.task("4.4")
@given(shape=filled_tables())
def test_a_table_that_is_freed_twice_lets_go_once(shape):
    table = by_hand(*shape)
    pool = table.allocator
    pool.share(table.blocks[0])
    story.tell("pool.share(table.blocks[0])", table_state(table))
    shared = table.blocks[0]
    table.free()
    table.free()
    assert pool.ref_count(shared) == 1, (
        f"block {shared} had two holders, and the table was one of them: one is left, "
        f"but the count is {pool.ref_count(shared)}"
    )
    assert pool.num_free == 7, "all other blocks are free"


# The property that the learner writes must find each of these wrong tables.  They are made of the
# learner's own table: it is right, until something happens to it.


class TakesABlockTooEarly(BlockTable):
    """When the last block is full, the next one is taken before a token needs it."""

    def append(self, num_new_tokens):
        super().append(num_new_tokens)
        if self.num_tokens == len(self.blocks) * self.block_size:
            self.blocks.append(self.allocator.allocate())


class TakesABlockTooLate(BlockTable):
    """The token that begins a block has none: it comes with the token after it."""

    def append(self, num_new_tokens):
        super().append(num_new_tokens)
        if self.num_tokens % self.block_size == 1:
            self.allocator.free(self.blocks.pop())


class ReservesAhead(BlockTable):
    """The first append takes two blocks more, for tokens that may never come."""

    def append(self, num_new_tokens):
        first = not self.blocks
        super().append(num_new_tokens)
        if first:
            self.blocks += [self.allocator.allocate(), self.allocator.allocate()]


class NamesABlockTwice(BlockTable):
    """Two logical blocks lie in one physical block: their tokens overwrite each other."""

    def append(self, num_new_tokens):
        super().append(num_new_tokens)
        if len(self.blocks) > 1:
            self.blocks[-1] = self.blocks[0]


class ComesBackToItsFirstBlock(BlockTable):
    """The third logical block lies where the first one does."""

    def append(self, num_new_tokens):
        super().append(num_new_tokens)
        if len(self.blocks) == 3:
            self.blocks[2] = self.blocks[0]


class CountsNewTokensTwice(BlockTable):
    """num_tokens says more than there are slots for."""

    def append(self, num_new_tokens):
        super().append(num_new_tokens)
        self.num_tokens += num_new_tokens


class ForgetsTheOldTokens(BlockTable):
    """num_tokens counts the tokens of the last append alone."""

    def append(self, num_new_tokens):
        super().append(num_new_tokens)
        self.num_tokens = num_new_tokens


class KeepsItsTokensWhenFreed(BlockTable):
    """A table without a block says that it has tokens."""

    def free(self):
        num_tokens = self.num_tokens
        super().free()
        self.num_tokens = num_tokens


class KeepsItsBlocksWhenFreed(BlockTable):
    """A table without a token names blocks that it has let go of."""

    def free(self):
        blocks = list(self.blocks)
        super().free()
        self.blocks = blocks


class TakesTheLowestBlock(BlockTable):
    """Right: its blocks are in order."""

    def append(self, num_new_tokens):
        super().append(num_new_tokens)
        self.blocks = sorted(self.blocks)


class BeginsWithBlocksOfAnother(BlockTable):
    """Right: its first block is that of another table too."""

    def __init__(self, block_size, allocator):
        super().__init__(block_size, allocator)
        self.blocks = [allocator.allocate()]
        self.num_tokens = block_size
        allocator.share(self.blocks[0])


WRONG = [
    TakesABlockTooEarly,
    TakesABlockTooLate,
    ReservesAhead,
    NamesABlockTwice,
    ComesBackToItsFirstBlock,
    CountsNewTokensTwice,
    ForgetsTheOldTokens,
    KeepsItsTokensWhenFreed,
    KeepsItsBlocksWhenFreed,
]
RIGHT = [BlockTable, TakesTheLowestBlock, BeginsWithBlocksOfAnother]


def live(kind):
    """A life of a table: it is looked at after every call."""
    story.begin()
    made_by = f"{kind.__name__}(4, BlockAllocator(8))"
    table = Narrated(kind(4, BlockAllocator(8)), "table", table_state, made_by)
    table.check_integrity()
    for new in (3, 1, 1, 6, 5):
        table.append(new)
        table.check_integrity()
    table.free()
    table.check_integrity()


@pytest.mark.task("4.5")
@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_the_property_finds_a_wrong_table(kind):
    must_find(live, kind, RIGHT)


@pytest.mark.task("4.5")
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_the_property_lets_a_right_table_pass(kind):
    must_let_pass(live, kind, WRONG)
