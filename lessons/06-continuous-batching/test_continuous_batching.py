"""Lesson 6: a batch that is made anew in every step, in the order of service (T5, T6).

PYTEST_DONT_REWRITE: what an assertion has to say is in its message.
"""

from bisect import insort

import pytest
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st
from turned import must_find, must_let_pass

from minipaged.course.narration import story
from minipaged.course.notation import name
from minipaged.errors import InvalidRequestError
from minipaged.memory.block_manager import BlockManager
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence, SequenceGroup, Status
from minipaged.scheduling.chunks import Draft
from minipaged.scheduling.policy import (
    PATIENCE,
    first_come_first_served,
    shortest_first,
    urgent_first,
)
from minipaged.scheduling.scheduler import Scheduler


def by_arrival(group):
    """First come, first served; of the tests' own, so that they need no task but theirs."""
    return (group.arrival,)


def by_urgency(group):
    """Priority 0 before 1, whatever arrives."""
    return (group.priority, group.arrival)


def new_group(number, prompt=1, priority=0, max_tokens=16):
    params = SamplingParams(max_tokens=max_tokens)
    tokens = [1000 * number + i for i in range(prompt)]
    return SequenceGroup(name(number), [Sequence(number, tokens)], params, number, priority)


def letters(groups):
    return " ".join(group.request_id for group in groups) or "nobody"


def queues(scheduler):
    """Both queues, and the free blocks, in a line."""
    running = "  ".join(
        f"{group.request_id} {group.sequences[0].num_computed_tokens}/"
        f"{len(group.sequences[0].token_ids)}"
        for group in scheduler.running
    )
    device = scheduler.manager.device
    return (
        f"running: {running or '-'}   waiting: {letters(scheduler.waiting)}"
        f"   free blocks: {device.num_free} of {device.num_blocks}"
    )


def chunks_of(scheduled):
    """What a step computes, as in "A[0:5] B[7:8]"."""
    chunks = [
        f"{name(item.seq_id)}[{item.num_computed_tokens}:"
        f"{item.num_computed_tokens + len(item.token_ids)}]"
        for item in scheduled
    ]
    return " ".join(chunks) or "nothing"


