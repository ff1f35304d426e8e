"""Lesson 2: contiguous runs of blocks, as a buddy allocator gives them out (T2)."""

import pytest
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st
from turned import must_find, must_let_pass

from minipaged.course.narration import Narrated, story
from minipaged.errors import OutOfBlocksError
from minipaged.memory.buddy_allocator import BuddyAllocator, run_length


def runs_state(pool):
    """The free and the used runs, by their first and last blocks."""
    free = [(start, n) for n, starts in pool._free.items() for start in starts]
    return f"free: {spans(free)}   used: {spans(pool._used.items())}"


def spans(runs):
    """Runs as "[0-3] [6]"."""
    parts = [f"[{s}]" if n == 1 else f"[{s}-{s + n - 1}]" for s, n in sorted(runs)]
    return " ".join(parts) or "none"


def new_pool(num_blocks, kind=BuddyAllocator):
    """A pool whose story is told from here on."""
    story.begin()
    return Narrated(kind(num_blocks), "pool", runs_state, f"{kind.__name__}({num_blocks})")


def power_of_two(num_blocks):
    """The length of a run for so many blocks, found by trying."""
    return next(2**order for order in range(20) if 2**order >= num_blocks)


class Held:
    """The runs that were taken and not given back, and whether the pool agrees."""

    def __init__(self, pool):
        self.pool, self.lengths = pool, {}

    def take(self, wanted):
        """Ask for a run, and check that it is one, and nobody else's."""
        pool, length = self.pool, power_of_two(wanted)
        # Free blocks that can be had in runs of each length; the pool counts them itself.
        before = {n: pool._target.num_free_within(n) for n in (length, *self.longer(length))}
        start = pool.allocate(wanted)
        run = range(start, start + length)
        assert start >= 0, f"a run at block {start}; the pool begins at 0"
        assert run.stop <= pool.num_blocks, (
            f"{wanted} blocks are a run of {length}: one at block {start} goes beyond the pool"
        )
        assert start % length == 0, f"a run of {length} cannot begin at block {start}"
        for other, n in self.lengths.items():
            together = sorted(set(run) & set(range(other, other + n)))
            assert not together, f"blocks {together} were given out while somebody held them"
        recorded = pool._target._used.get(start)
        if recorded != length:
            raise AssertionError(
                f"{wanted} blocks are a run of {length}; _used has {recorded} for block {start}"
            )
        self.lengths[start] = length
        self.check_count()
        after = {n: pool._target.num_free_within(n) for n in before}
        if after[length] != before[length] - length:
            raise AssertionError(
                f"{before[length]} blocks could be had in runs of {length} or more before, and "
                f"{after[length]} after one of {length} was taken"
            )
        return start, before, after

    def longer(self, length):
        """Lengths of longer runs."""
        return [length << k for k in range(1, self.pool.num_blocks.bit_length())]

    def give_back(self, start):
        """Free a run."""
        del self.lengths[start]
        self.pool.free(start)
        self.check_count()

    def check_count(self):
        """What is not held is free."""
        free = self.pool.num_blocks - sum(self.lengths.values())
        counted = self.pool.num_free
        if counted != free:
            raise AssertionError(f"{free} blocks are held by nobody; num_free is {counted}")


sizes = st.integers(1, 16)


@pytest.mark.task("2.1")
@given(num_blocks=st.integers(1, 5000))
def test_a_run_is_the_next_power_of_two(num_blocks):
    story.begin()
    length = run_length(num_blocks)
    story.tell(f"run_length({num_blocks})  -> {length}")
    assert length >= num_blocks, f"{num_blocks} blocks do not fit into {length}"
    assert length < 2 * num_blocks, f"a run of {length} is too long: half of it would do"
    assert length & (length - 1) == 0, f"{length} is no power of two"


@pytest.mark.task("2.1")
@pytest.mark.parametrize("order", range(12))
def test_a_power_of_two_is_not_rounded(order):
    story.begin()
    got = run_length(2**order)
    assert got == 2**order, f"run_length({2**order}) is {got}; what fits exactly needs no more"


