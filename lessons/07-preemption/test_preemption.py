"""Lesson 7: who gives way when blocks run out, whole, and nothing of it is lost (T2, T4, T6).

PYTEST_DONT_REWRITE: what an assertion has to say is in its message.
"""

from collections import Counter

import pytest
from effort import at_most
from hypothesis import assume, example, given
from hypothesis import strategies as st

from minipaged.course.narration import Narrated, story
from minipaged.course.notation import name
from minipaged.errors import InvalidRequestError, OutOfBlocksError
from minipaged.memory.block_manager import BlockManager
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence, SequenceGroup, Status
from minipaged.scheduling.chunks import Draft
from minipaged.scheduling.preemption import Preemption, PreemptionCosts, preempt_by_recomputation
from minipaged.scheduling.scheduler import Scheduler


def letters_of(sequences):
    return ", ".join(name(sequence.seq_id) for sequence in sequences)


def letters(groups):
    return " ".join(group.request_id for group in groups) or "nobody"


def tables(manager, names=None):
    """Tables and free blocks in a line: A: [7, 1] 6 tokens   B on the host: [0] 3 tokens."""
    parts = []
    for seq_id, table in manager.tables.items():
        who = (names or {}).get(seq_id, name(seq_id))
        where = " on the host" if table.allocator is manager.host else ""
        parts.append(f"{who}{where}: {table.blocks} {table.num_tokens} tokens")
    parts.append(f"free: {manager.device.num_free} of {manager.device.num_blocks}")
    if manager.host.num_blocks:
        parts.append(f"host free: {manager.host.num_free} of {manager.host.num_blocks}")
    return "   ".join(parts)


def new_manager(block_size, num_blocks, num_host_blocks=0):
    """A block manager, and a view of it that tells what is asked of it."""
    story.begin()
    manager = BlockManager(block_size, num_blocks, num_host_blocks)
    made_by = f"BlockManager({block_size}, {num_blocks}, {num_host_blocks})"
    return manager, Narrated(manager, "manager", tables, made_by)


sizes = st.integers(1, 4)
families = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=4)
"""For each further sequence: whom it is forked from, and how much that one writes afterwards."""


def family(told, prompt, forks, growth=0):
    """Sequences that share what they began with: each is forked from an earlier one."""
    told.append(0, prompt)
    for child, (parent, more) in enumerate(forks, start=1):
        told.fork(parent % child, child)
        if more:
            told.append(parent % child, more)
    if growth:
        told.append(len(forks), growth)
    return list(range(len(forks) + 1))


def group_of(manager, seq_ids):
    """A running group of these sequences; the last token of each waits to be computed."""
    sequences = []
    for seq_id in seq_ids:
        num_tokens = manager.tables[seq_id].num_tokens
        first, *drawn = range(100 * seq_id, 100 * seq_id + num_tokens + 1)
        sequence = Sequence(seq_id, [first])
        sequence.token_ids += drawn
        sequence.num_computed_tokens = num_tokens
        sequences.append(sequence)
    group = SequenceGroup("X", sequences, SamplingParams(n=len(sequences)), 0)
    group.status = Status.RUNNING
    group.has_forked = True
    return group


def num_shared(manager, seq_id, other_id):
    """Tokens in the full blocks with which both begin, counted by hand."""
    a, b = manager.tables[seq_id], manager.tables[other_id]
    most, size = min(a.num_tokens, b.num_tokens) // manager.block_size, manager.block_size
    n = 0
    while n < most and a.blocks[n] == b.blocks[n]:
        n += 1
    return n * size


# 7.1