class Server:
    """A scheduler, and in the place of the model a counter that draws every token at once.

    Every request is one sequence.  All that happens is told.
    """

    def __init__(self, block_size, num_blocks, seats, budget, kind=Scheduler, **options):
        story.begin()
        options.setdefault("policy", by_arrival)
        self.manager = BlockManager(block_size, num_blocks)
        self.scheduler = kind(self.manager, seats, budget, **options)
        self.groups, self.wanted = [], {}
        told = "".join(
            f", {key}={getattr(value, '__name__', value)}" for key, value in options.items()
        )
        story.tell(
            f"scheduler = {kind.__name__}(BlockManager({block_size}, {num_blocks}), "
            f"{seats}, {budget}{told})"
        )

    def add(self, prompt, output=1, priority=0):
        """A request; None if it could never be served in this pool, which is not told."""
        group = new_group(len(self.groups), prompt, priority)
        try:
            self.scheduler.add(group, prompt + output - 1)
        except InvalidRequestError:
            return None
        self.groups.append(group)
        self.wanted[group.request_id] = output
        story.tell(
            f"add {group.request_id}: prompt of {prompt}, {output} to draw"
            + (f", priority {priority}" if priority else ""),
            queues(self.scheduler),
        )
        return group

    def group_of(self, item):
        return self.groups[item.seq_id]

    def compute(self, scheduled):
        """What the model does: every token of the plan is in the cache; some draw the next."""
        ended = []
        for item in scheduled:
            group = self.group_of(item)
            sequence = group.sequences[0]
            sequence.num_computed_tokens += len(item.token_ids)
            if item.samples:
                sequence.token_ids.append(7)
                if sequence.num_output_tokens >= self.wanted[group.request_id]:
                    ended.append(group)
        return ended

    def step(self):
        """One step, what it computes checked against what it should; returns the plan."""
        scheduler = self.scheduler
        story.start_call("plan = scheduler.schedule()")
        plan = scheduler.schedule()
        preempted = f", preempted: {' '.join(plan.preempted)}" if plan.preempted else ""
        story.end_call(
            "", f"computes {chunks_of(plan.scheduled)}{preempted};   {queues(scheduler)}"
        )
        self.check(plan.scheduled)
        for group in self.compute(plan.scheduled):
            self.end(group)
        return plan

    def check(self, scheduled):
        """Everybody's next tokens, once, each with a slot."""
        seen = set()
        for item in scheduled:
            group = self.group_of(item)
            who, sequence = group.request_id, group.sequences[0]
            assert who not in seen, f"{who} stands in the plan twice"
            seen.add(who)
            assert group in self.scheduler.running, f"{who} is in the plan and does not run"
            start = sequence.num_computed_tokens
            assert item.num_computed_tokens == start, (
                f"{who} has {start} tokens in the cache, and the plan says "
                f"{item.num_computed_tokens}"
            )
            end = start + len(item.token_ids)
            assert item.token_ids, f"{who} is in the plan with no token"
            assert type(item.token_ids) is tuple, (
                f"token_ids of {who} is a {type(item.token_ids).__name__}; a plan is made of "
                "tuples, which nobody can change later"
            )
            assert item.token_ids == tuple(sequence.token_ids[start:end]), (
                f"{who}: tokens {start} to {end - 1} come next, in this order"
            )
            is_all = end == len(sequence.token_ids)
            assert item.samples == is_all, (
                f"{who} has {len(sequence.token_ids)} tokens and computes up to {end}: this step "
                f"{'draws' if is_all else 'cannot draw'} its next token"
            )

    def end(self, group):
        who = group.request_id
        was = self.manager.tables.get(group.sequences[0].seq_id)
        story.start_call(f"scheduler.remove({who})")
        self.scheduler.remove(group)
        story.end_call("", queues(self.scheduler))
        assert group.status is Status.FINISHED, f"a removed group is FINISHED, {who} is not"
        assert group not in (*self.scheduler.running, *self.scheduler.waiting), (
            f"{who} was removed and still stands in a queue"
        )
        assert group.sequences[0].seq_id not in self.manager.tables, (
            f"{who} was removed and still holds {was}"
        )


# 6.1


def is_before(policy, first, second, told):
    story.tell(told, f"keys: {policy(first)}, {policy(second)}")
    return policy(first) < policy(second)


@pytest.mark.task("6.1")
@given(arrivals=st.lists(st.integers(0, 500), min_size=2, max_size=2, unique=True))
def test_first_come_first_served(arrivals):
    story.begin()
    early, late = new_group(min(arrivals)), new_group(max(arrivals), priority=-1)
    told = f"{early.arrival} arrived before {late.arrival}"
    assert is_before(first_come_first_served, early, late, told), (
        "who arrived first is served first, whatever else is said of it"
    )


@pytest.mark.task("6.1")
@given(
    arrivals=st.tuples(*2 * [st.integers(0, 400)]), priorities=st.tuples(*2 * [st.integers(0, 4)])
)
def test_a_priority_is_a_head_start(arrivals, priorities):
    story.begin()
    (a, b), (p, q) = arrivals, priorities
    if a == b:
        b += 1
    first, second = new_group(a, priority=p), new_group(b, priority=q)
    told = f"arrivals {a} and {b}, priorities {p} and {q}"
    expected = (a + PATIENCE * p, a) < (b + PATIENCE * q, b)
    assert is_before(urgent_first, first, second, told) == expected, (
        f"priority p counts like arriving {PATIENCE} p requests later, and of two that are then "
        "level the earlier arrival goes first"
    )


@pytest.mark.task("6.1")
@given(
    arrivals=st.tuples(*2 * [st.integers(0, 400)]),
    logs=st.tuples(*2 * [st.integers(0, 10)]),
)
def test_half_as_many_tokens_are_a_head_start(arrivals, logs):
    story.begin()
    (a, b), (p, q) = arrivals, logs
    if a == b:
        b += 1
    first, second = new_group(a, max_tokens=2**p), new_group(b, max_tokens=2**q)
    told = f"arrivals {a} and {b}, max_tokens {2**p} and {2**q}"
    expected = (a + PATIENCE * p, a) < (b + PATIENCE * q, b)
    assert is_before(shortest_first, first, second, told) == expected, (
        f"twice as many tokens count like arriving {PATIENCE} requests later, and of two that "
        "are then level the earlier arrival goes first"
    )


