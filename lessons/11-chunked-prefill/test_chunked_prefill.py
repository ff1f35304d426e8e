"""Lesson 11: prompts in chunks, beside those that decode (T4, T6)."""

import functools
import itertools

import pytest
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st
from strategies import Request, Workload

from minipaged.course.narration import story
from minipaged.course.notation import name
from minipaged.evaluation.cost_model import DEPLOYMENTS, CostModel, StepWork
from minipaged.evaluation.simulator import Simulation, System
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.block_table import BlockCopy
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence, SequenceGroup, Status
from minipaged.scheduling.chunks import Draft, _catch_up, next_chunks
from minipaged.scheduling.preemption import preempt_by_recomputation
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.step_plan import ScheduledSequence, StepPlan


def progress(sequences):
    """How far each sequence is, as in "A: 3 of 10"."""
    return "   ".join(
        f"{name(s.seq_id)}: {s.num_computed_tokens} of {len(s.token_ids)} computed"
        for s in sequences
    )


def told(chunks):
    """Chunks in short, as in "[(A, 7)]"."""
    return "[" + ", ".join(f"({name(s.seq_id)}, {n})" for s, n in chunks) + "]"


def single(seq_id, prompt, outputs, computed):
    """A running group of one sequence."""
    sequence = Sequence(seq_id, range(prompt))
    sequence.token_ids += range(100, 100 + outputs)
    sequence.num_computed_tokens = computed
    group = SequenceGroup(name(seq_id), [sequence], SamplingParams(), seq_id)
    group.status = Status.RUNNING
    return group


@st.composite
def running(draw):
    """Running groups of one sequence, in every state that one can be in."""
    groups = []
    for seq_id in range(draw(st.integers(1, 5))):
        prompt, outputs = draw(st.integers(1, 12)), draw(st.integers(0, 4))
        computed = draw(st.integers(0, prompt + outputs - 1))
        decoding = draw(st.booleans())
        groups.append(
            single(seq_id, prompt, outputs, prompt + outputs - 1 if decoding else computed)
        )
    return groups


@pytest.mark.task("11.1")
@given(groups=running(), spare=st.integers(0, 30))
def test_everyone_gets_a_token_and_nothing_is_left_over(groups, spare):
    story.begin(f"the budget is one token for each sequence, and {spare} more")
    for group in groups:
        story.tell(progress(group.sequences))
    draft, manager = Draft(spare), BlockManager(4, 60)
    story.tell(f"draft = Draft(spare={spare})")
    total = 0
    for group in groups:
        (sequence,) = group.sequences
        letter, behind = name(sequence.seq_id), sequence.num_uncomputed_tokens
        story.start_call(f"next_chunks({letter}, draft, manager)")
        chunks, num_tokens = next_chunks(group, draft, manager)
        story.end_call(f"  -> {told(chunks)}, {num_tokens}", f"spare: {draft.spare}")
        assert [s for s, _ in chunks] == [sequence], f"one chunk, of {letter}"
        n = chunks[0][1]
        assert n == num_tokens, f"the chunk has {n} tokens, and {num_tokens} were counted"
        assert n >= 1, f"{letter} runs, and must get on: one token was set aside for it"
        assert n <= behind, f"{letter} has {behind} tokens left to compute, not {n}"
        assert draft.spare >= 0, "the step computes more than its budget"
        total += n
        assert draft.spare == spare - (total - groups.index(group) - 1), (
            f"{letter} takes its chunk but for one token from what the step can spare"
        )
        assert n == behind or draft.spare == 0, (
            f"{letter} gets {n} of the {behind} tokens that it is behind, and {draft.spare} of the "
            "step's tokens are left over"
        )


@pytest.mark.task("11.1")
@given(width=st.integers(2, 5), length=st.integers(2, 9), spare=st.integers(0, 9))
def test_samples_that_decode_get_one_token_each(width, length, spare):
    story.begin()
    sequences = [Sequence(i, range(length)) for i in range(width)]
    for sequence in sequences:
        sequence.num_computed_tokens = length - 1
    group = SequenceGroup("A", sequences, SamplingParams(n=width), 0)
    draft = Draft(spare)
    story.tell(progress(sequences))
    story.start_call("next_chunks(the group, draft, manager)")
    chunks, num_tokens = next_chunks(group, draft, BlockManager(4, 60))
    story.end_call(f"  -> {told(chunks)}, {num_tokens}", f"spare: {draft.spare}")
    assert list(chunks) == [(s, 1) for s in sequences], "one token for each, in their order"
    assert num_tokens == width, f"that is {width} tokens"
    assert draft.spare == spare, "one token for each was set aside, so nothing more is spent"