def preempt_and_check(manager, group):
    """One recomputation; what was shared must be in the notes."""
    sequences = group.sequences
    tokens = {s.seq_id: list(s.token_ids) for s in sequences}
    notes = {s.seq_id: s.resume_from for s in sequences}
    had_table = [s for s in sequences if s.seq_id in manager.tables]
    shared = {}
    for i, sequence in enumerate(sequences):
        if sequence in had_table:
            earlier = [other for other in sequences[:i] if other in had_table]
            shared[sequence.seq_id] = {
                other.seq_id: num_shared(manager, other.seq_id, sequence.seq_id)
                for other in earlier
            }
    story.start_call(f"preempt_by_recomputation({letters_of(sequences)})")
    preempt_by_recomputation(group, manager)
    notes_now = [f"{name(s.seq_id)}.resume_from is {s.resume_from}" for s in sequences]
    story.end_call("", "   ".join([tables(manager), *notes_now]))
    for sequence in sequences:
        who = name(sequence.seq_id)
        assert sequence.seq_id not in manager.tables, (
            f"{who} still holds {manager.tables.get(sequence.seq_id)}: a group goes whole"
        )
        assert sequence.num_computed_tokens == 0, (
            f"{who} has no blocks, and {sequence.num_computed_tokens} tokens count as computed"
        )
        assert sequence.token_ids == tokens[sequence.seq_id], (
            f"{who}'s tokens are all that is kept, and they have changed"
        )
        note = sequence.resume_from
        if sequence not in had_table:
            assert note == notes[sequence.seq_id], (
                f"{who} had no blocks: its note {notes[sequence.seq_id]} still holds, not {note}"
            )
            continue
        best = max(shared[sequence.seq_id].values(), default=0)
        if best == 0:
            assert note is None, f"{who} shared no full block, and resumes from {note}"
        else:
            assert note is not None, f"{who} shared {best} tokens, and that was not noted"
            sibling, num_tokens = note
            assert sibling in shared[sequence.seq_id], (
                f"{who} resumes from {sibling}; it must be a sequence before it that had a table"
            )
            assert num_tokens == best == shared[sequence.seq_id][sibling], (
                f"{who} shared {best} tokens in full blocks with one before it; its note is {note}"
            )
    assert group.status is Status.WAITING, f"the group waits now, and is {group.status}"
    assert group.was_recomputed, "group.was_recomputed says that it lost its blocks once"


@pytest.mark.task("7.1")
@given(block_size=sizes, prompt=st.integers(1, 9), forks=families, growth=st.integers(0, 4))
def test_the_blocks_go_and_the_tokens_stay(block_size, prompt, forks, growth):
    manager, told = new_manager(block_size, 64)
    group = group_of(manager, family(told, prompt, forks, growth))
    bystander = len(group.sequences)
    told.append(bystander, 3)
    before = list(manager.tables[bystander].blocks)
    preempt_and_check(manager, group)
    assert manager.tables[bystander].blocks == before, "somebody else's table has changed"
    assert manager.device.num_used == len(before), "blocks of the group are still taken"


@pytest.mark.task("7.1")
@given(block_size=sizes, prompt=st.integers(1, 9), forks=families, back=st.integers(0, 4))
def test_a_group_may_be_preempted_again_before_all_of_it_is_back(block_size, prompt, forks, back):
    manager, told = new_manager(block_size, 64)
    group = group_of(manager, family(told, prompt, forks))
    preempt_and_check(manager, group)
    for sequence in group.sequences[:back]:  # the first of them are computed again
        if sequence.resume_from is not None:
            sibling, num_tokens = sequence.resume_from
            told.fork(sibling, sequence.seq_id, num_tokens)
            sequence.resume_from = None
        length = len(sequence.token_ids) - 1
        table = manager.tables.get(sequence.seq_id)
        told.append(sequence.seq_id, length - (table.num_tokens if table else 0))
        sequence.num_computed_tokens = length
    preempt_and_check(manager, group)
    assert manager.device.num_used == 0, "blocks of the group are still taken"


# 7.2


class Memory:
    """What lies in the blocks of both pools: a name for every block that was ever written."""

    def __init__(self, manager):
        self.manager = manager
        self.pools = {id(manager.device): {}, id(manager.host): {}}
        self.written = 0

    def write(self, pool, blocks):
        for block in blocks:
            self.written += 1
            self.pools[id(pool)][block] = f"contents {self.written}"

    def read(self, seq_id):
        table = self.manager.tables[seq_id]
        pool = self.pools[id(table.allocator)]
        return [pool.get(block, "nothing") for block in table.blocks]

    def carry_out(self, copies, source, target):
        source, target = self.pools[id(source)], self.pools[id(target)]
        moved = {pair.destination: source.get(pair.source, "nothing") for pair in copies}
        target.update(moved)