@pytest.mark.task("6.1")
@given(arrival=st.integers(0, 10**4), levels=st.integers(1, 5), early_is_urgent=st.booleans())
def test_of_two_that_are_level_the_earlier_arrival_goes_first(arrival, levels, early_is_urgent):
    story.begin()
    later = arrival + PATIENCE * levels
    for policy, early, late in (
        (urgent_first, new_group(arrival, priority=levels), new_group(later, priority=0)),
        (
            shortest_first,
            new_group(arrival, max_tokens=2**levels),
            new_group(later, max_tokens=1),
        ),
    ):
        told = f"arrivals {arrival} and {later}, level by their head starts"
        assert is_before(policy, early, late, told), "they are level, so the earlier goes first"
        assert not is_before(policy, late, early, told), "asked the other way round, it is the same"


@pytest.mark.task("6.1")
def test_a_request_without_a_limit_is_a_long_one():
    story.begin()
    unlimited, long = new_group(0, max_tokens=None), new_group(1, max_tokens=2**14)
    assert not is_before(shortest_first, unlimited, long, "0 names no limit, 1 asks for 2**14"), (
        "max_tokens of None counts like UNLIMITED tokens"
    )


# 6.2


@pytest.mark.task("6.2")
@given(
    block_size=st.integers(1, 4),
    chunks=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_a_chunk_gets_slots_and_stands_in_the_plan(block_size, chunks):
    """Several prompts in several chunks each, side by side."""
    server = Server(block_size, 64, 8, 64)
    scheduler, manager = server.scheduler, server.manager
    groups = [server.add(sum(sizes)) for sizes in chunks]
    for group in groups:  # as if they had been let in
        scheduler.waiting.remove(group)
        scheduler.running.append(group)
        group.status = Status.RUNNING
    for turn in range(max(map(len, chunks))):
        draft = Draft(64)
        now = [
            (group.sequences[0], sizes[turn])
            for group, sizes in zip(groups, chunks, strict=True)
            if turn < len(sizes)
        ]
        told = ", ".join(f"({name(sequence.seq_id)}, {n})" for sequence, n in now)
        story.start_call(f"scheduler._take_slots([{told}], draft)")
        scheduler._take_slots(now, draft)
        story.end_call("", f"draft: {chunks_of(draft.scheduled)};   {queues(scheduler)}")
        assert [item.seq_id for item in draft.scheduled] == [s.seq_id for s, _ in now], (
            "every chunk stands in the plan, in the order in which they came"
        )
        for item, (sequence, n) in zip(draft.scheduled, now, strict=True):
            who, table = name(item.seq_id), manager.tables[item.seq_id]
            end = sequence.num_computed_tokens + n
            assert len(item.token_ids) == n, f"{who} was to compute {n} tokens"
            assert table.num_tokens == end, f"{who} needs slots for {end} tokens, one each"
            assert type(item.block_table) is tuple, (
                f"block_table of {who} is a {type(item.block_table).__name__}; a plan is made of "
                "tuples, and a table that is still growing cannot stand in it"
            )
            assert item.block_table == tuple(table.blocks), (
                f"the plan names {who}'s blocks as they are when the step is computed: "
                f"{table.blocks}, not {list(item.block_table)}"
            )
        server.check(draft.scheduled)
        server.compute(draft.scheduled)


@pytest.mark.task("6.2")
def test_copies_on_write_are_handed_on():
    """Two samples share a block that is not full: the first to write gets a copy."""
    story.begin()
    manager = BlockManager(4, 8)
    scheduler = Scheduler(manager, 8, 64)
    parent, child = Sequence(0, [1, 2, 3, 4, 5, 6]), Sequence(1, [1, 2, 3, 4, 5, 6])
    parent.num_computed_tokens = child.num_computed_tokens = 5
    manager.append(0, 5)
    manager.fork(0, 1)
    story.tell("manager.append(A, 5); manager.fork(A, B)", f"{manager}")
    shared = manager.tables[0].blocks[-1]
    draft = Draft(64)
    scheduler._take_slots([(parent, 1), (child, 1)], draft)
    story.tell("scheduler._take_slots([(A, 1), (B, 1)], draft)", f"{manager}")
    assert [copy.source for copy in draft.copies] == [shared], (
        f"`append` returned the copy that must be made of block {shared}; it belongs into "
        "draft.copies, or B would read what nobody has written"
    )
    for item in draft.scheduled:
        assert item.block_table == tuple(manager.tables[item.seq_id].blocks), (
            f"the plan has {list(item.block_table)} for {name(item.seq_id)}"
        )


# 6.3


def let_in(server, spare):
    """One call of _admit, checked; returns who came in."""
    scheduler, manager = server.scheduler, server.manager
    policy, seats = scheduler.policy, scheduler.max_num_seqs
    waited, ran = list(scheduler.waiting), list(scheduler.running)
    draft = Draft(spare)
    story.start_call(f"scheduler._admit(Draft(spare={spare}))")
    scheduler._admit(draft)
    story.end_call("", f"draft: {chunks_of(draft.scheduled)};   {queues(scheduler)}")
    running, waiting = scheduler.running, scheduler.waiting
    admitted = [group for group in waited if group not in waiting]
    assert admitted == waited[: len(admitted)], (
        f"{letters(admitted)} came in, although the queue was {letters(waited)}: somebody overtook "
        "those in front"
    )
    assert waiting == waited[len(admitted) :], (
        f"who was not let in keeps its place: {letters(waited[len(admitted) :])}, "
        f"not {letters(waiting)}"
    )
    assert sorted(running, key=policy) == sorted([*ran, *admitted], key=policy), (
        f"{letters([*ran, *admitted])} should run, and {letters(running)} do"
    )
    assert running == sorted(running, key=policy), (
        f"those who run stand in the order of service, {letters(sorted(running, key=policy))}"
    )
    for group in admitted:
        assert group.status is Status.RUNNING, f"{group.request_id} runs, and its status says not"
    assert [server.group_of(item) for item in draft.scheduled] == admitted, (
        "every newcomer, and nobody else, computes its first chunk in this step"
    )
    server.check(draft.scheduled)
    assert len(running) <= seats, f"{len(running)} run, and there are {seats} seats"
    num_tokens = sum(len(item.token_ids) for item in draft.scheduled)
    assert num_tokens <= spare, (
        f"newcomers compute {num_tokens} tokens, and {spare} were left of the step"
    )
    free = manager.device.num_free
    if admitted:
        assert free >= len(running) - 1, (
            f"{free} blocks are free; when {admitted[-1].request_id} came in, "
            f"{len(running) - 1} ran already, and each may need its next block in the next step"
        )
    if waiting:
        head = waiting[0]
        needed = manager.blocks_for(len(head.sequences[0].token_ids))
        assert len(running) == seats or num_tokens == spare or needed + len(running) > free, (
            f"{head.request_id} could have come in: {seats - len(running)} seats, "
            f"{spare - num_tokens} tokens of this step and {free} blocks are left; it needs "
            f"{needed}, and one stays free for each who runs"
        )
    server.compute(draft.scheduled)
    return admitted


requests = st.tuples(st.integers(1, 6), st.integers(0, 2))  # prompt, priority


@pytest.mark.task("6.3")
@given(
    block_size=st.integers(1, 4),
    num_blocks=st.integers(1, 8),
    seats=st.integers(1, 6),
    extra=st.integers(0, 20),
    rounds=st.lists(
        st.tuples(st.lists(requests, max_size=3), st.booleans()), min_size=1, max_size=4
    ),
)
def test_who_fits_is_let_in_and_nobody_else(block_size, num_blocks, seats, extra, rounds):
    budget = max(seats, block_size) + extra
    server = Server(block_size, num_blocks, seats, budget, policy=by_urgency)
    scheduler = server.scheduler
    let_in(server, budget)
    for arriving, somebody_leaves in rounds:
        for prompt, priority in arriving:
            server.add(prompt, 2, priority)
        let_in(server, budget - len(scheduler.running))
        if somebody_leaves and scheduler.running:
            group = scheduler.running.pop(0)
            server.manager.free(group.sequences[0].seq_id)
            story.tell(f"{group.request_id} leaves", queues(scheduler))


@pytest.mark.task("6.3")
def test_a_small_request_does_not_overtake_a_large_one():
    """Not even into room that is free, or a stream of small ones would keep it out for ever."""
    server = Server(4, 6, 8, 64)
    server.add(8, 2)
    large, small = server.add(20, 2), server.add(1, 2)
    let_in(server, 64)
    assert server.scheduler.waiting == [large, small], (
        f"{letters([large, small])} wait in this order, not {letters(server.scheduler.waiting)}"
    )


@pytest.mark.task("6.3")
def test_a_prompt_that_is_longer_than_the_rest_of_the_step_begins_with_a_chunk():
    server = Server(4, 16, 8, 8)
    server.add(5, 2)
    long = server.add(20, 2)
    server.add(1, 2)
    assert long in let_in(server, 8), "three of the step's tokens are left for it"
    assert long.sequences[0].num_computed_tokens == 3, (
        f"B computes three tokens, not {long.sequences[0].num_computed_tokens}"
    )


@pytest.mark.task("6.3")
def test_a_block_stays_free_for_everyone_who_runs():
    """Else a newcomer takes the block that somebody needs next, and is preempted for it."""
    server = Server(2, 5, 8, 64)
    runs, late = server.add(3, 6), server.add(5, 2)
    assert let_in(server, 64) == [runs], (
        f"A took 2 of 5 blocks; {late.request_id} needs the 3 that are left, and A its next one"
    )


@pytest.mark.task("6.3")
def test_a_block_stays_free_for_newcomers_too():
    server = Server(4, 5, 8, 64)
    groups = [server.add(4, 4) for _ in range(4)]
    assert let_in(server, 64) == groups[:3], (
        "three came in and took a block each; of the two left, none is D's"
    )


# 6.4


arrivals = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 8), st.integers(1, 8), st.integers(0, 2)),
    min_size=1,
    max_size=6,
)  # steps since the last one, prompt, tokens to draw, priority