@pytest.mark.task("2.2")
@given(num_blocks=sizes, wanted=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_runs_do_not_overlap(num_blocks, wanted):
    pool = new_pool(num_blocks)
    held = Held(pool)
    for blocks in wanted:
        length = power_of_two(blocks)
        if pool._target.num_free_within(length):
            held.take(blocks)
            continue
        before = pool.num_free
        with pytest.raises(OutOfBlocksError, match=f"a run of {length} blocks is needed"):
            pool.allocate(blocks)
        assert pool.num_free == before, "a refused call must change nothing"


@pytest.mark.task("2.2")
@given(num_blocks=sizes, wanted=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_long_runs_stay_whole_while_shorter_ones_do(num_blocks, wanted):
    pool = new_pool(num_blocks)
    held = Held(pool)
    for blocks in wanted:
        length = power_of_two(blocks)
        if not pool._target.num_free_within(length):
            with pytest.raises(OutOfBlocksError):
                pool.allocate(blocks)
            continue
        _, before, after = held.take(blocks)
        # If runs of n or more did not hold all that could be had, there was a shorter one.
        for n in held.longer(length):
            if before[n] < before[length] and after[n] != before[n]:
                raise AssertionError(
                    f"a run of {n} blocks or more was cut up for {length}, although there was "
                    "a shorter one that was long enough"
                )


@pytest.mark.task("2.2")
def test_blocks_enough_and_no_run_of_them():
    """External fragmentation, without any free."""
    pool = new_pool(12)  # begins as a run of 8 and one of 4
    pool.allocate(1)
    pool.allocate(8)
    with pytest.raises(OutOfBlocksError, match="a run of 4 blocks is needed and none is free"):
        pool.allocate(3)
    assert pool.num_free == 3, "a refused call must change nothing"


steps = st.lists(
    st.tuples(st.booleans(), st.integers(1, 5), st.integers(0, 99)), min_size=1, max_size=30
)


@pytest.mark.task("2.3")
@given(num_blocks=sizes, steps=steps)
def test_all_comes_back_and_is_whole_again(num_blocks, steps):
    pool = new_pool(num_blocks)
    whole = runs_state(pool._target)
    held = Held(pool)
    for takes, blocks, which in steps:
        if takes and pool._target.num_free_within(power_of_two(blocks)):
            held.take(blocks)
        elif held.lengths:
            held.give_back(sorted(held.lengths)[which % len(held.lengths)])
    if not held.lengths:
        held.take(1)
    for start in sorted(held.lengths):
        held.give_back(start)
    state = runs_state(pool._target)
    if state != whole:
        raise AssertionError(f"all is free again; it began as {whole}, and is now {state}")


@pytest.mark.task("2.3")
@given(num_blocks=st.sampled_from([4, 8, 12, 16]), order=st.randoms(use_true_random=False))
@at_most(60)
def test_free_halves_are_joined_and_other_neighbours_are_not(num_blocks, order):
    pool = new_pool(num_blocks)
    held = Held(pool)
    for _ in range(num_blocks):
        held.take(1)
    blocks = list(range(num_blocks))
    order.shuffle(blocks)
    for block in blocks:
        held.give_back(block)
        free = set(range(num_blocks)) - set(held.lengths)
        for length in (1, 2, 4, 8):
            # Runs of this length or more that are wholly free, at multiples of the length.
            starts = range(0, num_blocks - length + 1, length)
            right = sum(length for s in starts if free.issuperset(range(s, s + length)))
            can = pool._target.num_free_within(length)
            if can != right:
                raise AssertionError(
                    f"blocks {sorted(free)} are free: {right} of them make runs of {length} that "
                    f"begin at multiples of {length}, and {can} can be had in such runs"
                )


@pytest.mark.task("2.3")
def test_only_the_beginning_of_a_run_can_be_given_back():
    pool = new_pool(8)
    start = pool.allocate(4)
    for block in (start + 1, start + 3, start ^ 4, 8, -1):
        with pytest.raises(ValueError, match=f"block {block} is freed but no run in use begins"):
            pool.free(block)
    assert pool.num_free == 4, "a refused call must change nothing"
    pool.free(start)
    with pytest.raises(ValueError, match=f"block {start} is freed but no run in use begins"):
        pool.free(start)


@pytest.mark.task("2.3")
def test_whoever_asked_is_told_of_every_freed_block():
    freed = []
    story.begin()
    pool = BuddyAllocator(8, on_free=freed.append)
    pool = Narrated(pool, "pool", runs_state, "BuddyAllocator(8, on_free=freed.append)")
    start = pool.allocate(3)
    pool.free(start)
    run = list(range(start, start + 4))
    assert sorted(freed) == run, f"the run had the blocks {run}; on_free was called with {freed}"


# The property that the learner writes must find each of these wrong pools.  They are made of the
# learner's own pool: its runs are right, until something happens to them.


class GivesARunTwice(BuddyAllocator):
    """A run that was taken is still among the free ones."""

    def allocate(self, num_blocks):
        start = super().allocate(num_blocks)
        self._free[self._used[start]][start] = None
        self.num_free += self._used[start]
        return start


class LosesAHalf(BuddyAllocator):
    """Of a run that was cut in two, the half that is not used is in no list."""

    def allocate(self, num_blocks):
        start = super().allocate(num_blocks)
        length = self._used[start]
        if self._free[length].pop(start ^ length, 0) is None:
            self.num_free -= length
        return start


class DoesNotJoin(BuddyAllocator):
    """Two halves of a run are both free, and stay halves."""

    def free(self, start):
        length = self._used.pop(start)
        self.num_free += length
        self._free[length][start] = None


class JoinsNeighbours(BuddyAllocator):
    """Two free neighbours are joined, although they are not the halves of one run."""

    def free(self, start):
        super().free(start)
        for length in (1, 2):
            for first in list(self._free[length]):
                if first % (2 * length) and first + length in self._free[length]:
                    del self._free[length][first], self._free[length][first + length]
                    self._free[2 * length][first] = None


class OverlapsWhatIsFree(BuddyAllocator):
    """A run begins inside of a free one, and elsewhere a run is lost: all sums are right."""

    def free(self, start):
        super().free(start)
        if self._free[2].pop(4, 0) is None:
            self._free[2][2] = None


class ForgetsToCount(BuddyAllocator):
    """num_free does not grow when a run is given back."""

    def free(self, start):
        before = self.num_free
        super().free(start)
        self.num_free = before


class RecordsWhatWasAsked(BuddyAllocator):
    """A run of 4 that was taken for 3 blocks is written down as a run of 3."""

    def allocate(self, num_blocks):
        start = super().allocate(num_blocks)
        self._used[start] = num_blocks
        return start


class GoesBeyondTheEnd(BuddyAllocator):
    """A pool of 6 blocks, 0 to 5, in which block 6 is free as well."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self._free[1][num_blocks] = None
        self.num_free += 1


class BeginsAtOne(BuddyAllocator):
    """Block 0 is in no run."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        for length in (4, 2, 1):
            if 0 in self._free[length]:
                del self._free[length][0]
                for half in [n for n in (1, 2) if n < length]:
                    self._free[half][half] = None
                self.num_free -= 1


class TakesTheLowestRun(BuddyAllocator):
    """Right: of the free runs of a length it takes the one with the lowest block."""

    def allocate(self, num_blocks):
        for length, starts in self._free.items():
            self._free[length] = dict.fromkeys(sorted(starts, reverse=True))
        return super().allocate(num_blocks)


class TakesTheHighestRun(BuddyAllocator):
    """Right: of the free runs of a length it takes the one with the highest block."""

    def allocate(self, num_blocks):
        for length, starts in self._free.items():
            self._free[length] = dict.fromkeys(sorted(starts))
        return super().allocate(num_blocks)


WRONG = [
    GivesARunTwice,
    LosesAHalf,
    DoesNotJoin,
    JoinsNeighbours,
    OverlapsWhatIsFree,
    ForgetsToCount,
    RecordsWhatWasAsked,
    GoesBeyondTheEnd,
    BeginsAtOne,
]
RIGHT = [BuddyAllocator, TakesTheLowestRun, TakesTheHighestRun]


def live(kind):
    """A life of a pool of 6 blocks, a run of 4 and one of 2, which is checked after every call."""
    pool = new_pool(6, kind)

    def check():
        """Call the property; it is told only where it complains."""
        told = len(story.lines)
        pool.check_integrity()
        del story.lines[told:]

    def take(num_blocks):
        start = pool.allocate(num_blocks)
        check()
        return start

    def give_back(start):
        pool.free(start)
        check()

    check()

    give_back(take(3))
    first, second = take(1), take(2)
    give_back(first)
    give_back(second)
    single = [take(1) for _ in range(6)]
    for block in (1, 2):  # neighbours, but not the halves of a run
        single.remove(block)
        give_back(block)
    for block in single:
        give_back(block)


@pytest.mark.task("2.4")
@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_the_property_finds_a_wrong_pool(kind):
    must_find(live, kind, RIGHT)


@pytest.mark.task("2.4")
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_the_property_lets_a_right_pool_pass(kind):
    must_let_pass(live, kind, WRONG)