def check_books(manager):
    """T2: counts are what the tables hold."""
    for pool, where in ((manager.device, "device"), (manager.host, "host")):
        holds = Counter(
            block
            for table in manager.tables.values()
            if table.allocator is pool
            for block in table.blocks
        )
        for block in range(pool.num_blocks):
            assert pool.ref_count(block) == holds[block], (
                f"{where} block {block} stands in {holds[block]} tables, and its count is "
                f"{pool.ref_count(block)}"
            )
        assert pool.num_used == len(holds), (
            f"{pool.num_used} blocks of the {where} are used, and {len(holds)} stand in tables"
        )


def move_and_check(manager, told, memory, verb, seq_ids, source, target):
    """Swap out or in; every sequence must read the same as before."""
    before = {seq_id: memory.read(seq_id) for seq_id in manager.tables}
    lengths = {seq_id: table.num_tokens for seq_id, table in manager.tables.items()}
    blocks = {block for seq_id in seq_ids for block in manager.tables[seq_id].blocks}
    copies = getattr(told, verb)([*seq_ids, 99])  # 99 has no table yet: nothing to move
    assert Counter(pair.source for pair in copies) == Counter(blocks), (
        f"blocks {sorted(blocks)} are to be copied, each once, and what is copied is "
        f"{sorted(pair.source for pair in copies)}"
    )
    memory.carry_out(copies, source, target)
    for seq_id, table in manager.tables.items():
        if seq_id in seq_ids:
            assert table.allocator is target, (
                f"table {name(seq_id)} moved, and its allocator is the old pool"
            )
        assert table.num_tokens == lengths[seq_id], f"{name(seq_id)} has the tokens it had"
        assert memory.read(seq_id) == before[seq_id], (
            f"{name(seq_id)} reads something else than before, when the copies are made"
        )
    check_books(manager)


@pytest.mark.task("7.2")
@given(
    block_size=sizes,
    prompt=st.integers(1, 9),
    forks=families,
    growth=st.integers(0, 4),
    others=st.integers(1, 6),
)
def test_what_is_moved_reads_the_same(block_size, prompt, forks, growth, others):
    """Out, while others take what was freed, and in again."""
    manager, told = new_manager(block_size, 64, 64)
    device, host = manager.device, manager.host
    seq_ids = family(told, prompt, forks, growth)
    told.append(20, others)
    memory = Memory(manager)
    memory.write(device, range(64))
    move_and_check(manager, told, memory, "swap_out", seq_ids, device, host)
    told.append(21, others)
    memory.write(device, manager.tables[21].blocks)
    move_and_check(manager, told, memory, "swap_in", seq_ids, host, device)


@pytest.mark.task("7.2")
@given(block_size=sizes, prompt=st.integers(1, 9), forks=families, lacking=st.integers(0, 3))
def test_all_or_nothing(block_size, prompt, forks, lacking):
    """A group that fits exactly is moved, with its shared blocks; else nothing has changed."""
    counted = BlockManager(block_size, 64)
    room = counted.num_blocks_held(family(counted, prompt, forks)) - lacking
    assume(room > 0)
    manager, told = new_manager(block_size, 64, room)
    seq_ids = family(told, prompt, forks)
    memory = Memory(manager)
    memory.write(manager.device, range(64))
    if not lacking:
        move_and_check(manager, told, memory, "swap_out", seq_ids, manager.device, manager.host)
        return
    before = tables(manager)
    with pytest.raises(OutOfBlocksError):
        told.swap_out(seq_ids)
    assert tables(manager) == before, "a refused call must change nothing"


# 7.3


def preempt(preemption, group, manager):
    story.start_call("preemption.preempt(group, manager)")
    copies = preemption.preempt(group, manager)
    story.end_call(f"  -> {len(copies)} copies", f"{group.status.name}   {tables(manager)}")
    return copies


