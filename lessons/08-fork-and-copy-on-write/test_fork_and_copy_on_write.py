"""Lesson 8: sequences that share blocks, and the copy that keeps them apart (T3)."""

from collections import Counter

import pytest
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st
from strategies import Request, Workload
from turned import must_find_one

from minipaged.course import notation
from minipaged.course.narration import Narrated, story
from minipaged.course.notation import block_set, manager_state
from minipaged.engine.trace import Trace
from minipaged.errors import OutOfBlocksError
from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.block_table import BlockTable
from minipaged.request.sampling_params import SamplingParams

block_sizes = st.integers(1, 4)


class Family:
    """Tables over one pool, the memory behind them, and what each sequence has written.

    Memory is a dictionary from slots to tokens; a token is named after its writer and its
    position, as in "a3".
    """

    def __init__(self, block_size, num_blocks):
        story.begin()
        self.block_size = block_size
        self.pool = BlockAllocator(num_blocks)
        story.tell(f"pool = BlockAllocator({num_blocks})")
        self.tables = {}
        self.texts = {}
        self.memory = {}

    def state(self, _=None):
        tables = [
            f"{name}: {table.blocks} {table.num_tokens} tokens"
            for name, table in self.tables.items()
        ]
        return "   ".join([*tables, f"free: {block_set(self.pool._free)}"])

    def told(self, name):
        """The table of this name; its calls are written down."""
        return Narrated(self.tables[name], name, self.state)

    def begin(self, name, num_tokens=0):
        """A new table, whose blocks are not taken by `append`: that is another task."""
        table = self.tables[name] = BlockTable(self.block_size, self.pool)
        table.blocks = [self.pool.allocate() for _ in range(-(-num_tokens // self.block_size))]
        table.num_tokens = num_tokens
        self.texts[name] = []
        story.tell(f"{name} = BlockTable({self.block_size}, pool)", self.state())
        self.write(name, num_tokens)

    def fork(self, name, child, num_tokens=None):
        used = self.pool.num_used
        arguments = () if num_tokens is None else (num_tokens,)
        story.start_call(f"{child} = {name}.fork({', '.join(map(str, arguments))})")
        table = self.tables[child] = self.tables[name].fork(*arguments)
        story.end_call("", self.state())
        self.texts[child] = self.texts[name][: table.num_tokens]
        assert self.pool.num_used == used, "a fork takes no block from the pool"
        self.check()

    def holders(self, block):
        return sum(block in table.blocks for table in self.tables.values())

    def needed(self, name, n):
        """Blocks that n more tokens take, and whether the last block must be copied for them."""
        table = self.tables[name]
        room = -table.num_tokens % self.block_size
        copies = n > 0 and room > 0 and self.holders(table.blocks[-1]) > 1
        return -(-max(0, n - room) // self.block_size) + copies, copies

    def append(self, name, n):
        """Take slots for n more tokens, copy if that is asked for, and write them."""
        table, free = self.tables[name], self.pool.num_free
        needed, copies = self.needed(name, n)
        last = table.blocks[-1] if table.blocks else None
        copy = self.told(name).append(n)
        if copies:
            assert copy is not None, f"block {last} is shared and {name} writes it, so copy it"
            assert copy.source == last, f"the block to copy is {last}, not {copy.source}"
            logical = (table.num_tokens - n) // self.block_size
            assert copy.destination == table.blocks[logical], (
                f"the copy goes to block {copy.destination}, and {name} will read {table.blocks}"
            )
            self.copy(*copy)
        else:
            # The table has its new tokens already.
            into_last = n and (table.num_tokens - n) % self.block_size
            why = "is not shared" if into_last else "is not written"
            assert copy is None, f"block {last} {why}, so there is nothing to copy"
        taken = free - self.pool.num_free
        assert taken == needed, f"{n} tokens for {name} take {needed} blocks, not {taken}"
        self.write(name, n)
        self.check()

    def copy(self, source, destination):
        for offset in range(self.block_size):
            token = self.memory.get(source * self.block_size + offset)
            self.memory[destination * self.block_size + offset] = token

    def write(self, name, n):
        text = self.texts[name]
        for _ in range(n):
            slot = self.tables[name].slot(len(text))
            text.append(f"{name}{len(text)}")
            self.memory[slot] = text[-1]

    def free(self, name):
        self.told(name).free()
        del self.tables[name], self.texts[name]
        self.check()

    def check(self):
        """Everybody reads what it wrote, and every hold is counted."""
        for name, table in self.tables.items():
            text = self.texts[name]
            assert table.num_tokens == len(text), f"{name} has {len(text)} tokens"
            size = -(-len(text) // self.block_size)
            assert len(table.blocks) == size, (
                f"{len(text)} tokens of {name} fill {size} blocks, not {len(table.blocks)}"
            )
            read = [self.memory.get(table.slot(i)) for i in range(len(text))]
            assert read == text, f"{name} wrote {text} and would read {read}"
        for block in range(self.pool.num_blocks):
            count, held = self.pool.ref_count(block), self.holders(block)
            assert count == held, f"block {block} is in {held} tables and its count is {count}"


# 8.1


@pytest.mark.task("8.1")
@given(block_size=block_sizes, num_tokens=st.integers(0, 7), times=st.integers(1, 3))
def test_a_fork_shares_every_block_and_takes_none(block_size, num_tokens, times):
    family = Family(block_size, 8)
    family.begin("a", num_tokens)
    for parent, child in list(zip("aab", "bcd", strict=True))[:times]:
        family.fork(parent, child)
        assert family.tables[child].blocks == family.tables[parent].blocks, (
            f"{child} reads what {parent} wrote, so it has the same blocks"
        )


@pytest.mark.task("8.1")
@given(block_size=block_sizes, num_tokens=st.integers(1, 7), order=st.sampled_from(["ab", "ba"]))
def test_either_may_end_first(block_size, num_tokens, order):
    family = Family(block_size, 8)
    family.begin("a", num_tokens)
    family.fork("a", "b")
    for name in order:
        family.free(name)
    assert family.pool.num_free == 8, "nobody holds a block any more"


@pytest.mark.task("8.1")
def test_the_lists_are_two():
    family = Family(4, 8)
    family.begin("a", 4)
    family.fork("a", "b")
    story.tell("b.blocks.append(7)")
    family.tables["b"].blocks.append(7)
    assert 7 not in family.tables["a"].blocks, "what the child adds is not the parent's"


@pytest.mark.task("8.1")
@given(block_size=block_sizes, num_tokens=st.integers(0, 9), data=st.data())
def test_of_a_prefix_only_full_blocks_are_shared(block_size, num_tokens, data):
    family = Family(block_size, 9)
    family.begin("a", num_tokens)
    length = data.draw(st.integers(0, num_tokens), "num_tokens of the fork")
    family.fork("a", "b", length)
    full = length // block_size
    assert family.tables["b"].blocks == family.tables["a"].blocks[:full], (
        f"{length} tokens fill {full} blocks of {block_size}"
    )


# 8.2

deeds = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "fork", "free"]), st.integers(0, 3), st.integers(0, 5)
    ),
    max_size=14,
)


@pytest.mark.task("8.2")
@given(block_size=block_sizes, first=st.integers(0, 5), deeds=deeds)
def test_nobody_changes_what_a_sibling_reads(block_size, first, deeds):
    family = Family(block_size, 9)
    family.begin("a")
    family.append("a", first)
    for deed, which, n in deeds:
        names = list(family.tables)
        name = names[which % len(names)]
        if deed == "append" and family.needed(name, n)[0] <= family.pool.num_free:
            family.append(name, n)
        elif deed == "fork" and len(names) < 4:
            family.fork(name, next(c for c in "abcd" if c not in names))
        elif deed == "free" and len(names) > 1:
            family.free(name)


@pytest.mark.task("8.2")
def test_figure_8_of_the_paper():
    family = Family(4, 4)
    family.begin("a")
    family.append("a", 7)  # the prompt: "Four score and seven | years ago our"
    family.fork("a", "b")
    family.append("a", 1)  # "fathers": into a copy
    family.append("b", 1)  # "mothers": b is alone by then, and writes in place
    a, b = family.tables["a"].blocks, family.tables["b"].blocks
    assert a[0] == b[0], "the first block is full; nobody writes it, so it stays shared"
    assert a[1] != b[1], "the second one holds different words"
    assert family.pool.num_used == 3


@pytest.mark.task("8.2")
@given(first=st.integers(1, 9), new=st.integers(0, 9), is_shared=st.booleans())
def test_an_append_that_does_not_fit_changes_nothing(first, new, is_shared):
    family = Family(2, 5)
    family.begin("a")
    family.append("a", first)
    if is_shared:
        family.fork("a", "b")
    before = family.state()
    needed, _ = family.needed("a", new)
    if needed <= family.pool.num_free:
        family.append("a", new)
        return
    with pytest.raises(OutOfBlocksError):
        family.told("a").append(new)
    assert family.state() == before, "a refused call must change nothing"
    family.check()


# 8.3


def tables_state(manager):
    """The tables, and how much of a pool is free that is too large to be listed."""
    tables = [
        f"table {notation.name(seq_id)}: {table.blocks} {table.num_tokens} tokens"
        for seq_id, table in manager.tables.items()
    ]
    device = manager.device
    return "   ".join([*tables, f"{device.num_free} of {device.num_blocks} free"])


def new_manager(block_size, num_blocks, num_host_blocks=0, kind=BlockManager, state=tables_state):
    """A manager whose story is told from here on."""
    story.begin()
    arguments = f"{block_size}, {num_blocks}" + (f", {num_host_blocks}" if num_host_blocks else "")
    manager = kind(block_size, num_blocks, num_host_blocks)
    return Narrated(manager, "manager", state, f"{kind.__name__}({arguments})")


def check_holds(manager):
    """The counts of the device pool are what the tables say."""
    holds = Counter(block for table in manager.tables.values() for block in table.blocks)
    for block in range(manager.device.num_blocks):
        count = manager.device.ref_count(block)
        assert count == holds[block], f"block {block} is in {holds[block]} tables, count {count}"


@pytest.mark.task("8.3")
@given(
    block_size=block_sizes,
    prompt=st.integers(1, 6),
    children=st.integers(0, 3),
    steps=st.lists(st.tuples(st.integers(0, 15), st.integers(1, 4)), max_size=6),
    newcomer=st.integers(0, 3),
)
def test_what_was_counted_is_what_is_taken(block_size, prompt, children, steps, newcomer):
    """In each step some of a family write, and perhaps a sequence that had no table comes in."""
    manager = new_manager(block_size, 40)
    manager.append(0, prompt)
    for child in range(1, children + 1):
        manager.fork(0, child)
    family = list(range(children + 1))
    # Bit i of `who` says whether sequence i writes; the last step brings the newcomer.
    plans = [[(i, n) for i in family if who >> i & 1] for who, n in steps]
    plans.append([*((i, 1) for i in family), *([(9, newcomer)] if newcomer else [])])
    for appends in plans:
        needed = manager.blocks_needed(appends)
        free = manager.device.num_free
        for seq_id, n in appends:
            manager.append(seq_id, n)
        taken = free - manager.device.num_free
        assert needed == taken, f"{needed} blocks were counted and {taken} taken"
        check_holds(manager)


@pytest.mark.task("8.3")
def test_the_last_holder_needs_no_copy():
    manager = new_manager(4, 8)
    manager.append(0, 5)
    manager.fork(0, 1)
    manager.fork(0, 2)
    everybody = manager.blocks_needed([(0, 1), (1, 1), (2, 1)])
    assert everybody == 2, "three write into one block: two take copies, the last writes in place"
    two = manager.blocks_needed([(0, 1), (1, 1)])
    assert two == 2, "two of three write: the third one keeps the block, so both take copies"


@pytest.mark.task("8.3")
@given(block_size=block_sizes, tokens=st.integers(1, 9), data=st.data())
def test_a_child_begins_where_its_parent_stands(block_size, tokens, data):
    manager = new_manager(block_size, 20)
    manager.append(0, tokens)
    length = data.draw(st.one_of(st.none(), st.integers(0, tokens)), "num_tokens of the fork")
    used = manager.device.num_used
    manager.fork(0, 1, *(() if length is None else (length,)))
    parent, child = manager.tables[0], manager.tables[1]
    shared = tokens if length is None else length - length % block_size
    assert child.num_tokens == shared, f"the child has {shared} tokens, not {child.num_tokens}"
    assert child.blocks == parent.blocks[: manager.blocks_for(shared)], "and their blocks"
    assert manager.device.num_used == used, "a fork takes no block"
    check_holds(manager)


@pytest.mark.task("8.3")
def test_a_sequence_that_has_a_table_is_nobodys_child():
    manager = new_manager(4, 8)
    manager.append(0, 5)
    manager.append(1, 3)
    with pytest.raises(ValueError, match="sequence 1 has a block table already"):
        manager.fork(0, 1)
    check_holds(manager)


# 8.4


def serve(requests, block_size):
    """Serve these requests, with the block tables of every step in the story."""
    story.begin()
    workload = Workload(tuple(requests), block_size, 60, 12, 80)
    engine, trace = workload.engine(), Trace()
    engine.observers.append(trace)
    story.tell(f"engine = build_engine(..., EngineOptions(block_size={block_size}, ...))")
    outputs = {}
    for i, request in enumerate(requests):
        settings = ", ".join(f"{name}={value}" for name, value in request.params.items())
        story.tell(f"engine.add_request('{i}', {list(request.prompt)}, SamplingParams({settings}))")
        engine.add_request(str(i), request.prompt, SamplingParams(**request.params))
    while engine.has_unfinished_requests:
        for output in engine.step():
            outputs[int(output.request_id)] = output
        story.tell("engine.step()", tables_state(engine.scheduler.manager))
    return workload, engine, trace, outputs


sampled_requests = st.builds(
    lambda prompt, n, max_tokens, seed: Request(
        tuple(prompt), {"n": n, "max_tokens": max_tokens, "seed": seed, "ignore_eos": True}
    ),
    st.lists(st.integers(0, 12), min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(1, 6),
    st.one_of(st.integers(0, 5), st.none()),
)


@pytest.mark.task("8.4")
@at_most(20)
@given(requests=st.lists(sampled_requests, min_size=1, max_size=3), block_size=st.integers(1, 5))
def test_every_sample_is_what_it_would_be_alone(requests, block_size):
    workload, engine, _, outputs = serve(requests, block_size)
    for i, request in enumerate(requests):
        alone = [tokens for tokens, _ in request.expected(workload.decoder, i)]
        got = [output.token_ids for output in outputs[i].outputs]
        assert len(got) == len(alone), f"request {i} has {len(got)} outputs, not {len(alone)}"
        for index, (tokens, expected) in enumerate(zip(got, alone, strict=True)):
            assert tokens == expected, (
                f"output {index} of request {i} is {tokens}; generated alone it is {expected}"
            )
    left = engine.scheduler.manager.device.num_used
    assert left == 0, f"all requests have ended and {left} blocks are still held"


@pytest.mark.task("8.4")
def test_as_many_are_drawn_as_were_to_be_compared():
    params = {"n": 1, "best_of": 3, "max_tokens": 3, "temperature": 1.0, "ignore_eos": True}
    _, _, trace, outputs = serve([Request((1, 2, 3), params)], 2)
    forks = [len(record.forks) for record in trace]
    assert forks[0] == 2, (
        f"the best of 3 is asked for, so 3 are drawn and {forks[0] + 1} were; how many a request "
        "draws is `params.width`"
    )
    assert len(outputs[0].outputs) == 1, "and one of them is returned"


@pytest.mark.task("8.4")
@at_most(20)
@given(
    prompt=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    n=st.integers(2, 4),
    block_size=st.integers(1, 5),
)
def test_the_prompt_is_stored_once(prompt, n, block_size):
    request = Request(tuple(prompt), {"n": n, "max_tokens": 3, "ignore_eos": True})
    _, _, trace, _ = serve([request], block_size)
    first, second = trace.records[:2]
    assert [len(record.forks) for record in trace][:2] == [n - 1, 0], (
        f"{n} samples are {n - 1} forks, all in the step that computes the prompt; note each "
        "in `forks`"
    )
    assert len(first.tables) == n, f"{n} samples have {n} block tables, not {len(first.tables)}"
    whole = -(-len(prompt) // block_size)
    assert first.num_used_blocks == whole, f"{n} samples hold the {whole} blocks of the prompt"
    full = len(prompt) // block_size
    expected = full + n  # each writes into a last block of its own
    assert second.num_used_blocks == expected, (
        f"a step later they hold the {full} full blocks of the prompt and one block each"
    )
    copies = len(second.plan.copies)
    wanted = n - 1 if len(prompt) % block_size else 0
    assert copies == wanted, f"{wanted} of the {n} writers need a copy, and {copies} were made"


# 8.5: the property that the learner writes must find each of these wrong managers.  They are made
# of the learner's own manager: its books are right, until something happens to them.


class ForksWithoutCounting(BlockManager):
    """A child holds blocks, and is not counted as their holder."""

    def fork(self, parent_id, child_id, num_tokens=None):
        super().fork(parent_id, child_id, num_tokens)
        for block in self.tables[child_id].blocks:
            self.device.free(block)


class LosesTheBlocks(BlockManager):
    """The table of a sequence that ended is thrown away, and its blocks are still held."""

    def free(self, seq_id):
        self.tables.pop(seq_id)


class KeepsTheSharedBlock(BlockManager):
    """After a copy-on-write the writer still counts as a holder of the block it copied."""

    def append(self, seq_id, num_new_tokens):
        copies = super().append(seq_id, num_new_tokens)
        for copy in copies:
            self.device.share(copy.source)
        return copies


class ForgetsTheCopy(BlockManager):
    """A block is taken for a copy, and the table goes on with the shared one."""

    def append(self, seq_id, num_new_tokens):
        copies = super().append(seq_id, num_new_tokens)
        for copy in copies:
            blocks = self.tables[seq_id].blocks
            blocks[blocks.index(copy.destination)] = copy.source
        return copies


class GivesTwoSequencesOneTable(BlockManager):
    """Parent and child are counted as two holders, and have one table between them."""

    def fork(self, parent_id, child_id, num_tokens=None):
        super().fork(parent_id, child_id, num_tokens)
        self.tables[child_id] = self.tables[parent_id]


class HoldsABlockTwice(BlockManager):
    """A block stands twice in a table, and is counted twice: all sums are right."""

    def append(self, seq_id, num_new_tokens):
        copies = super().append(seq_id, num_new_tokens)
        blocks = self.tables[seq_id].blocks
        if len(blocks) > 1 and blocks[0] != blocks[-1]:
            self.device.free(blocks[-1])
            self.device.share(blocks[0])
            blocks[-1] = blocks[0]
        return copies


class TakesABlockAhead(BlockManager):
    """A table holds, and is counted for, a block more than its tokens fill."""

    def append(self, seq_id, num_new_tokens):
        copies = super().append(seq_id, num_new_tokens)
        self.tables[seq_id].blocks.append(self.device.allocate())
        return copies


class GivesOutSlotsThatAreNotThere(BlockManager):
    """A sequence has more tokens than its blocks have slots."""

    def append(self, seq_id, num_new_tokens):
        copies = super().append(seq_id, num_new_tokens)
        table = self.tables[seq_id]
        table.num_tokens = len(table.blocks) * self.block_size + 1
        return copies


class LeavesABlockOnTheDevice(BlockManager):
    """All sequences were swapped out, and a block of the device is still held."""

    def swap_out(self, seq_ids):
        copies = super().swap_out(seq_ids)
        self.device.allocate()
        return copies


class MiscountsOnTheHost(BlockManager):
    """A block on the host has a holder too many."""

    def swap_out(self, seq_ids):
        copies = super().swap_out(seq_ids)
        self.host.share(copies[0].destination)
        return copies


class TakesTheHighestBlock(BlockManager):
    """Right: it uses the blocks in another order."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.device._free = dict.fromkeys(range(self.device.num_blocks))


class CopiesAtOnce(BlockManager):
    """Right, if wasteful: a child has a last block of its own from the beginning."""

    def fork(self, parent_id, child_id, num_tokens=None):
        super().fork(parent_id, child_id, num_tokens)
        blocks = self.tables[child_id].blocks
        self.device.free(blocks[-1])
        blocks[-1] = self.device.allocate()


WRONG = [
    ForksWithoutCounting,
    LosesTheBlocks,
    KeepsTheSharedBlock,
    ForgetsTheCopy,
    GivesTwoSequencesOneTable,
    HoldsABlockTwice,
    TakesABlockAhead,
    GivesOutSlotsThatAreNotThere,
    LeavesABlockOnTheDevice,
    MiscountsOnTheHost,
]
RIGHT = [BlockManager, TakesTheHighestBlock, CopiesAtOnce]


def live(kind):
    """A life of a manager; its books are checked after every call."""
    manager = new_manager(4, 9, 9, kind, manager_state)
    manager.check_integrity()
    for act in (
        lambda: manager.append(0, 7),
        lambda: manager.fork(0, 1),
        lambda: manager.append(0, 1),
        lambda: manager.append(1, 1),
        lambda: manager.append(1, 1),
        lambda: manager.swap_out([0, 1]),
        lambda: manager.swap_in([0, 1]),
        lambda: manager.free(0),
        lambda: manager.free(1),
    ):
        act()
        manager.check_integrity()


@pytest.mark.task("8.5")
@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_the_property_finds_a_wrong_manager(kind):
    for right in RIGHT:  # who cries at every manager has found nothing
        live(right)
    try:
        live(kind)
    except (AssertionError, NotImplementedError) as error:
        if isinstance(error, AssertionError):
            return
        raise
    except Exception as error:  # its books were so wrong that a later call broke
        raise AssertionError(f"your property let a wrong manager pass: {kind.__doc__}") from error
    raise AssertionError(f"your property let a wrong manager pass: {kind.__doc__}")


@pytest.mark.task("8.5")
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_the_property_lets_a_right_manager_pass(kind):
    must_find_one(live, WRONG)
    live(kind)