def serve(server, arriving):
    """Serve all of them, checking every step; returns (plan, who ran before) of each."""
    scheduler, steps, todo = server.scheduler, [], list(arriving)
    wait = todo[0][0] if todo else 0
    limit = 20 + 20 * sum(gap + prompt + output for gap, prompt, output, _ in todo)
    while todo or scheduler.has_unfinished:
        while todo and wait == 0:
            _, prompt, output, priority = todo.pop(0)
            server.add(prompt, output, priority)
            wait = todo[0][0] if todo else 0
        wait = max(0, wait - 1)
        if not scheduler.has_unfinished:
            continue
        assert len(steps) < limit, f"{limit} steps were made, and some have not ended"
        before = list(scheduler.running)
        plan = server.step()
        check_step(server, plan, before)
        steps.append((plan, before))
    assert server.manager.device.num_used == 0, "all have ended, and blocks are still taken"
    return steps


def check_step(server, plan, before):
    scheduled = [server.group_of(item) for item in plan.scheduled]
    newcomers = [group for group in scheduled if group not in before]
    for group in before:
        who = group.request_id
        if who in plan.preempted:
            assert group not in scheduled, f"{who} lost its blocks to this step and is in its plan"
        else:
            assert group in scheduled, f"{who} runs and gets no token in this step"
    budget = server.scheduler.max_num_batched_tokens
    assert plan.num_tokens <= budget, (
        f"the step computes {plan.num_tokens} tokens, and max_num_batched_tokens is {budget}"
    )
    if plan.preempted:
        assert not newcomers, (
            f"the step took blocks away from {' '.join(plan.preempted)} and let "
            f"{letters(newcomers)} in"
        )
    assert scheduled, "somebody is to be served, and the step computes nothing"