def check_swapped(preemption, group, manager, copies, blocks):
    assert group.status is Status.SWAPPED, f"the group should be swapped and is {group.status}"
    assert len(copies) == blocks, f"{blocks} blocks go to the host, and {len(copies)} are copied"
    for sequence in group.sequences:
        table = manager.tables.get(sequence.seq_id)
        assert table is not None, "a swapped sequence keeps its table"
        assert table.allocator is manager.host, "its blocks are those of the host"
        assert sequence.num_computed_tokens == table.num_tokens, "all its tokens stay computed"
    counts = (preemption.num_recomputations, preemption.num_swaps)
    assert counts == (0, 1), f"one swap was made, and it counts {counts}"


def check_recomputed(preemption, group, manager, copies):
    assert group.status is Status.WAITING, f"it should be recomputed and is {group.status}"
    assert copies == [], "nothing is copied of a group that is recomputed"
    assert not any(s.seq_id in manager.tables for s in group.sequences), "it holds blocks"
    counts = (preemption.num_recomputations, preemption.num_swaps)
    assert counts == (1, 0), f"one recomputation was made, and it counts {counts}"


@pytest.mark.task("7.3")
@given(
    mode=st.sampled_from(["recompute", "swap"]),
    prompt=st.integers(1, 9),
    forks=families,
    lacking=st.integers(0, 2),
)
def test_swapping_needs_room_on_the_host(mode, prompt, forks, lacking):
    counted = BlockManager(4, 64)
    blocks = counted.num_blocks_held(family(counted, prompt, forks))
    assume(blocks > lacking)
    manager, told = new_manager(4, 64, blocks - lacking)
    group = group_of(manager, family(told, prompt, forks))
    story.tell(f'preemption = Preemption("{mode}")')
    preemption = Preemption(mode)
    copies = preempt(preemption, group, manager)
    if mode == "swap" and not lacking:
        check_swapped(preemption, group, manager, copies, blocks)
    else:
        check_recomputed(preemption, group, manager, copies)


@pytest.mark.task("7.3")
@given(
    block_size=sizes,
    prompt=st.integers(1, 12),
    forks=families,
    move_block=st.integers(1, 12),
    compute_token=st.integers(1, 12),
)
@example(block_size=4, prompt=8, forks=[], move_block=3, compute_token=1)
@example(block_size=4, prompt=8, forks=[(0, 0), (0, 0)], move_block=3, compute_token=1)
@example(block_size=4, prompt=8, forks=[], move_block=2, compute_token=1)  # both cost the same
def test_auto_takes_what_is_cheaper(block_size, prompt, forks, move_block, compute_token):
    manager, told = new_manager(block_size, 64, 64)
    group = group_of(manager, family(told, prompt, forks))
    blocks = manager.num_blocks_held(s.seq_id for s in group.sequences)
    tokens = sum(s.num_computed_tokens for s in group.sequences)
    tokens = min(tokens, blocks * block_size)
    swap, recompute = 2 * blocks * move_block, tokens * compute_token
    story.tell(
        f'preemption = Preemption("auto", PreemptionCosts({move_block}, {compute_token}))',
        f"swap: 2 x {blocks} x {move_block} = {swap}   "
        f"recompute: {tokens} x {compute_token} = {recompute}",
    )
    preemption = Preemption("auto", PreemptionCosts(move_block, compute_token))
    copies = preempt(preemption, group, manager)
    if swap < recompute:
        check_swapped(preemption, group, manager, copies, blocks)
    else:
        check_recomputed(preemption, group, manager, copies)


# 7.4


def new_scheduler(manager, preemption=None, policy=None):
    return Scheduler(
        manager, 16, 256, policy=policy or by_urgency, preemption=preemption or Preemption()
    )


def by_urgency(group):
    return (group.priority, group.arrival)


