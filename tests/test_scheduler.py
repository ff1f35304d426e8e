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
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence, SequenceGroup, Status
from minipaged.scheduling.policy import (
    PATIENCE,
    first_come_first_served,
    policy_named,
    shortest_first,
    urgent_first,
)
from minipaged.scheduling.preemption import Preemption, PreemptionCosts
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.step_plan import StepPlan


class Requests:
    """Drives a scheduler: makes requests up, counts tokens, forks, ends what has enough of them.

    The samples of a group end one by one, at random; beams fork and are dropped at random.
    """

    def __init__(self, block_size, num_blocks, max_num_seqs, max_num_batched_tokens, **options):
        self.rng = random.Random(0)
        host = options.get("num_host_blocks", 0)
        cache = PrefixCache(block_size, 0) if options.get("prefix_caching") else None
        self.manager = BlockManager(
            block_size, num_blocks, host, None, options.get("window"), cache
        )
        self.scheduler = Scheduler(
            self.manager,
            max_num_seqs,
            max_num_batched_tokens,
            options.get("policy", first_come_first_served),
            Preemption("swap" if host else "recompute"),
        )
        self.living = {}  # request id -> (group, output tokens wanted)
        self.numbers = itertools.count()
        self.sequences = itertools.count()
        self.num_requests = 0

    def add(self, prompt_length, max_tokens, width=1, beams=False, priority=0):
        number = next(self.numbers)
        # Every third prompt begins like the ones before it.
        prompt = [number % 3 * number, *range(1, prompt_length)]
        sequence = Sequence(next(self.sequences), prompt)
        params = SamplingParams(n=width)
        if beams:
            params = SamplingParams(n=width, use_beam_search=True, temperature=0)
        group = SequenceGroup(str(number), [sequence], params, number, priority)
        self.scheduler.add(group, prompt_length + max_tokens - 1)
        self.living[group.request_id] = group, max_tokens
        return group

    def step(self):
        """Schedule, check the plan against the sequences, and let the fake model run it."""
        ran_before = list(self.scheduler.running)
        plan = self.scheduler.schedule()
        self.check_preemption(plan, ran_before)
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert StepPlan.from_dict(plan.to_dict()) == plan
        assert not (plan.swap_out and plan.swap_in)
        groups = {s.seq_id: group for group, _ in self.living.values() for s in group.sequences}
        sequences = {s.seq_id: s for group in groups.values() for s in group.sequences}
        samples = {}
        for item in plan.scheduled:
            sequence = sequences[item.seq_id]
            # The next tokens, in order, with a slot each, and blocks for no token more.
            assert item.num_computed_tokens == sequence.num_computed_tokens
            start, end = item.num_computed_tokens, item.context_length
            assert item.token_ids == tuple(sequence.token_ids[start:end])
            assert len(item.token_ids) > 0
            assert len(item.block_table) == -(-end // self.manager.block_size)
            assert item.samples == (end == len(sequence.token_ids))
            sequence.num_computed_tokens = end
            samples.setdefault(groups[item.seq_id], []).append(item.samples)
        for group in samples:
            for sequence in group.sequences:
                self.manager.mark_computed(sequence.seq_id, sequence.token_ids)
        for group, drawn in samples.items():
            if any(drawn):  # all sequences of a group draw together (gang scheduling)
                assert drawn == [True] * len(group.sequences)
                self.draw(group)
        return plan

    def draw(self, group):
        """Every sequence gets a token; some fork, some end."""
        width = group.params.width
        if not group.has_forked:
            group.has_forked = True
            (prompt,) = group.sequences
            for _ in range(width - 1):
                self.scheduler.fork(group, prompt.seq_id, prompt.fork(next(self.sequences)))
        elif group.params.use_beam_search:
            parents = self.rng.choices(range(width), k=width)
            beams = list(group.sequences)
            for parent in parents:
                if parents.count(parent) > 1 and len(group.sequences) < 2 * width:
                    child = beams[parent].fork(next(self.sequences))
                    self.scheduler.fork(group, beams[parent].seq_id, child)
            while len(group.sequences) > width:
                self.scheduler.drop(group, self.rng.choice(group.sequences))
        for sequence in group.sequences:
            sequence.token_ids.append(self.rng.randrange(3))
        wanted = self.living[group.request_id][1]
        if group.sequences[0].num_output_tokens == wanted:
            self.end(group)
        elif not group.params.use_beam_search:
            while len(group.sequences) > 1 and self.rng.random() < 0.1:
                self.scheduler.drop(group, self.rng.choice(group.sequences))

    def check_preemption(self, plan, ran_before):
        """Those that are served last go, the last one first, and whole (T6)."""
        victims = [group.request_id for group in reversed(ran_before)][: len(plan.preempted)]
        assert list(plan.preempted) == victims
        for group in ran_before:
            if group.request_id in plan.preempted:
                swapped = group.request_id in plan.swapped
                assert group.status is (Status.SWAPPED if swapped else Status.WAITING)
                for sequence in group.sequences:
                    table = self.manager.tables.get(sequence.seq_id)
                    if swapped:
                        assert table is None or table.allocator is self.manager.host
                    else:
                        assert table is None
        # Whoever stayed makes progress in every step.
        scheduled = {item.seq_id for item in plan.scheduled}
        for group in ran_before[: len(ran_before) - len(victims)]:
            assert any(sequence.seq_id in scheduled for sequence in group.sequences)

    def end(self, group):
        self.scheduler.remove(group)
        del self.living[group.request_id]

    def most_steps(self):
        """More steps than serving the living one after the other could take."""
        return sum(
            (len(group.sequences[0].token_ids) + wanted + 2) * group.params.width
            for group, wanted in self.living.values()
        )


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.integers(1, 5),
        num_blocks=st.integers(1, 20),
        max_num_seqs=st.integers(1, 9),
        extra=st.integers(0, 20),
        num_host_blocks=st.sampled_from([0, 0, 3, 20]),
        window_or_cache=st.sampled_from([None, None, 1, 4, 6, "cache"]),
        policy=st.sampled_from([first_come_first_served, urgent_first]),
    )
    def build(
        self, block_size, num_blocks, max_num_seqs, extra, num_host_blocks, window_or_cache, policy
    ):
        budget = max(max_num_seqs, block_size) + extra
        self.requests = Requests(
            block_size,
            num_blocks,
            max_num_seqs,
            budget,
            num_host_blocks=num_host_blocks,
            window=window_or_cache if isinstance(window_or_cache, int) else None,
            prefix_caching=window_or_cache == "cache",
            policy=policy,
        )

    @rule(
        prompt_length=st.integers(1, 40),
        max_tokens=st.integers(1, 20),
        width=st.sampled_from([1, 1, 1, 2, 3, 5]),
        beams=st.booleans(),
        priority=st.integers(0, 2),
    )
    def add(self, prompt_length, max_tokens, width, beams, priority):
        requests = self.requests
        before = len(requests.scheduler.waiting)
        manager = requests.manager
        try:
            requests.add(prompt_length, max_tokens, width, beams, priority)
        except InvalidRequestError:
            assert len(requests.scheduler.waiting) == before
            # Refused is only what could need more than the pool or a batch has.
            most = width * (manager.blocks_for(prompt_length + max_tokens - 1) + 1)
            assert most > manager.device.num_blocks or width > requests.scheduler.max_num_seqs

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

    def teardown(self):
        """Every request ends, in a bounded number of steps, and nothing is left (T5, T6)."""
        if hasattr(self, "requests"):
            requests = self.requests
            # The first request in order computes at least one new token a step: no livelock.
            for _ in range(requests.most_steps()):
                if not requests.scheduler.has_unfinished:
                    break
                requests.step()
                requests.scheduler.check_integrity()
            assert not requests.living
            assert requests.manager.device.num_used == requests.manager.host.num_used == 0


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