@pytest.mark.task("6.4")
@at_most(60)
@given(
    block_size=st.integers(1, 4),
    num_blocks=st.integers(2, 12),
    seats=st.integers(1, 4),
    extra=st.integers(0, 8),
    policy=st.sampled_from([by_arrival, by_urgency]),
    arriving=arrivals,
)
def test_all_who_run_advance_and_all_end(block_size, num_blocks, seats, extra, policy, arriving):
    """Joining and leaving at any step, preempted when blocks are scarce."""
    budget = max(seats, block_size) + extra
    server = Server(block_size, num_blocks, seats, budget, policy=policy)
    serve(server, arriving)


@pytest.mark.task("6.4")
def test_who_ends_makes_room_in_the_very_next_step():
    server = Server(4, 16, 2, 64)
    for output in (2, 6, 3):
        server.add(4, output)
    runs = [chunks_of(server.step().scheduled) for _ in range(3)]
    assert runs == ["A[0:4] B[0:4]", "A[4:5] B[4:5]", "B[5:6] C[0:4]"], (
        "A ends in the second step, so C begins in the third while B goes on"
    )


@pytest.mark.task("6.4")
@at_most(40)
@given(arriving=arrivals, seats=st.integers(1, 4))
def test_a_static_batch_lets_nobody_in_until_all_have_ended(arriving, seats):
    server = Server(4, 64, seats, 64, static_batches=True)
    for plan, before in serve(server, arriving):
        newcomers = [item for item in plan.scheduled if server.group_of(item) not in before]
        assert not (before and newcomers), (
            f"{chunks_of(newcomers)} came into a static batch while {letters(before)} ran"
        )


