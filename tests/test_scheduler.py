"""T2, T5, T6 and T7 for the scheduler: thousands of steps with a model that makes up tokens."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.memory.block_manager import BlockManager
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence, SequenceGroup, Status
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.step_plan import StepPlan


class Requests:
    """Drives a scheduler: makes requests up, counts tokens, ends what has enough of them."""

    def __init__(self, block_size, num_blocks, max_num_seqs, max_num_batched_tokens):
        self.manager = BlockManager(block_size, num_blocks)
        self.scheduler = Scheduler(self.manager, max_num_seqs, max_num_batched_tokens)
        self.living = {}  # sequence id -> (group, output tokens wanted)
        self.numbers = itertools.count()

    def add(self, prompt_length, max_tokens):
        number = next(self.numbers)
        sequence = Sequence(number, range(prompt_length))
        group = SequenceGroup(str(number), [sequence], SamplingParams(), number)
        self.scheduler.add(group, prompt_length + max_tokens - 1)
        self.living[number] = group, max_tokens
        return group

    def step(self):
        """Schedule, check the plan against the sequences, and let the fake model run it."""
        ran_before = list(self.scheduler.running)
        plan = self.scheduler.schedule()
        self.check_preemption(plan, ran_before)
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert StepPlan.from_dict(plan.to_dict()) == plan
        ended = []
        for item in plan.scheduled:
            group, max_tokens = self.living[item.seq_id]
            (sequence,) = group.sequences
            # The next tokens, in order, with a slot each, and blocks for no token more.
            assert item.num_computed_tokens == sequence.num_computed_tokens
            start, end = item.num_computed_tokens, item.context_length
            assert item.token_ids == tuple(sequence.token_ids[start:end])
            assert len(item.token_ids) > 0
            assert len(item.block_table) == -(-end // self.manager.block_size)
            assert item.samples == (end == len(sequence.token_ids))
            sequence.num_computed_tokens = end
            if item.samples:
                sequence.token_ids.append(7)
                if sequence.num_output_tokens == max_tokens:
                    ended.append(group)
        for group in ended:
            self.end(group)
        return plan

    def check_preemption(self, plan, ran_before):
        """The latest arrivals go, the latest first, and whole (T6)."""
        victims = [group.request_id for group in reversed(ran_before)][: len(plan.preempted)]
        assert list(plan.preempted) == victims
        for group in ran_before:
            if group.request_id in plan.preempted:
                assert group.status is Status.WAITING
                for sequence in group.sequences:
                    assert sequence.seq_id not in self.manager.tables
        # Whoever stayed makes progress in every step.
        scheduled = {item.seq_id for item in plan.scheduled}
        for group in ran_before[: len(ran_before) - len(victims)]:
            assert all(sequence.seq_id in scheduled for sequence in group.sequences)

    def end(self, group):
        self.scheduler.remove(group)
        for sequence in group.sequences:
            del self.living[sequence.seq_id]

    def work_left(self):
        return sum(
            len(group.sequences[0].token_ids) + wanted for group, wanted in self.living.values()
        )


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.integers(1, 5),
        num_blocks=st.integers(1, 14),
        max_num_seqs=st.integers(1, 6),
        extra=st.integers(0, 20),
    )
    def build(self, block_size, num_blocks, max_num_seqs, extra):
        self.requests = Requests(block_size, num_blocks, max_num_seqs, max_num_seqs + extra)

    @property
    def pool(self):
        manager = self.requests.manager
        return manager.device.num_blocks * manager.block_size

    @rule(prompt_length=st.integers(1, 40), max_tokens=st.integers(1, 20))
    def add(self, prompt_length, max_tokens):
        before = len(self.requests.scheduler.waiting)
        if prompt_length + max_tokens - 1 > self.pool:
            with pytest.raises(InvalidRequestError, match="the whole pool has"):
                self.requests.add(prompt_length, max_tokens)
            assert len(self.requests.scheduler.waiting) == before
        else:
            self.requests.add(prompt_length, max_tokens)

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self.requests.step()

    @precondition(lambda self: self.requests.living)
    @rule(index=st.integers(0, 30))
    def abort(self, index):
        groups = [group for group, _ in self.requests.living.values()]
        self.requests.end(groups[index % len(groups)])

    @invariant()
    def all_agree(self):
        if hasattr(self, "requests"):
            self.requests.scheduler.check_integrity()
            manager = self.requests.manager
            for table in manager.tables.values():
                assert table.num_empty_slots < manager.block_size  # T7
            assert manager.num_wasted_slots <= len(manager.tables) * (manager.block_size - 1)

    def teardown(self):
        """Every request ends, in a bounded number of steps, and nothing is left (T5, T6)."""
        if hasattr(self, "requests"):
            # The oldest request computes at least one new token a step: no livelock.
            for _ in range(self.requests.work_left()):
                if not self.requests.scheduler.has_unfinished:
                    break
                self.requests.step()
                self.requests.scheduler.check_integrity()
            assert not self.requests.living
            assert self.requests.manager.device.num_used == 0


class TestScheduler(SchedulerMachine.TestCase):
    settings = settings(stateful_step_count=50)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=2, max_size=10),
    block_size=st.integers(1, 4),
)
def test_requests_alike_end_in_order_of_arrival(lengths, block_size):
    """First come first served: of requests of one shape, none overtakes another."""
    prompt, output = lengths[0]
    requests = Requests(block_size, -(-(prompt + output) // block_size) + 2, 3, 16)
    groups = [requests.add(prompt, output) for _ in lengths]
    order = []
    while requests.scheduler.has_unfinished:
        requests.step()
        order += [g for g in groups if g.status is Status.FINISHED and g not in order]
    assert order == groups


def test_thousands_of_steps():
    """One long life of a small pool: 5,000 steps, 625 requests, many preemptions."""
    rng = random.Random(0)
    requests = Requests(block_size=4, num_blocks=24, max_num_seqs=8, max_num_batched_tokens=32)
    for step in range(5000):
        if step % 8 == 0:
            requests.add(rng.randint(1, 40), rng.randint(1, 40))
        requests.step()
        requests.scheduler.check_integrity()
    while requests.scheduler.has_unfinished:
        requests.step()
    assert requests.manager.device.num_free == 24
    assert requests.scheduler.num_preemptions > 200


def test_a_preempted_group_is_resumed_before_newer_ones():
    # block size 4, 4 blocks   A: 8 + 7 tokens, B: 4 + 6, C waits behind them
    requests = Requests(block_size=4, num_blocks=4, max_num_seqs=4, max_num_batched_tokens=32)
    a, b = requests.add(8, 8), requests.add(4, 7)
    requests.step()
    c = requests.add(4, 1)
    preempted = []
    while b.status is not Status.WAITING:
        preempted += requests.step().preempted
    # A needed a third block: B, the later one, lost its tokens' slots but not its tokens.
    assert preempted == ["1"]
    assert a.status is Status.RUNNING
    assert b.sequences[0].num_computed_tokens == 0
    assert b.sequences[0].num_output_tokens > 0
    assert list(requests.scheduler.waiting) == [b, c]


def test_a_long_prompt_is_computed_in_chunks_and_stalls_nobody():
    requests = Requests(block_size=4, num_blocks=40, max_num_seqs=4, max_num_batched_tokens=10)
    requests.add(3, 20)
    requests.step()
    requests.add(25, 2)
    sizes = [[len(item.token_ids) for item in requests.step().scheduled] for _ in range(4)]
    assert sizes == [[1, 9], [1, 9], [1, 7], [1, 1]]


def test_more_running_sequences_than_blocks():
    requests = Requests(block_size=2, num_blocks=3, max_num_seqs=8, max_num_batched_tokens=8)
    for _ in range(8):
        requests.add(1, 5)
    while requests.scheduler.has_unfinished:
        requests.step()
    assert requests.scheduler.num_preemptions > 0


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "message"),
    [(0, 8, "max_num_seqs is 0"), (8, 7, "max_num_batched_tokens is 7, below max_num_seqs 8")],
)
def test_limits_that_cannot_be(max_num_seqs, max_num_batched_tokens, message):
    with pytest.raises(ConfigurationError, match=message):
        Scheduler(BlockManager(4, 4), max_num_seqs, max_num_batched_tokens)