@pytest.mark.parametrize("num_host_blocks", [0, 12, 32])
def test_thousands_of_steps(num_host_blocks):
    """One long life of a small pool: 5,000 steps, always too many requests of every kind."""
    rng = random.Random(0)
    requests = Requests(4, 32, 12, 32, num_host_blocks=num_host_blocks, prefix_caching=True)
    for _ in range(5000):
        if len(requests.scheduler.waiting) < 3:
            width = rng.choice([1, 1, 2, 3])
            requests.add(rng.randint(1, 30), rng.randint(1, 24), width, rng.random() < 0.5)
        requests.step()
        requests.scheduler.check_integrity()
    while requests.scheduler.has_unfinished:
        requests.step()
    assert requests.manager.device.num_used == requests.manager.host.num_used == 0
    preemption = requests.scheduler.preemption
    assert requests.scheduler.num_preemptions > 200
    assert (preemption.num_swaps > 100) == (num_host_blocks > 0)
    assert (preemption.num_recomputations > 0) == (num_host_blocks < 32)


def test_a_stream_of_urgent_requests_starves_nobody():
    """Priorities are head starts: at most 64 later requests per level go first."""
    requests = Requests(4, 8, 2, 16, policy=urgent_first)
    patient = requests.add(8, 8, priority=2)
    overtaking = 0
    while patient.status is not Status.FINISHED:
        while len(requests.scheduler.waiting) < 4:
            requests.add(8, 8)  # more than can be served, for ever
            overtaking += 1
        requests.step()
        assert overtaking < 2 * PATIENCE + 16
    assert overtaking > 2 * PATIENCE - 8, "and until then the urgent ones do go first"


