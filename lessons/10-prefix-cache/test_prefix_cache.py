"""Lesson 10: full blocks found again by their whole prefix (T2, T4)."""

import zlib
from collections import Counter

import pytest
from effort import at_most
from hypothesis import example, given
from hypothesis import strategies as st
from turned import must_find, must_let_pass

from minipaged.course.narration import Narrated, story
from minipaged.course.notation import block_set, name, pool_state
from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.prefix_cache import Entry, PrefixCache

texts = st.lists(st.integers(0, 2), max_size=9)
prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=6)
block_sizes = st.integers(1, 3)
choices = st.lists(st.integers(0, 99), max_size=40)


class Colliding(PrefixCache):
    """Whose names are nearly worthless: there are three of them."""

    def chain(self, before, tokens):
        return bytes([zlib.crc32(before + bytes(tokens)) % 3])


def full_blocks(tokens, block_size):
    """The tokens of every full block, in order."""
    count = len(tokens) // block_size
    return [tuple(tokens[i * block_size : (i + 1) * block_size]) for i in range(count)]


def known_blocks(cache):
    """The cache's entries in short: block, tokens, and the block behind which they stand."""
    parts = []
    for entry in cache._entries.values():
        behind = "" if entry.parent is None else f" behind block {entry.parent}"
        parts.append(f"block {entry.block}: {entry.tokens}{behind}")
    return "known: " + ("; ".join(parts) or "nothing")


def name_of(cache, tokens):
    """The name of a whole prefix of full blocks."""
    name = b""
    for part in full_blocks(tokens, cache.block_size):
        name = cache.chain(name, part)
    return name


# 10.1  Tokens that look alike when they are not told apart carefully.

tricky = st.sampled_from([-2, -1, 0, 1, 2, 3, 11, 12, 23, 111, 256, 65_536, 2**40])


@pytest.mark.task("10.1")
@given(tokens=st.lists(tricky, min_size=2, max_size=6), seed=st.integers(0, 2**128 - 1))
def test_the_same_prefix_has_the_same_name(tokens, seed):
    story.begin()
    story.tell(f"a, b = PrefixCache(2, seed={seed}), PrefixCache(2, seed={seed})")
    one, other = name_of(PrefixCache(2, seed), tokens), name_of(PrefixCache(2, seed), tokens)
    story.tell(f"the blocks {full_blocks(tokens, 2)}", f"a: {one!r}   b: {other!r}")
    assert isinstance(one, bytes), f"a name is bytes, not {one!r}"
    assert one == other, "with the same seed the same tokens must have the same name"


@pytest.mark.task("10.1")
@given(
    one=st.lists(tricky, min_size=2, max_size=6),
    other=st.lists(tricky, min_size=2, max_size=6),
    common=st.lists(tricky, max_size=4),
    swap=st.booleans(),
)
@example(one=[1, 23], other=[12, 3], common=[], swap=False)
@example(one=[-1, 0], other=[-2, 0], common=[], swap=False)
def test_another_prefix_has_another_name(one, other, common, swap):
    story.begin()
    if swap:  # the same blocks, in another order
        other = other[:2] + one[:2]
        one = one[:2] + other[:2]
    else:  # the same last block, behind other ones
        one, other = one + common, other + common
    a, b = full_blocks(one, 2), full_blocks(other, 2)
    cache = PrefixCache(2, seed=0)
    story.tell("cache = PrefixCache(2, seed=0)")
    first, second = name_of(cache, one), name_of(cache, other)
    story.tell(f"the blocks {a}", repr(first))
    story.tell(f"the blocks {b}", repr(second))
    if a != b:
        assert first != second, "two prefixes that differ have one name"


@pytest.mark.task("10.1")
@pytest.mark.parametrize("tokens", [(1, 2), (0, 0)])
def test_nobody_knows_the_names_without_the_seed(tokens):
    story.begin()
    caches = {"seed=5": PrefixCache(2, 5), "seed=6": PrefixCache(2, 6)}
    caches |= {f"a secret seed, {n}": PrefixCache(2) for n in ("drawn first", "drawn next")}
    for before in (b"", b"the name of a block"):
        names = {}
        for seed, cache in caches.items():
            names[seed] = cache.chain(before, tokens)
            story.tell(f"with {seed}: chain({before!r}, {tokens})", repr(names[seed]))
        assert len(set(names.values())) == len(names), (
            "the name of a block is the same with two different seeds; whoever knows the one can "
            "tell the other"
        )