class Watched(BlockManager):
    """Says what is wrong with a fork, before something breaks."""

    def fork(self, parent_id, child_id, num_tokens=None):
        parent, child = name(parent_id), name(child_id)
        table = self.tables.get(parent_id)
        there = 0 if table is None else table.num_tokens
        assert child_id not in self.tables, f"{child} forks, and has blocks of its own already"
        assert num_tokens is None or there >= num_tokens, (
            f"{child} forks from {parent} for {num_tokens} tokens, and {parent} has {there} in the "
            "cache yet: it has to wait"
        )
        super().fork(parent_id, child_id, num_tokens)


class Family:
    """A group whose sequences were forked, grew, and lost all their blocks to others.

    Beside it is the memory: in which slot which prefix was computed.
    """

    def __init__(self, block_size, prompt, forks):
        story.begin()
        self.manager = Watched(block_size, 200)
        self.numbers = itertools.count(1)
        self.fresh = itertools.count(100)
        first = Sequence(0, range(prompt))
        self.sequences = [first]
        self.group = SequenceGroup("A", self.sequences, SamplingParams(n=len(forks) + 1), 0)
        self.group.status, self.group.has_forked = Status.RUNNING, True
        self.manager.append(0, prompt)
        first.num_computed_tokens = prompt
        first.token_ids.append(next(self.fresh))
        for parent, steps in forks:
            self.fork(self.sequences[parent % len(self.sequences)])
            for _ in range(steps):
                self.step()
        self.shared = self.shared_tokens()
        before = {
            name(s.seq_id): list(self.manager.tables[s.seq_id].blocks) for s in self.sequences
        }
        story.tell(f"# the blocks of {block_size} tokens were {before}")
        preempt_by_recomputation(self.group, self.manager)
        for s in self.sequences:
            if s.resume_from is not None:
                sibling, num_tokens = s.resume_from
                story.tell(f"# {name(s.seq_id)} shared {num_tokens} tokens with {name(sibling)}")
        story.tell("# all were lost", progress(self.sequences))
        self.memory = {}

    def fork(self, parent):
        child = parent.fork(next(self.numbers))
        self.manager.fork(parent.seq_id, child.seq_id)
        child.token_ids[-1] = next(self.fresh)
        self.sequences.append(child)

    def step(self):
        for sequence in self.sequences:
            self.manager.append(sequence.seq_id, 1)
            sequence.num_computed_tokens += 1
            sequence.token_ids.append(next(self.fresh))

    def shared_tokens(self):
        pairs = itertools.combinations([s.seq_id for s in self.sequences], 2)
        return {pair: self.manager.num_shared_tokens(*pair) for pair in pairs}

    @property
    def is_behind(self):
        return any(s.num_uncomputed_tokens > 1 for s in self.sequences)

    def compute(self, chunks):
        """Slots for all chunks of the step, then all tokens into them, as a forward pass does."""
        manager, written = self.manager, []
        for sequence, n in chunks:
            seq_id, start = sequence.seq_id, sequence.num_computed_tokens
            table = manager.tables.get(seq_id)
            slots = 0 if table is None else table.num_tokens
            assert slots == start, (
                f"{name(seq_id)} has slots for {slots} tokens and {start} are computed"
            )
            copies = manager.append(seq_id, n)
            assert not copies, f"{name(seq_id)} writes into a block that it shares"
            written += [(sequence, position) for position in range(start, start + n)]
        for sequence, position in written:
            slot = manager.tables[sequence.seq_id].slot(position)
            self.memory[slot] = tuple(sequence.token_ids[: position + 1])
        for sequence, n in chunks:
            sequence.num_computed_tokens += n
        for sequence in self.sequences:
            for position in range(sequence.num_computed_tokens):
                slot = manager.tables[sequence.seq_id].slot(position)
                assert self.memory.get(slot) == tuple(sequence.token_ids[: position + 1]), (
                    f"{name(sequence.seq_id)} counts token {position} as computed, and its slot "
                    "holds something else"
                )

    def check_chunks(self, chunks, allowed):
        """What must be true of the chunks of a step in which the group catches up."""
        total = sum(n for _, n in chunks)
        assert total <= allowed, f"{total} tokens, and {allowed} are allowed"
        assert len({id(s) for s, _ in chunks}) == len(chunks), "two chunks of one sequence"
        for sequence, n in chunks:
            letter, behind = name(sequence.seq_id), sequence.num_uncomputed_tokens
            assert n >= 1, f"a chunk of {n} tokens of {letter}"
            assert n < behind, (
                f"{letter} computes its last token and draws, and its siblings do not: they must "
                "draw in the same step"
            )
        if total < allowed:
            part = {id(s): n for s, n in chunks}
            for sequence in self.sequences:
                if sequence.resume_from is not None and chunks:
                    break  # it, and all behind it, may wait
                left = sequence.num_uncomputed_tokens - 1 - part.get(id(sequence), 0)
                assert left <= 0, (
                    f"{name(sequence.seq_id)} has {left} tokens to catch up, waits for nobody, and "
                    f"{allowed - total} tokens of the step are not used"
                )

    def check_end(self):
        """Everybody is where it was, and shares what it shared."""
        for sequence in self.sequences:
            assert sequence.resume_from is None, f"{name(sequence.seq_id)} still waits to share"
        for pair, num_tokens in self.shared_tokens().items():
            a, b = map(name, pair)
            assert num_tokens >= self.shared[pair], (
                f"{a} and {b} shared {self.shared[pair]} tokens before, and {num_tokens} now"
            )