@pytest.mark.task("6.4")
def test_a_step_that_takes_blocks_away_gives_none_to_a_newcomer():
    """B must go for its own next block; C is more urgent and would fit, but waits for a step."""
    server = Server(2, 5, 4, 64, policy=by_urgency)
    server.add(2, 5)
    server.add(5, 5, priority=1)
    for _ in range(2):
        check_step(server, server.step(), list(server.scheduler.running))
    newcomer = server.add(1, 2)
    before = list(server.scheduler.running)
    plan = server.step()
    assert plan.preempted == ("B",), "A and B hold all blocks, and B, the last one, needs another"
    check_step(server, plan, before)
    server.step()
    assert newcomer.status is Status.RUNNING, "in the step after that there is room for C"


@pytest.mark.task("6.4")
def test_a_step_without_anybody_is_empty():
    server = Server(4, 4, 2, 8)
    assert server.step().is_empty, "nobody is there, and the plan is not empty"


@pytest.mark.task("6.4")
@pytest.mark.parametrize("who", ["A", "B", "C"])
def test_a_request_can_be_aborted_wherever_it_stands(who):
    """A and B run, C waits."""
    server = Server(4, 16, 2, 64)
    groups = {group.request_id: group for group in [server.add(5, 3) for _ in range(3)]}
    server.step()
    server.end(groups.pop(who))
    for _ in range(8):
        if server.scheduler.has_unfinished:
            server.step()
    assert all(group.status is Status.FINISHED for group in groups.values()), (
        f"{letters(groups.values())} go on without {who}, and end"
    )
    assert server.manager.device.num_used == 0, "all have ended, and blocks are still taken"


# 6.5  The property that the learner writes must find each of these wrong schedulers.


class KeepsTheBlocksOfWhoEnded(Scheduler):
    """A group that has ended leaves its queue, and its blocks are never freed."""

    def remove(self, group):
        (self.running if group in self.running else self.waiting).remove(group)
        group.status = Status.FINISHED


class ServesOutOfOrder(Scheduler):
    """The last in the order of service stands first among those who run."""

    def schedule(self):
        plan = super().schedule()
        self.running.reverse()
        return plan


class LetsTheLastWaitInFront(Scheduler):
    """Whoever comes is put in front of the queue."""

    def add(self, group, max_tokens_in_cache):
        super().add(group, max_tokens_in_cache)
        self.waiting.remove(group)
        self.waiting.insert(0, group)


class LetsOneTooManyRun(Scheduler):
    """There is a seat more than max_num_seqs."""

    def schedule(self):
        self.max_num_seqs += 1
        try:
            return super().schedule()
        finally:
            self.max_num_seqs -= 1