# 10.2


class Library:
    """A cache and, beside it, the obvious: every prefix that was learned, whole."""

    def __init__(self, block_size, kind=PrefixCache):
        story.begin("learn() inserts every full block that is not known, in new blocks 0, 1, ...")
        self.cache = kind(block_size, seed=0)
        story.tell(f"cache = {kind.__name__}({block_size}, seed=0)")
        self.blocks = {}  # every prefix of full blocks -> its block
        self.num_blocks = 0

    def learn(self, tokens):
        cache, size = self.cache, self.cache.block_size
        name, parent = b"", None
        story.start_call(f"learn({tokens})")
        for i, part in enumerate(full_blocks(tokens, size)):
            name = cache.chain(name, part)
            whole = tuple(tokens[: (i + 1) * size])
            if whole not in self.blocks:
                block = self.num_blocks
                before = len(cache)
                if not cache.insert(name, parent, part, block):
                    assert len(cache) == before, "insert returned False and changed something"
                    break  # a collision: what follows could never be found
                assert len(cache) == before + 1, (
                    "insert returned True, and there is no entry more: it took over a name that "
                    "another block had"
                )
                self.blocks[whole] = block
                self.num_blocks += 1
            parent = self.blocks[whole]
        story.end_call("", known_blocks(cache))

    def expected(self, tokens, most_blocks):
        """Blocks of the longest prefix that was learned."""
        found = []
        for i in range(1, most_blocks + 1):
            whole = tuple(tokens[: i * self.cache.block_size])
            if whole not in self.blocks:
                break
            found.append(self.blocks[whole])
        return found

    def find(self, tokens, most_blocks):
        story.start_call(f"cache.find({tokens}, most_blocks={most_blocks})")
        found = self.cache.find(tokens, most_blocks)
        story.end_call(f"  -> {found}", known_blocks(self.cache))
        return found


@pytest.mark.task("10.2")
@given(
    learned=st.lists(texts, max_size=4), tokens=texts, block_size=block_sizes, less=st.booleans()
)
def test_the_longest_known_prefix_is_found(learned, tokens, block_size, less):
    library = Library(block_size)
    for text in learned:
        library.learn(text)
    most = len(tokens) // block_size
    most = max(0, most - 1) if less else most
    expected = library.expected(tokens, most)
    found = library.find(tokens, most)
    assert found == expected, f"the known prefix of {tokens} lies in the blocks {expected}"