families = st.builds(
    Family,
    st.integers(1, 4),
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=4),
)
extras = st.lists(st.integers(0, 12), min_size=1, max_size=20)


@pytest.mark.task("11.2")
@given(family=families, extras=extras)
def test_a_group_catches_up_to_its_last_tokens(family, extras):
    width = len(family.sequences)
    for extra in itertools.chain(extras, [5] * 100):
        allowed = width + extra
        story.start_call(f"_catch_up(the group, {allowed}, manager)")
        chunks = _catch_up(family.sequences, allowed, family.manager)
        story.end_call(f"  -> {told(chunks)}", progress(family.sequences))
        if not chunks:
            break
        family.check_chunks(chunks, allowed)
        family.compute(chunks)
        if not family.is_behind:
            break
    for sequence in family.sequences:
        left = sequence.num_uncomputed_tokens
        assert left == 1, (
            f"{name(sequence.seq_id)} should have its last token to compute, not {left}"
        )
    family.check_end()


@pytest.mark.task("11.2")
def test_nobody_forks_from_who_is_still_computing():
    family = Family(2, 6, [(0, 1)])
    first, second = family.sequences
    for allowed in (4, 2, 9):
        story.start_call(f"_catch_up(the group, {allowed}, manager)")
        chunks = _catch_up(family.sequences, allowed, family.manager)
        story.end_call(f"  -> {told(chunks)}", progress(family.sequences))
        if allowed == 9:
            expected = [(first, 1), (second, 1)]
            assert chunks in ([expected[0]], expected[1:], expected), "what is left of both"
            break
        assert chunks == [(first, allowed)], "B waits for the tokens that it shares with A"
        assert second.seq_id not in family.manager.tables, "B has no blocks before A has"
        family.compute(chunks)