class ForgetsTheStatus(Scheduler):
    """Groups that run are said to be waiting."""

    def schedule(self):
        plan = super().schedule()
        for group in self.running:
            group.status = Status.WAITING
        return plan


class FreesTheBlocksOfWhoRuns(Scheduler):
    """A group runs, its tokens count as computed, and its blocks are free."""

    def schedule(self):
        plan = super().schedule()
        if self.running:
            self.manager.free(self.running[-1].sequences[0].seq_id)
        return plan


class HoldsBlocksForWhoWaits(Scheduler):
    """A group that waits holds a block already."""

    def schedule(self):
        plan = super().schedule()
        for group in self.waiting[-1:]:
            self.manager.append(group.sequences[0].seq_id, 1)
        return plan


class TakesASlotTooMany(Scheduler):
    """The table of a group has a slot more than it has computed tokens."""

    def schedule(self):
        plan = super().schedule()
        if self.running and self.manager.device.num_free:
            self.manager.append(self.running[0].sequences[0].seq_id, 1)
        return plan


class LosesABlock(Scheduler):
    """A block is taken from the pool, and stands in no table."""

    def schedule(self):
        plan = super().schedule()
        if self.manager.device.num_free:
            self.manager.device.allocate()
        return plan


class StandsInBothQueues(Scheduler):
    """A group that runs still stands among those who wait."""

    def schedule(self):
        plan = super().schedule()
        if self.running and self.running[0] not in self.waiting:
            insort(self.waiting, self.running[0], key=self.policy)
        return plan


class LetsOneInAtATime(Scheduler):
    """Right, if slow: a step admits one newcomer at most."""

    def _admit(self, draft):
        others = self.waiting[1:]
        del self.waiting[1:]
        super()._admit(draft)
        self.waiting += others


class ServesTheLastFirst(Scheduler):
    """Right, if unfair: the order is its own, and it keeps to it."""

    def __init__(self, manager, seats, budget, policy):
        super().__init__(manager, seats, budget, policy=lambda group: (-group.arrival,))


class PreemptsForNothing(Scheduler):
    """Right, if wasteful: in every third step the last one loses its blocks."""

    steps = 0

    def schedule(self):
        self.steps += 1
        if self.steps % 3 == 0 and len(self.running) > 1:
            victim = self.running.pop()
            self.preemption.preempt(victim, self.manager)
            insort(self.waiting, victim, key=self.policy)
        return super().schedule()


WRONG = [
    KeepsTheBlocksOfWhoEnded,
    ServesOutOfOrder,
    LetsTheLastWaitInFront,
    LetsOneTooManyRun,
    ForgetsTheStatus,
    FreesTheBlocksOfWhoRuns,
    HoldsBlocksForWhoWaits,
    TakesASlotTooMany,
    LosesABlock,
    StandsInBothQueues,
]
RIGHT = [Scheduler, LetsOneInAtATime, ServesTheLastFirst, PreemptsForNothing]


def live(kind):
    """A life of a scheduler; between the steps its books are audited."""
    server = Server(4, 12, 2, 64, kind)
    scheduler = server.scheduler

    def audit():
        story.tell("scheduler.check_integrity()", queues(scheduler))
        scheduler.check_integrity()

    audit()
    for output in (4, 2, 7, 3):
        server.add(5, output)
        audit()
    scheduler_steps = 0
    while scheduler.has_unfinished and scheduler_steps < 60:
        scheduler_steps += 1
        plan = scheduler.schedule()
        story.tell("scheduler.schedule(); compute", f"computes {chunks_of(plan.scheduled)}")
        ended = server.compute(plan.scheduled)
        audit()
        for group in ended:
            scheduler.remove(group)
            story.tell(f"scheduler.remove({group.request_id})")
            audit()
    audit()


@pytest.mark.task("6.5")
@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_the_property_finds_a_wrong_scheduler(kind):
    must_find(live, kind, RIGHT)


@pytest.mark.task("6.5")
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_the_property_lets_a_right_scheduler_pass(kind):
    must_let_pass(live, kind, WRONG)