def test_short_requests_starve_no_long_one():
    """A request for 1,024 tokens is overtaken by at most 64 log2(1024) later ones for 1."""
    requests = Requests(4, 300, 1, 16, policy=shortest_first)
    for group, most in ((requests.add(8, 900), 1024), (requests.add(8, 900), 1024)):
        group.params = SamplingParams(max_tokens=most)
        requests.scheduler.waiting.sort(key=shortest_first)
    patient = requests.scheduler.waiting[-1]
    overtaking = 0
    while patient.status is Status.WAITING:
        while len(requests.scheduler.waiting) < 4:
            group = requests.add(4, 1)
            group.params = SamplingParams(max_tokens=1)
            requests.scheduler.waiting.sort(key=shortest_first)
            overtaking += 1
        requests.step()
        assert overtaking < 10 * PATIENCE + 16
    assert overtaking > 10 * PATIENCE - 8, "and until then the short ones do go first"


def test_urgent_requests_overtake():
    requests = Requests(4, 4, 1, 16, policy=urgent_first)
    running = requests.add(4, 4, priority=1)
    requests.step()
    late = requests.add(4, 4, priority=1)
    urgent = requests.add(4, 4, priority=0)
    order = []
    while requests.scheduler.has_unfinished:
        requests.step()
        done = [g for g in (running, late, urgent) if g.status is Status.FINISHED]
        order += [group for group in done if group not in order]
    assert order == [running, urgent, late]


def test_what_was_shared_before_a_recomputation_is_shared_after_it():
    """Without that, a group could need more blocks to come back than the pool has."""
    # block size 4, prompt 16: three samples of 4 more tokens share 4 of 7 blocks
    requests = Requests(4, 7, 3, 64)
    group = requests.add(16, 5, width=3)
    requests.rng.random = lambda: 1.0  # no sample ends early
    for _ in range(3):
        requests.step()
    assert requests.manager.device.num_used == 7
    requests.scheduler.preemption.preempt(group, requests.manager)
    requests.scheduler.running.remove(group)
    requests.scheduler.waiting.append(group)
    assert requests.manager.device.num_used == 0
    sizes = []
    for _ in range(8):
        sizes.append(sum(len(item.token_ids) for item in requests.step().scheduled))
        requests.scheduler.check_integrity()
    # The first recomputes all but its last token, the others what came behind the prompt.
    assert sizes[:4] == [18, 2, 2, 3]
    assert group.status is Status.FINISHED