@pytest.mark.task("11.2")
@given(family=families, extras=extras)
def test_a_group_that_comes_back_spends_what_it_takes(family, extras):
    width = len(family.sequences)
    for spare in itertools.chain(extras, [5] * 100):
        draft, was_behind = Draft(spare), family.is_behind
        story.start_call(f"next_chunks(the group, Draft({spare}), manager)")
        chunks, num_tokens = next_chunks(family.group, draft, family.manager)
        total = sum(n for _, n in chunks)
        family_state = progress(family.sequences)
        story.end_call(
            f"  -> {told(chunks)}, {num_tokens}", f"spare: {draft.spare}   {family_state}"
        )
        assert num_tokens == total, f"the chunks have {total} tokens, and {num_tokens} were counted"
        assert total <= width + spare, f"{total} tokens, and {width} + {spare} is the budget"
        spent = max(0, total - width)
        assert draft.spare == spare - spent, (
            f"{spent} tokens beyond one for each were taken, so {spare - spent} are left to spare, "
            f"not {draft.spare}"
        )
        drawing = [s for s, n in chunks if n == s.num_uncomputed_tokens]
        assert len(drawing) in (0, width), "all sequences of a group draw in the same step, or none"
        assert was_behind or drawing, "nobody is behind, so everybody draws"
        family.compute(chunks)
        if drawing:
            break
    assert drawing, "the group never comes to the step in which all draw"
    family.check_end()


# 11.3


def pool_told(manager):
    """What is free, and who holds what."""
    tables = [f"table {name(seq)}: {table.blocks}" for seq, table in manager.tables.items()]
    device = manager.device
    cached = f", of them cached {device.num_cached}" if manager.prefix_cache is not None else ""
    return "   ".join([*tables, f"{device.num_free} of {device.num_blocks} blocks free{cached}"])


def begin(scheduler, group, kept_free):
    """Call the learner's function, and tell it."""
    story.start_call(f"scheduler._begin({group.request_id}, kept_free={kept_free})")
    begun = scheduler._begin(group, kept_free)
    sequences = progress(group.sequences)
    story.end_call(f"  -> {begun}", f"{pool_told(scheduler.manager)}   {sequences}")
    return begun