@pytest.mark.task("7.4")
@given(
    block_size=sizes,
    num_blocks=st.integers(2, 10),
    computed=st.integers(1, 8),
    uncomputed=st.integers(1, 6),
    others=st.integers(0, 10),
    kept_free=st.integers(0, 3),
)
def test_a_group_comes_back_when_it_can_go_on(
    block_size, num_blocks, computed, uncomputed, others, kept_free
):
    manager, told = new_manager(block_size, num_blocks, num_blocks)
    scheduler = new_scheduler(manager)
    assume(computed <= num_blocks * block_size)
    told.append(0, computed)
    copies = told.swap_out([0])
    group = group_of(manager, [0])
    group.status = Status.SWAPPED
    group.sequences[0].token_ids += [7] * (uncomputed - 1)
    if 0 < others <= num_blocks:
        told.append(1, others * block_size)
    free = manager.device.num_free
    needed = -(-(computed + uncomputed) // block_size)
    before = tables(manager)
    draft = Draft(64)
    story.start_call(f"scheduler._swap_in(X, draft, kept_free={kept_free})")
    came = scheduler._swap_in(group, draft, kept_free)
    story.end_call(f"  -> {came}", tables(manager))
    assert came == (needed + kept_free <= free), (
        f"{computed} tokens of {computed + uncomputed} are computed, so it needs {needed} blocks, "
        f"{kept_free} are to stay free, and {free} are free"
    )
    if came:
        assert len(draft.swap_in) == len(copies), (
            f"{len(copies)} blocks come back, and {len(draft.swap_in)} copies are in the draft"
        )
        assert manager.tables[0].allocator is manager.device, "its table is on the device"
    else:
        assert tables(manager) == before, "a group that stays away must not change"
        assert not draft.swap_in, "nothing comes back, and there are copies in the draft"


@pytest.mark.task("7.4")
def test_who_was_not_swapped_does_not_come_back():
    manager, _ = new_manager(4, 8, 8)
    group = SequenceGroup("A", [Sequence(0, range(5))], SamplingParams(), 0)
    draft = Draft(64)
    assert not new_scheduler(manager)._swap_in(group, draft, 0), (
        "A waits, and has nothing on the host"
    )
    assert not draft.swap_in, "and nothing is moved"


# 7.5


def queues(scheduler):
    return f"running: {letters(scheduler.running)}   waiting: {letters(scheduler.waiting)}"


@pytest.mark.task("7.5")
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    position=st.integers(0, 4),
    more=st.integers(1, 12),
    spare=st.integers(0, 2),
    waiting=st.lists(st.integers(0, 3), max_size=2),
    swaps=st.booleans(),
    num_host_blocks=st.integers(1, 6),
)
@example(
    lengths=[4, 4, 4],
    position=0,
    more=1,
    spare=0,
    waiting=[2],
    swaps=True,
    num_host_blocks=6,
)
def test_the_last_go_and_no_more_than_must(
    lengths, position, more, spare, waiting, swaps, num_host_blocks
):
    manager, told = new_manager(4, sum(-(-n // 4) for n in lengths) + spare, num_host_blocks)
    preemption = Preemption("swap" if swaps else "recompute")
    scheduler = new_scheduler(manager, preemption)
    position %= len(lengths)
    for number, length in enumerate(lengths):
        told.append(number, length)
        sequence = Sequence(number, range(length + 1))
        sequence.num_computed_tokens = length
        group = SequenceGroup(name(number), [sequence], SamplingParams(), number, 1)
        group.status = Status.RUNNING
        scheduler.running.append(group)
    for number, priority in enumerate(sorted(waiting), start=len(lengths)):
        waits = [Sequence(number, range(3))]
        scheduler.waiting.append(
            SequenceGroup(name(number), waits, SamplingParams(), number, priority)
        )
    story.tell(f'scheduler, with preemption "{preemption.mode}"', queues(scheduler))
    group = scheduler.running[position]
    needed = manager.blocks_needed([(group.sequences[0].seq_id, more)])
    assume(needed <= manager.device.num_blocks - len(manager.tables[position].blocks))
    ran, waited = list(scheduler.running), list(scheduler.waiting)
    free = manager.device.num_free
    held = [len(manager.tables[i].blocks) for i in range(len(lengths))]
    expected = 0  # victims, from the end
    while free + sum(held[len(held) - expected :]) < needed and expected < len(ran) - position:
        expected += 1
    draft = Draft(64)
    who = f"{group.request_id} needs {needed} more blocks"
    story.start_call(f"scheduler._make_room([({group.request_id}, {more})], {position}, draft)")
    made = scheduler._make_room([(group.sequences[0], more)], position, draft)
    story.end_call(f"  -> {made}", queues(scheduler))
    victims = ran[len(ran) - expected :]
    assert scheduler.running == ran[: len(ran) - expected], (
        f"{who} and {free} were free, so {letters(reversed(victims))} must go, and "
        f"{letters(scheduler.running)} run now"
    )
    assert made == (group in scheduler.running), (
        f"it said {made}, and {group.request_id} "
        f"{'runs' if group in scheduler.running else 'had to go itself'}"
    )
    if made:
        assert manager.device.num_free >= needed, f"{who}, and {manager.device.num_free} are free"
    assert scheduler.waiting == sorted([*waited, *victims], key=by_urgency), (
        f"{letters(sorted([*waited, *victims], key=by_urgency))} wait, in the order of the policy "
        f"(here by priority, then arrival), not {letters(scheduler.waiting)}"
    )
    assert draft.preempted == [v.request_id for v in reversed(victims)], (
        f"draft.preempted names who went, the last one first, not {draft.preempted}"
    )
    swapped = [v.request_id for v in reversed(victims) if v.status is Status.SWAPPED]
    assert draft.swapped == swapped, f"{swapped} were swapped, not {draft.swapped}"
    on_host = sum(len(manager.tables[v.arrival].blocks) for v in victims if v.request_id in swapped)
    assert len(draft.swap_out) == on_host, (
        f"{on_host} blocks moved to the host, and {len(draft.swap_out)} copies are in the draft"
    )


class Engine:
    """A scheduler, a memory of slots, and a model that checks what it reads.

    Slots hold tokens in the place of keys and values.  The next token is made up from all
    before it, so that a request draws the same ones whenever it is served.
    """

    def __init__(self, block_size, num_blocks, num_host_blocks, mode):
        story.begin()
        self.manager = BlockManager(block_size, num_blocks, num_host_blocks)
        self.scheduler = Scheduler(self.manager, 8, 64, by_urgency, Preemption(mode))
        story.tell(
            f"scheduler = Scheduler(BlockManager({block_size}, {num_blocks}, {num_host_blocks}), "
            f'8, 64, preemption=Preemption("{mode}"))'
        )
        self.device = [[None] * block_size for _ in range(num_blocks)]
        self.host = [[None] * block_size for _ in range(self.manager.host.num_blocks)]
        self.groups, self.wanted = {}, {}
        self.names = {}  # of the sequences: B1 and B2 are those of request B

    def new_id(self, request_id):
        number = sum(told.startswith(request_id) for told in self.names.values()) + 1
        self.names[len(self.names)] = f"{request_id}{number}"
        return len(self.names) - 1

    def add(self, prompt, output, width, priority):
        number = len(self.wanted)
        sequence = Sequence(self.new_id(name(number)), [100 * number + i for i in range(prompt)])
        group = SequenceGroup(name(number), [sequence], SamplingParams(n=width), number, priority)
        try:
            self.scheduler.add(group, prompt + output - 1)
        except InvalidRequestError:
            return  # could never be served in this pool
        self.groups[group.request_id] = group
        self.wanted[group.request_id] = output
        story.tell(
            f"add {group.request_id}: prompt of {prompt}, {width} x {output} to draw, "
            f"priority {priority}"
        )

    def step(self):
        scheduler = self.scheduler
        ran = list(scheduler.running)
        story.start_call("plan = scheduler.schedule()")
        plan = scheduler.schedule()
        said = [f"{what}: {' '.join(who)}" for what, who in self.events(plan) if who]
        story.end_call("", "   ".join([*said, queues(scheduler), tables(self.manager, self.names)]))
        went = [group.request_id for group in reversed(ran)][: len(plan.preempted)]
        assert list(plan.preempted) == went, (
            f"{letters(ran)} ran in this order; {went} must go, not {list(plan.preempted)}"
        )
        for pair in plan.swap_out:
            self.host[pair.destination] = list(self.device[pair.source])
        for pair in plan.swap_in:
            self.device[pair.destination] = list(self.host[pair.source])
        for pair in plan.copies:
            self.device[pair.destination] = list(self.device[pair.source])
        sequences = {s.seq_id: (g, s) for g in self.groups.values() for s in g.sequences}
        assert plan.scheduled, "somebody is to be served, and the step computes nothing"
        size, drawing = self.manager.block_size, {}
        for item in plan.scheduled:
            group, sequence = sequences[item.seq_id]
            assert group in scheduler.running, (
                f"{group.request_id} had to go in this step, and computes a token all the same"
            )
            table = item.block_table
            for i, token in enumerate(item.token_ids, start=item.num_computed_tokens):
                self.device[table[i // size]][i % size] = token
            sequence.num_computed_tokens = item.context_length
            if item.samples:
                drawing[group.request_id] = group
        for item in plan.scheduled:
            group, sequence = sequences[item.seq_id]
            read = [
                self.device[item.block_table[i // size]][i % size]
                for i in range(item.context_length)
            ]
            assert read == sequence.token_ids[: item.context_length], (
                f"{self.names[item.seq_id]} reads {read}, and its tokens are "
                f"{sequence.token_ids[: item.context_length]}"
            )
        for group in drawing.values():
            self.draw(group)

    def events(self, plan):
        scheduled = {item.seq_id for item in plan.scheduled}
        yield (
            "computes",
            [
                g.request_id
                for g in self.groups.values()
                if any(s.seq_id in scheduled for s in g.sequences)
            ],
        )
        yield "swapped out", plan.swapped
        yield "to be recomputed", [who for who in plan.preempted if who not in plan.swapped]
        yield "copied in", [f"{pair.source}>{pair.destination}" for pair in plan.swap_in]

    def draw(self, group):
        if not group.has_forked:
            group.has_forked = True
            for _ in range(group.params.n - 1):
                first = group.sequences[0]
                self.scheduler.fork(group, first.seq_id, first.fork(self.new_id(group.request_id)))
        for i, sequence in enumerate(group.sequences):
            sequence.token_ids.append((31 * sum(sequence.token_ids) + i) % 97)
        if group.sequences[0].num_output_tokens == self.wanted[group.request_id]:
            self.scheduler.remove(group)
            del self.groups[group.request_id]
            story.tell(f"{group.request_id} has ended")


@pytest.mark.task("7.5")
@at_most(60)
@given(
    block_size=st.integers(1, 4),
    num_blocks=st.integers(4, 10),
    num_host_blocks=st.integers(1, 10),
    mode=st.sampled_from(["recompute", "swap", "auto"]),
    requests=st.lists(
        st.tuples(
            st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 1, 2]), st.integers(0, 2)
        ),
        min_size=2,
        max_size=5,
    ),
)
@example(
    block_size=2,
    num_blocks=5,
    num_host_blocks=5,
    mode="swap",
    requests=[(3, 7, 1, 0), (3, 4, 1, 0)],
)
@example(
    block_size=2,
    num_blocks=7,
    num_host_blocks=1,
    mode="recompute",
    requests=[(4, 6, 1, 0), (4, 4, 2, 0)],
)
def test_whatever_happens_everybody_reads_their_own_tokens(
    block_size, num_blocks, num_host_blocks, mode, requests
):
    """T4 in small: preempted or not, every step finds in the cache what it left there."""
    engine = Engine(block_size, num_blocks, num_host_blocks, mode)
    for request in requests:
        engine.add(*request)
    for _ in range(400):
        if not engine.groups:
            break
        engine.step()
    assert not engine.groups, f"{letters(engine.groups.values())} did not end in 400 steps"
    for pool, where in ((engine.manager.device, "device"), (engine.manager.host, "host")):
        assert pool.num_used == 0, (
            f"all have ended, and the {where} has {pool.num_used} blocks used"
        )


@pytest.mark.task("7.5")
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_scarce_pool_makes_the_later_one_wait(mode):
    engine = Engine(2, 5, 5, mode)
    engine.add(3, 7, 1, 0)
    engine.add(3, 4, 1, 0)
    order = []
    while engine.groups:
        before = set(engine.groups)
        engine.step()  # which computes something, so that this ends
        order += sorted(before - set(engine.groups))
    preemption = engine.scheduler.preemption
    assert order == ["A", "B"], f"A came first and ends first; they ended {order}"
    counts = (preemption.num_recomputations, preemption.num_swaps)
    assert counts == ((1, 0) if mode == "recompute" else (0, 1)), (
        f"one preemption is enough here; there were {counts[0]} recomputations and "
        f"{counts[1]} swaps"
    )