@pytest.mark.task("10.2")
@given(learned=st.lists(texts, max_size=5), tokens=texts, block_size=block_sizes)
def test_a_collision_is_a_miss_and_never_a_wrong_hit(learned, tokens, block_size):
    library = Library(block_size, Colliding)
    for text in learned:
        library.learn(text)
    found = library.find(tokens, len(tokens) // block_size)
    expected = library.expected(tokens, len(tokens) // block_size)
    assert found == expected[: len(found)], (
        f"the blocks {found} do not hold {tokens}: another prefix had the same name, and its "
        "tokens or its parent were not compared"
    )
    assert len(found) == len(expected), f"{tokens} is known, in the blocks {expected}"


@pytest.mark.task("10.2")
def test_a_name_alone_is_no_hit():
    story.begin()
    cache = PrefixCache(2, seed=0)
    story.tell("cache = PrefixCache(2, seed=0)")
    for label, parent, tokens, block in ((b"x", None, (1, 2), 0), (b"y", 0, (3, 4), 1)):
        story.tell(f"cache.insert({label!r}, {parent}, {tokens}, {block})")
        assert cache.insert(label, parent, tokens, block) is True, "the name was free"
    for label, parent, tokens, expected in (
        (b"x", None, (1, 2), 0),
        (b"y", 0, (3, 4), 1),
        (b"z", None, (1, 2), None),
        (b"y", 0, (3, 5), None),
        (b"y", None, (3, 4), None),
        (b"y", 7, (3, 4), None),
    ):
        found = cache.look_up(label, parent, tokens)
        story.tell(f"cache.look_up({label!r}, {parent}, {tokens})  -> {found}", known_blocks(cache))
        assert found == expected, f"it must return {expected}: name, parent and tokens must agree"
    story.tell("cache.insert(b'x', None, (8, 8), 5)")
    assert cache.insert(b"x", None, (8, 8), 5) is False, "the name is taken: insert returns False"
    found = cache.look_up(b"x", None, (1, 2))
    story.tell(f"cache.look_up(b'x', None, (1, 2))  -> {found}", known_blocks(cache))
    assert found == 0, "who was first with a name keeps it"


@pytest.mark.task("10.2")
def test_what_was_forgotten_can_be_learned_again():
    library = Library(2)
    library.learn([1, 2, 3, 4])
    cache = library.cache
    cache.forget(1)
    story.tell("cache.forget(1)", known_blocks(cache))
    assert library.find([1, 2, 3, 4], 2) == [0], "block 1 was forgotten, block 0 was not"
    label = name_of(cache, [1, 2, 3, 4])
    assert cache.insert(label, 0, (3, 4), 6), "the name is free again"
    story.tell("cache.insert(name of (1, 2) (3, 4), 0, (3, 4), 6)", known_blocks(cache))
    assert library.find([1, 2, 3, 4], 2) == [0, 6], "the prefix now ends in block 6"
    cache.forget(6)
    assert library.find([1, 2, 3, 4], 2) == [0], "block 6 was forgotten"


# 10.3


class Lender:
    """A pool and what must be true of it, kept beside it."""

    def __init__(self, num_blocks):
        story.begin()
        self.freed, self.evicted = [], []
        pool = BlockAllocator(num_blocks, on_free=self.freed.append)
        pool.on_evict = self.evicted.append
        made = f"BlockAllocator({num_blocks})"
        self.quiet, self.pool = pool, Narrated(pool, "pool", self.state, made)
        self.empty = set(range(num_blocks))  # free, with nothing worth keeping
        self.cached = []  # free and remembered, in the order in which they were let go
        self.remembered = set()
        self.holds = Counter()

    @staticmethod
    def state(pool):
        order = f"   in order: {list(pool._cached)}" if len(pool._cached) > 1 else ""
        return pool_state(pool) + order

    def allocate(self):
        self.evicted.clear()
        block = self.pool.allocate()
        if self.empty:
            assert block in self.empty, (
                f"block {block} was given out, and blocks {sorted(self.empty)} are free with "
                "nothing in them to keep"
            )
            self.empty.remove(block)
            assert not self.evicted, f"on_evict was told of block {self.evicted[0]} too early"
        else:
            oldest = self.cached.pop(0)
            assert block == oldest, f"block {oldest} has been free longest, and goes first"
            assert self.evicted == [block], "on_evict is told, once, of the block that is given out"
            self.remembered.remove(block)
        self.holds[block] += 1

    def remember(self, block):
        self.pool.remember(block)
        self.remembered.add(block)

    def share(self, block):
        self.pool.share(block)
        if block in self.cached:
            self.cached.remove(block)
        self.holds[block] += 1

    def free(self, block):
        self.freed.clear()
        self.pool.free(block)
        self.holds -= Counter([block])
        if block in self.holds:
            expected = []
        elif block in self.remembered:
            expected = []
            self.cached.append(block)
        else:
            expected = [block]
            self.empty.add(block)
        assert self.freed == expected, (
            f"on_free was told of {self.freed}, and should have been of {expected}: it is for a "
            "block whose contents nobody needs any more"
        )

    def check(self):
        pool = self.quiet
        for block in range(pool.num_blocks):
            count = pool.ref_count(block)
            assert count == self.holds[block], f"block {block} has {self.holds[block]} holders"
            known = block in self.remembered
            assert pool.is_remembered(block) == known, (
                f"block {block} is {'still' if known else 'no longer'} one to remember"
            )
        assert pool.cached_blocks == self.cached, (
            f"free and remembered, the oldest first, are the blocks {self.cached}"
        )
        assert pool.num_free == len(self.empty) + len(self.cached), "a cached block is a free block"


@pytest.mark.task("10.3")
@given(num_blocks=st.integers(1, 5), choices=choices)
def test_remembered_blocks_are_given_out_last_and_the_oldest_first(num_blocks, choices):
    lender = Lender(num_blocks)
    for choice in choices:
        what, which = choice % 5, choice // 5
        held = sorted(lender.holds)
        if what <= 1 and (lender.empty or lender.cached):
            lender.allocate()
            if what == 1:
                lender.remember(max(lender.holds, key=lambda b: (b not in held, b)))
        elif what == 2 and (held or lender.cached):
            blocks = held + lender.cached
            lender.share(blocks[which % len(blocks)])
        elif held:
            lender.free(held[which % len(held)])
        lender.check()


@pytest.mark.task("10.3")
def test_of_several_cached_blocks_the_one_let_go_longest_ago_is_given_out():
    lender = Lender(3)
    for _ in range(3):
        lender.allocate()
    blocks = list(lender.holds)
    for block in blocks:
        lender.remember(block)
    for block in (blocks[1], blocks[2], blocks[0]):
        lender.free(block)
        lender.check()
    lender.share(blocks[1])  # used once more, and let go last
    lender.free(blocks[1])
    for expected in (blocks[2], blocks[0], blocks[1]):
        lender.allocate()
        assert lender.evicted == [expected], (
            f"block {expected} was let go longest ago, and on_evict told of {lender.evicted}"
        )
        lender.check()


@pytest.mark.task("10.3")
def test_a_cached_block_can_be_shared_again():
    lender = Lender(2)
    lender.allocate()
    (block,) = lender.holds
    lender.remember(block)
    lender.free(block)
    lender.check()
    lender.share(block)
    lender.check()
    lender.free(block)
    lender.check()


@pytest.mark.task("10.3")
@pytest.mark.parametrize("verb", ["shared", "remembered", "freed"])
def test_what_nobody_holds_and_nobody_remembers_is_refused(verb):
    story.begin()
    pool = Narrated(BlockAllocator(2), "pool", pool_state, "BlockAllocator(2)")
    block = pool.allocate()
    pool.free(block)
    call = {"shared": pool.share, "remembered": pool.remember, "freed": pool.free}[verb]
    with pytest.raises(ValueError, match=f"block {block} is {verb} but not in use"):
        call(block)
    assert pool.num_free == 2, "a refused call must change nothing"


# 10.4


def memory_state(manager):
    """All tables, what is free, and what the cache knows."""
    tables = [
        f"table {name(seq)}: {table.blocks} {table.num_tokens} tokens"
        for seq, table in manager.tables.items()
    ]
    pool, cache = manager.device, manager.prefix_cache
    parts = [*tables, f"{pool.num_free} blocks free"]
    if cache is not None:
        parts += [f"of them cached: {block_set(pool._cached)}", known_blocks(cache)]
    return "   ".join(parts)


class Memory:
    """A block manager, and beside it what each physical block contains: its whole prefix."""

    def __init__(self, block_size, num_blocks, kind=PrefixCache):
        story.begin()
        self.cache = kind(block_size, seed=0)
        manager = BlockManager(block_size, num_blocks, prefix_cache=self.cache)
        made = f"BlockManager({block_size}, {num_blocks}, prefix_cache={kind.__name__}(...))"
        self.quiet, self.manager = manager, Narrated(manager, "manager", memory_state, made)
        self.contents = {}
        self.texts = {}  # sequence -> its tokens

    def fits(self, tokens):
        manager = self.quiet
        return manager.blocks_for(len(tokens)) <= manager.device.num_free

    def begin(self, seq, tokens, is_counted=True):
        """Adopt what is known, check that it is the prefix, compute the rest."""
        manager, size = self.manager, self.manager.block_size
        counted = {} if is_counted else {"is_counted": False}
        found = manager.adopt_prefix(seq, list(tokens), **counted)
        assert found < len(tokens), "at least one token is left to compute: its output is needed"
        assert found % size == 0, f"{found} tokens were found; only full blocks are known"
        blocks = list(manager.tables[seq].blocks) if seq in manager.tables else []
        assert len(blocks) * size == found, (
            f"{found} tokens were found, and the table has the blocks {blocks}"
        )
        for i, block in enumerate(blocks):
            prefix = tuple(tokens[: (i + 1) * size])
            assert self.contents.get(block) == prefix, (
                f"block {block} was found for {prefix} and contains {self.contents.get(block)}"
            )
        manager.append(seq, len(tokens) - found)
        self.texts[seq] = list(tokens)
        self.write(seq, found)
        return found

    def grow(self, seq, tokens):
        start = len(self.texts[seq])
        self.manager.append(seq, len(tokens))
        self.texts[seq] += tokens
        self.write(seq, start)

    def write(self, seq, start):
        """The forward pass: each token goes into its slot."""
        size, text = self.manager.block_size, self.texts[seq]
        for position in range(start, len(text)):
            block = self.manager.tables[seq].blocks[position // size]
            self.contents[block] = tuple(text[: position + 1])

    def mark_computed(self, seq):
        self.manager.mark_computed(seq, list(self.texts[seq]))
        self.check()

    def end(self, seq):
        self.manager.free(seq)
        del self.texts[seq]
        self.check()

    def check(self):
        manager, size = self.quiet, self.quiet.block_size
        holds = Counter()
        for seq, text in self.texts.items():
            table = manager.tables[seq]
            holds.update(table.blocks)
            assert table.num_tokens == len(text), f"sequence {seq} has {len(text)} tokens"
            for i in range(manager.blocks_for(len(text))):
                prefix = tuple(text[: (i + 1) * size])
                assert self.contents[table.blocks[i]] == prefix, (
                    f"block {table.blocks[i]} of sequence {seq} should hold {prefix}"
                )
        manager.device.check_integrity(holds)
        known = {entry.block for entry in self.cache._entries.values()}
        for entry in self.cache._entries.values():
            assert len(entry.tokens) == size, f"a block that is not full is known: {entry}"
            assert manager.device.is_remembered(entry.block), (
                f"block {entry.block} is known, and the pool was not asked to remember it"
            )
            assert entry.parent is None or entry.parent in known, (
                f"no way leads to {entry}: its parent is not known"
            )


def common_tokens(tokens, others, block_size):
    """Tokens in full blocks that begin like one of the others, the last token left out."""
    longest = 0
    for other in others:
        equal = 0
        while equal < min(len(tokens), len(other)) and tokens[equal] == other[equal]:
            equal += 1
        longest = max(longest, equal)
    return min(longest, len(tokens) - 1) // block_size * block_size


@pytest.mark.task("10.4")
@given(prompts=prompts, block_size=block_sizes)
def test_with_room_for_all_every_prefix_is_found(prompts, block_size):
    memory = Memory(block_size, 60)
    hits = 0
    for seq, tokens in enumerate(prompts):
        expected = common_tokens(tokens, prompts[:seq], block_size)
        found = memory.begin(seq, tokens)
        assert found == expected, f"{expected} tokens of {tokens} were computed before"
        hits += found
        memory.mark_computed(seq)
        memory.end(seq)
    assert memory.cache.num_hit_tokens == hits, f"{hits} tokens were found in all"
    asked = sum(map(len, prompts))
    assert memory.cache.num_queried_tokens == asked, f"{asked} tokens were asked for in all"


def play(memory, prompts, choices):
    """Sequences begin, grow and end in some order, in a pool that is too small to keep all."""
    todo = list(enumerate(prompts))
    for choice in choices:
        what, which = choice % 4, choice // 4
        alive = list(memory.texts)
        if what <= 1 and todo:
            seq, tokens = todo[0]
            if memory.fits(tokens):
                todo.pop(0)
                memory.begin(seq, tokens)
                memory.mark_computed(seq)
        elif what == 2 and alive and memory.manager.device.num_free:
            seq = alive[which % len(alive)]
            memory.grow(seq, [which % 3])
            memory.mark_computed(seq)
        elif alive:
            memory.end(alive[which % len(alive)])


@pytest.mark.task("10.4")
@given(prompts=prompts, choices=choices, block_size=block_sizes, num_blocks=st.integers(3, 9))
def test_a_table_holds_the_tokens_of_its_sequence(prompts, choices, block_size, num_blocks):
    memory = Memory(block_size, num_blocks)
    if memory.fits(prompts[0]):
        memory.begin(25, prompts[0])
        memory.mark_computed(25)
    else:
        memory.manager.adopt_prefix(25, prompts[0])
    play(memory, prompts, choices)


@pytest.mark.task("10.4")
@given(prompts=prompts, choices=choices, block_size=block_sizes)
@at_most(50)
def test_with_names_that_collide_too(prompts, choices, block_size):
    memory = Memory(block_size, 12, Colliding)
    memory.begin(25, prompts[0])
    memory.mark_computed(25)
    play(memory, prompts, choices)


@pytest.mark.task("10.4")
def test_two_who_compute_the_same_end_up_with_one_copy():
    memory = Memory(2, 9)
    memory.begin(0, [1, 2, 3, 4, 5])
    memory.begin(1, [1, 2, 3, 4, 6])
    assert memory.manager.device.num_used == 6, "neither had computed anything when both began"
    memory.mark_computed(0)
    memory.mark_computed(1)
    first, second = (memory.manager.tables[seq].blocks for seq in (0, 1))
    assert first[:2] == second[:2], "both have computed 1, 2, 3, 4: one copy of it is enough"
    assert memory.manager.device.num_used == 4, "two blocks with 1, 2, 3, 4 and one for each end"


@pytest.mark.task("10.4")
def test_sequences_of_different_salts_share_nothing():
    story.begin()
    manager = BlockManager(2, 9, prefix_cache=PrefixCache(2, seed=0))
    told = Narrated(manager, "manager", memory_state, "BlockManager(2, 9, prefix_cache=...)")
    tokens = [1, 2, 3, 4, 5]
    for seq, salt, expected in ((0, b"", 0), (1, b"a", 0), (2, b"b", 0), (3, b"a", 4), (4, b"", 4)):
        known = told.cached_prefix(tokens, salt)
        assert len(known) * 2 == expected, f"blocks {known} are known for salt {salt}"
        found = told.adopt_prefix(seq, tokens, salt=salt)
        assert found == expected, f"{expected} tokens were computed before with salt {salt}"
        told.append(seq, len(tokens) - found)
        told.mark_computed(seq, tokens, salt)
        told.free(seq)


@pytest.mark.task("10.4")
def test_at_least_one_token_is_left_to_compute():
    memory = Memory(2, 9)
    memory.begin(0, [1, 2, 3, 4])
    memory.mark_computed(0)
    memory.end(0)
    found = memory.begin(1, [1, 2, 3, 4])
    assert found == 2, "all four tokens are known, but the last one is computed again"


@pytest.mark.task("10.4")
def test_what_comes_back_after_a_preemption_is_no_hit():
    memory = Memory(2, 9)
    memory.begin(0, [1, 2, 3])
    memory.mark_computed(0)
    memory.end(0)
    found = memory.begin(0, [1, 2, 3], is_counted=False)
    assert found == 2, "it is found like everything else"
    cache = memory.cache
    assert (cache.num_queried_tokens, cache.num_hit_tokens) == (3, 0), (
        "3 tokens were asked for at first and none was found; what is not counted changes neither"
    )


@pytest.mark.task("10.4")
def test_without_a_cache_nothing_is_found():
    story.begin()
    manager = Narrated(BlockManager(2, 4), "manager", memory_state, "BlockManager(2, 4)")
    assert manager.adopt_prefix(0, [1, 2, 3]) == 0, "there is no cache to ask"
    assert manager.cached_prefix([1, 2, 3]) == [], "there is no cache to ask"


# 10.5  The property that the learner writes must find each of these wrong caches.  They are made
# of the learner's own cache: its books are right, until something happens to them.


class StillKnowsWhatWasGivenAway(PrefixCache):
    """A block that was given away is struck out of one book only, and its entry is still there."""

    def forget(self, block):
        self._hashes.pop(block)


class StillKnowsTheNameOfABlock(PrefixCache):
    """A block that was given away still has its name in the second book."""

    def forget(self, block):
        del self._entries[self._hashes[block]]


class ForgetsNothing(PrefixCache):
    """The pool gives a block away, and the cache does not listen."""

    def forget(self, block):
        pass


class ForgetsTheParentToo(PrefixCache):
    """With a block the one before it is forgotten, and others that stand behind it are cut off."""

    def forget(self, block):
        parent = self._entries[self._hashes[block]].parent
        super().forget(block)
        if parent in self._hashes:
            super().forget(parent)


class KnowsABlockByTwoNames(PrefixCache):
    """A block has a second name, under which it is found after it was given away."""

    def insert(self, prefix, parent, tokens, block):
        done = super().insert(prefix, parent, tokens, block)
        self._entries[b"another" + prefix] = Entry(block, parent, tokens)
        return done


class KnowsBlocksThatAreNotFull(PrefixCache):
    """An entry has one token less than a block."""

    def insert(self, prefix, parent, tokens, block):
        done = super().insert(prefix, parent, tokens, block)
        self._entries[prefix] = Entry(block, parent, tokens[:-1])
        return done


class WritesDownTheBlockBesideIt(PrefixCache):
    """An entry leads to another block than the one that was filled."""

    def insert(self, prefix, parent, tokens, block):
        done = super().insert(prefix, parent, tokens, block)
        self._entries[prefix] = Entry(block + 1, parent, tokens)
        return done


class BeginsEverywhere(PrefixCache):
    """A block that stands at the beginning has a parent, which nobody knows."""

    def insert(self, prefix, parent, tokens, block):
        done = super().insert(prefix, parent, tokens, block)
        self._entries[prefix] = Entry(block, 99 if parent is None else parent, tokens)
        return done


class NamesThingsByTheirTokens(PrefixCache):
    """Right: a name is all tokens of the prefix, without any hash."""

    def chain(self, before, tokens):
        return before + repr(tokens).encode()


class KeepsTheNewestInFront(PrefixCache):
    """Right: its book has the newest entry first."""

    def insert(self, prefix, parent, tokens, block):
        done = super().insert(prefix, parent, tokens, block)
        self._entries = dict(reversed(self._entries.items()))
        return done


class ForgetsWhatFollows(PrefixCache):
    """Right: with a block it forgets all that stands behind it, which nobody could find."""

    def forget(self, block):
        if block not in self._hashes:
            return
        super().forget(block)
        for entry in list(self._entries.values()):
            if entry.parent == block:
                self.forget(entry.block)


WRONG = [
    StillKnowsWhatWasGivenAway,
    StillKnowsTheNameOfABlock,
    ForgetsNothing,
    ForgetsTheParentToo,
    KnowsABlockByTwoNames,
    KnowsBlocksThatAreNotFull,
    WritesDownTheBlockBesideIt,
    BeginsEverywhere,
]
RIGHT = [PrefixCache, NamesThingsByTheirTokens, KeepsTheNewestInFront, ForgetsWhatFollows]


def live(kind):
    """A life of a cache; after every call its books are checked against what the pool keeps."""
    story.begin("the pool keeps a block from its insert on, until it is given away")
    cache = kind(2, seed=0)
    story.tell(f"cache = {kind.__name__}(2, seed=0)")
    kept = set()

    def checked(code):
        story.tell(code, known_blocks(cache))
        story.start_call(f"cache.check_integrity(the pool keeps {sorted(kept)})")
        cache.check_integrity(kept.__contains__)
        story.end_call("", "found nothing wrong")

    def insert(block, parent, text):
        tokens = full_blocks(text, 2)[-1]
        cache.insert(name_of(cache, text), parent, tokens, block)
        kept.add(block)
        checked(f"cache.insert(name, {parent}, {tokens}, {block})")

    def forget(block):
        kept.remove(block)
        cache.forget(block)
        checked(f"cache.forget({block})")

    checked("")
    insert(4, None, [1, 2])
    insert(0, 4, [1, 2, 3, 4])
    insert(2, 0, [1, 2, 3, 4, 5, 6])
    insert(7, 0, [1, 2, 3, 4, 1, 1])
    insert(1, None, [8, 8])
    forget(7)
    forget(2)
    insert(7, 0, [1, 2, 3, 4, 5, 6])
    forget(1)
    forget(7)
    forget(0)
    forget(4)
    insert(0, None, [1, 2])


@pytest.mark.task("10.5")
@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_the_property_finds_a_wrong_cache(kind):
    must_find(live, kind, RIGHT)


@pytest.mark.task("10.5")
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_the_property_lets_a_right_cache_pass(kind):
    must_let_pass(live, kind, WRONG)