@pytest.mark.task("11.3")
@given(
    block_size=st.integers(1, 4),
    num_blocks=st.integers(1, 12),
    held=st.integers(0, 12),
    prompt=st.integers(1, 40),
    kept_free=st.integers(0, 4),
)
def test_a_prompt_begins_if_all_of_it_fits(block_size, num_blocks, held, prompt, kept_free):
    story.begin()
    manager = BlockManager(block_size, num_blocks)
    scheduler = Scheduler(manager, max_num_seqs=4, max_num_batched_tokens=4)
    if held:
        manager.append(0, min(held, num_blocks) * block_size)
    sequence = Sequence(1, range(prompt))
    group = SequenceGroup("B", [sequence], SamplingParams(), 1)
    story.tell(f"# blocks of {block_size} tokens, 4 tokens a step", pool_told(manager))
    free, needed = manager.device.num_free, -(-prompt // block_size)
    begun = begin(scheduler, group, kept_free)
    room = f"{needed} blocks for B and {kept_free} to stay free; {free} are free"
    assert bool(begun) == (needed + kept_free <= free), room
    assert manager.device.num_free == free, "B takes its blocks later, chunk by chunk"
    assert sequence.num_computed_tokens == 0, "nothing is computed yet"


@pytest.mark.task("11.3")
@given(
    known=st.integers(0, 12),
    prompt=st.integers(1, 16),
    block_size=st.integers(1, 3),
    held=st.booleans(),
    room=st.integers(0, 9),
    kept_free=st.integers(0, 2),
    recomputed=st.booleans(),
)
def test_a_known_prefix_that_somebody_holds_needs_no_room(
    known, prompt, block_size, held, room, kept_free, recomputed
):
    story.begin()
    cache = PrefixCache(block_size, seed=0)
    manager = BlockManager(block_size, -(-known // block_size) + room + 1, prefix_cache=cache)
    scheduler = Scheduler(manager, max_num_seqs=4, max_num_batched_tokens=4)
    if known:
        manager.append(0, known)
        manager.mark_computed(0, list(range(known)))
        if not held:
            manager.free(0)
    manager.append(2, block_size)  # C, somebody else
    sequence = Sequence(1, range(prompt))
    group = SequenceGroup("B", [sequence], SamplingParams(), 1)
    group.was_recomputed = recomputed
    found = min(known, prompt - 1) // block_size
    story.tell(
        f"# blocks of {block_size} tokens; B has {prompt}, and the first {found} blocks are known"
        + (", and A holds them" if held and known else ""),
        pool_told(manager),
    )
    free = manager.device.num_free
    needed = -(-prompt // block_size) - (found if held else 0)
    begun = begin(scheduler, group, kept_free)
    assert bool(begun) == (needed + kept_free <= free), (
        f"{needed} blocks are needed for B and {kept_free} stay free; {free} are free"
    )
    if not begun:
        assert 1 not in manager.tables, "B does not begin, so it takes nothing"
        return
    computed = sequence.num_computed_tokens
    assert computed == found * block_size, (
        f"{found * block_size} tokens were found in the cache, and {computed} are counted as "
        "computed"
    )
    assert cache.num_queried_tokens == (0 if recomputed else prompt), (
        "a query is counted, unless the group comes back from a recomputation"
    )


@pytest.mark.task("11.3")
def test_a_swapped_group_does_not_begin_anew():
    story.begin()
    manager = BlockManager(2, 8, num_host_blocks=8)
    scheduler = Scheduler(manager, 4, 4)
    sequence = Sequence(0, range(5))
    manager.append(0, 4)
    sequence.num_computed_tokens = 4
    manager.swap_out([0])
    group = SequenceGroup("A", [sequence], SamplingParams(), 0)
    group.status = Status.SWAPPED
    story.tell("# A was swapped out, and has its blocks on the host", progress([sequence]))
    assert not begin(scheduler, group, 0), "A comes back with its blocks: that is `_swap_in`'s work"
    assert sequence.num_computed_tokens == 4, "A has computed 4 tokens, and keeps them"


@pytest.mark.task("11.3")
@pytest.mark.parametrize(("salt", "found"), [(b"", 0), (b"b", 0), (b"a", 4)])
def test_only_a_prefix_of_the_same_salt_is_adopted(salt, found):
    story.begin("somebody with the salt b'a' has computed the first 4 tokens of B's prompt")
    manager = BlockManager(2, 8, prefix_cache=PrefixCache(2, seed=0))
    manager.append(0, 4)
    manager.mark_computed(0, [0, 1, 2, 3], b"a")
    sequence = Sequence(1, range(6), cache_salt=salt)
    group = SequenceGroup("B", [sequence], SamplingParams(), 1)
    story.tell(f"# B's cache_salt is {salt}", pool_told(manager))
    assert begin(Scheduler(manager, 4, 4), group, 0)
    computed = sequence.num_computed_tokens
    assert computed == found, (
        f"{found} tokens are known to who has the salt {salt}, and {computed} were adopted"
    )


@functools.cache
def alone(prompt, max_tokens, model):
    """What a request writes when it is served alone, without chunks and without a cache."""
    request = Request(prompt, {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True})
    workload = Workload((request,), 4, 16, 1, 64, model_seed=model)
    return request.expected(workload.decoder, 0)[0][0]


@pytest.mark.task("11.3")
@at_most(15)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple),
            st.integers(1, 6),
            st.integers(0, 4),
        ),
        min_size=1,
        max_size=4,
    ),
    block_size=st.integers(1, 4),
    budget=st.integers(4, 12),
    blocks=st.integers(0, 4),
    caching=st.booleans(),
)
def test_the_text_does_not_depend_on_the_chunks(requests, block_size, budget, blocks, caching):
    story.begin()
    made = tuple(
        Request(
            prompt, {"max_tokens": most, "temperature": 0.0, "ignore_eos": True}, arrival=arrival
        )
        for prompt, most, arrival in requests
    )
    smallest = max(-(-(len(prompt) + most) // block_size) for prompt, most, _ in requests)
    workload = Workload(made, block_size, smallest + blocks, 4, budget, prefix_caching=caching)
    for number, request in enumerate(made):
        story.tell(
            f"# request {number}: prompt {list(request.prompt)}, "
            f"{request.params['max_tokens']} tokens, arrives before step {request.arrival}"
        )
    story.tell(
        f"# blocks of {block_size} tokens, {smallest + blocks} of them, {budget} tokens a step"
        + (", with a prefix cache" if caching else "")
    )
    outputs, engine = workload.run()
    for number, (prompt, most, _) in enumerate(requests):
        expected = alone(prompt, most, 0)
        got = outputs[number].outputs[0].token_ids
        assert got == expected, f"request {number} wrote {got}, and alone it writes {expected}"
    assert engine.scheduler.manager.device.num_used == 0, "every block is free in the end"


# 11.4

DEPLOYMENT = DEPLOYMENTS["opt-13b"]

items = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2, 7, 40, 300]), st.integers(0, 900)),
    min_size=1,
    max_size=6,
)
copies = st.lists(st.just(BlockCopy(0, 1)), max_size=3).map(tuple)