def test_a_swapped_group_comes_back_whole():
    requests = Requests(4, 6, 8, 64, num_host_blocks=6)
    first = requests.add(8, 16)
    second = requests.add(8, 8, width=2)
    plans = []
    while requests.scheduler.has_unfinished:
        plans.append(requests.step())
    (out,) = [plan for plan in plans if plan.swap_out]
    (back,) = [plan for plan in plans if plan.swap_in]
    # block 0 and 1 of the prompt are shared: moved once
    assert out.swapped == out.preempted == (second.request_id,)
    assert len(out.swap_out) == len(back.swap_in) < 6
    assert {pair.destination for pair in out.swap_out} == {pair.source for pair in back.swap_in}
    assert first.status is second.status is Status.FINISHED


@pytest.mark.parametrize(("move_block", "swaps"), [(0.1, True), (1.9, True), (2.1, False)])
def test_auto_takes_what_is_cheaper(move_block, swaps):
    """Two moves of each block against computing its four tokens."""
    requests = Requests(4, 6, 8, 64, num_host_blocks=6)
    requests.scheduler.preemption = Preemption("auto", PreemptionCosts(move_block, 1.0))
    requests.add(8, 16)
    requests.add(8, 16)
    while not requests.scheduler.num_preemptions:
        requests.step()
    assert (requests.scheduler.preemption.num_swaps == 1) == swaps


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
    [
        (0, 8, "max_num_seqs is 0"),
        (8, 7, "max_num_batched_tokens is 7, below max_num_seqs 8"),
        (1, 0, "max_num_batched_tokens is 0, below max_num_seqs 1"),
        (2, 3, "max_num_batched_tokens is 3, below block_size 4"),
    ],
)
def test_limits_that_cannot_be(max_num_seqs, max_num_batched_tokens, message):
    with pytest.raises(ConfigurationError, match=message):
        Scheduler(BlockManager(4, 4), max_num_seqs, max_num_batched_tokens)


def test_names_that_mean_nothing():
    with pytest.raises(ConfigurationError, match="no scheduling policy 'lifo'"):
        policy_named("lifo")
    with pytest.raises(ConfigurationError, match="preemption is 'kill'"):
        Preemption("kill")


def test_a_block_stays_free_for_everyone_who_runs():
    requests = Requests(block_size=2, num_blocks=5, max_num_seqs=4, max_num_batched_tokens=32)
    requests.add(3, 6)  # A takes [b0, b1]
    requests.step()
    second = requests.add(5, 2)
    # free: {b2, b3, b4}, just enough for B, but A needs its next one in the step after this:
    # B would be let in, and preempted at once.
    requests.step()
    assert second.status is Status.WAITING
    while second.request_id in requests.living:
        requests.step()
    assert requests.scheduler.num_preemptions == 0


def test_a_swapped_prompt_waits_until_the_rest_of_it_fits():
    requests = Requests(4, 9, 4, 8, num_host_blocks=9)
    scheduler = requests.scheduler
    first = requests.add(7, 6)  # A: two blocks, in the next step but one three
    requests.step()
    second = requests.add(24, 2)  # B: six blocks in the end, computed 7 tokens at a time
    requests.step()
    assert second.sequences[0].num_computed_tokens == 7
    victim = scheduler.running.pop()
    scheduler.preemption.preempt(victim, scheduler.manager)
    scheduler.waiting.append(victim)
    # A: three blocks.  B: two on the host, and four more to come; free: six, one of them A's next.
    requests.step()
    assert second.status is Status.SWAPPED
    while first.request_id in requests.living:
        requests.step()
        assert second.status is Status.SWAPPED or first.status is Status.FINISHED
    while second.request_id in requests.living:
        requests.step()
    assert scheduler.num_preemptions == 1


def test_auto_counts_what_a_sliding_window_dropped():
    manager = BlockManager(4, 50, 50, sliding_window=8)
    sequence = Sequence(0, range(201))
    for _ in range(200):  # of the 50 blocks that were computed 2 are held
        manager.append(0, 1)
        manager.mark_computed(0, sequence.token_ids)
    sequence.num_computed_tokens = 200
    preemption = Preemption("auto", PreemptionCosts(move_block=10, compute_token=1))
    preemption.preempt(SequenceGroup("a", [sequence], SamplingParams(), 0), manager)
    assert preemption.num_swaps == 1