@functools.cache
def simulation(prompts_apart):
    return Simulation(System(prompts_apart=prompts_apart), DEPLOYMENT)


def step_plan(items, **orders):
    scheduled = [
        ScheduledSequence(seq_id, (0,) * n, computed, (), True)
        for seq_id, (n, computed) in enumerate(items)
    ]
    story.begin("a plan with " + ", ".join(f"{n} tokens behind {before}" for n, before in items))
    for what, pairs in orders.items():
        if pairs:
            story.tell(f"# {what}: {len(pairs)} blocks")
    return StepPlan(tuple(scheduled), **orders)


def passes(plan, apart):
    story.start_call(f"Simulation(System(prompts_apart={apart}), ...)._passes(plan)")
    result = simulation(apart)._passes(plan)
    story.end_call(f"  -> {len(result)} passes", "; ".join(map(str, result)))
    return result


def work_of(items):
    """The work of these items, as one pass."""
    work = StepWork()
    work.add([ScheduledSequence(0, (0,) * n, before, (), True) for n, before in items])
    return work.tokens, work.context_tokens, work.pairs


def sums(works):
    """All that a list of passes does, added up."""
    fields = ("tokens", "context_tokens", "pairs", "copied_blocks", "moved_blocks")
    return {field: sum(getattr(work, field) for work in works) for field in fields}


def expected_sums(items, swap_out, swap_in, copied):
    tokens, context, pairs = work_of(items)
    moved = len(swap_out) + len(swap_in)
    numbers = (tokens, context, pairs, len(copied), moved)
    return dict(
        zip(
            ("tokens", "context_tokens", "pairs", "copied_blocks", "moved_blocks"),
            numbers,
            strict=True,
        )
    )


@pytest.mark.task("11.4")
@given(items=items, swap_out=copies, swap_in=copies, copied=copies)
def test_mixed_there_is_one_pass(items, swap_out, swap_in, copied):
    plan = step_plan(items, swap_out=swap_out, swap_in=swap_in, copies=copied)
    result = passes(plan, False)
    assert len(result) == 1, "prompts and others go through the model together"
    expected = expected_sums(items, swap_out, swap_in, copied)
    assert sums(result) == expected, f"the work of the step is {expected}"


@pytest.mark.task("11.4")
@given(items=items, swap_out=copies, swap_in=copies, copied=copies)
def test_apart_no_pass_has_prompts_and_others(items, swap_out, swap_in, copied):
    decoding = [item for item in items if item[0] == 1]
    prompts = [item for item in items if item[0] > 1]
    if not decoding:
        copied = ()  # who writes into a shared block decodes
    plan = step_plan(items, swap_out=swap_out, swap_in=swap_in, copies=copied)
    result = passes(plan, True)
    expected = expected_sums(items, swap_out, swap_in, copied)
    assert sums(result) == expected, f"the passes must add up to {expected}"
    done = sorted((work.tokens, work.context_tokens, work.pairs) for work in result if work.tokens)
    wanted = sorted(work_of(part) for part in (decoding, prompts) if part)
    assert done == wanted, f"the passes with tokens must do {wanted}: tokens, contexts, pairs"
    for work in result:
        assert work.tokens or work.moved_blocks, "a pass with nothing to do would read all weights"
        if decoding and (work.tokens, work.context_tokens, work.pairs) == work_of(prompts):
            moved = work.copied_blocks + work.moved_blocks
            assert not moved, (
                f"the prompts' pass moves {moved} blocks; that is done with the others"
            )


@pytest.mark.task("11.4")
@given(items=items)
def test_a_mixed_step_is_never_slower(items):
    plan = step_plan(items)
    cost = CostModel(DEPLOYMENT, 16)
    times = {apart: sum(map(cost.seconds, passes(plan, apart))) for apart in (False, True)}
    assert times[False] <= times[True] * (1 + 1e-9), (
        f"mixed {times[False]:.4f} s, apart {times[True]:.4f} s: two passes read the weights twice"
    )
