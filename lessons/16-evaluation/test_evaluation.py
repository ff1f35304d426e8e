"""Lesson 16: what the figures are made of: arrivals, means, slots, seconds and a knee."""

import dataclasses
import itertools
import math
from unittest import mock

import numpy as np
import pytest
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st

from minipaged.course.narration import story
from minipaged.course.notation import name
from minipaged.errors import ConfigurationError
from minipaged.evaluation import sweep as sweep_module
from minipaged.evaluation.arrivals import DATASETS, poisson_requests
from minipaged.evaluation.cost_model import (
    DEPLOYMENTS,
    GPUS,
    MATMUL_EFFICIENCY,
    READ_EFFICIENCY,
    CostModel,
    Deployment,
    ModelSize,
    StepWork,
)
from minipaged.evaluation.memory_use import MemoryUse, memory_use
from minipaged.evaluation.outcome import Totals
from minipaged.evaluation.simulator import System
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.reservation import RESERVATIONS, ReservationManager
from minipaged.scheduling.step_plan import ScheduledSequence

# 16.1: arrivals.  Bounds are five standard deviations of what is measured.

CONTEXT = 2048
MANY = 20_000


def many(rate, dataset="alpaca", seed=0):
    """Requests of so many seconds that about 20,000 come."""
    story.begin()
    seconds = MANY / rate
    story.tell(f'list(poisson_requests("{dataset}", {rate}, {seconds:g}, {CONTEXT}, {seed}))')
    return list(poisson_requests(dataset, rate, seconds, CONTEXT, seed)), seconds


@pytest.mark.task("16.1")
@pytest.mark.parametrize("rate", [0.5, 200.0])
def test_requests_come_at_their_rate_and_without_a_rhythm(rate):
    requests, seconds = many(rate)
    assert len(requests) == pytest.approx(MANY, rel=0.04), (
        f"{rate:g} a second for {seconds:g} seconds are about {MANY} requests, not {len(requests)}"
    )
    arrivals = np.array([request.arrival for request in requests])
    gaps = np.diff(arrivals)
    assert gaps.min() >= 0, "requests come in the order of their arrival"
    assert arrivals[0] >= 0
    assert arrivals[-1] <= seconds, f"the last one comes at {arrivals[-1]:g} s, after the end"
    assert arrivals[-1] > seconds - 30 / rate, f"none comes after {arrivals[-1]:g} s"
    mean = 1 / rate
    assert gaps.mean() == pytest.approx(mean, rel=0.04), (
        f"the mean gap is 1 / rate = {mean:g} s, not {gaps.mean():.4g} s"
    )
    assert gaps.std() == pytest.approx(mean, rel=0.06), (
        f"the gaps of a Poisson process scatter as much as their mean, {mean:g} s; these scatter "
        f"by {gaps.std():.4g} s"
    )
    assert np.median(gaps) == pytest.approx(mean * math.log(2), rel=0.06), (
        f"half of the gaps are below ln 2 / rate = {mean * math.log(2):.4g} s, not below "
        f"{np.median(gaps):.4g} s: are they exponential?"
    )
    different = len(set(np.round(gaps / mean, 9)))
    assert different > 0.99 * len(gaps), (
        f"of {len(gaps)} gaps only {different} are different: they repeat"
    )


@pytest.mark.task("16.1")
@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_cannot_be_is_refused(rate):
    story.begin()
    story.tell(f'next(poisson_requests("alpaca", {rate}, 10, {CONTEXT}, 0))')
    with pytest.raises(ConfigurationError):
        next(poisson_requests("alpaca", rate, 10.0, CONTEXT, 0))


@pytest.mark.task("16.1")
@given(seed=st.integers(0, 10**6), seconds=st.floats(0.5, 4))
@at_most(40)
def test_none_comes_after_the_end(seed, seconds):
    story.begin()
    story.tell(f'list(poisson_requests("alpaca", 3.0, {seconds:g}, {CONTEXT}, {seed}))')
    late = [r.arrival for r in poisson_requests("alpaca", 3.0, seconds, CONTEXT, seed)]
    late = [arrival for arrival in late if arrival > seconds]
    assert not late, f"a request comes after {late[0]:g} s, and the end is at {seconds:g} s"


@pytest.mark.task("16.1")
@pytest.mark.parametrize("dataset", ["sharegpt", "alpaca"])
def test_lengths_are_those_of_the_dataset(dataset):
    requests, _ = many(20.0, dataset)
    lengths = np.array([(request.prompt, request.output) for request in requests])
    assert lengths.min() >= 1, "a prompt and an output have at least 1 token"
    assert lengths.max() <= CONTEXT // 2, (
        f"prompt and output have at most half of the context each, {CONTEXT // 2} tokens; one has "
        f"{lengths.max()}"
    )
    for column, kind in enumerate(("prompt", "output")):
        mean, expected = lengths[:, column].mean(), getattr(DATASETS[dataset], kind)
        assert mean == pytest.approx(expected, rel=0.06), (
            f"the mean {kind} has {expected} tokens, not {mean:.1f}"
        )
    together = abs(np.corrcoef(np.log(lengths.T))[0, 1])
    assert together < 0.05, (
        f"long prompts have long outputs (correlation {together:.2f}); each is drawn by itself"
    )
    earlier, later = lengths[:1000], lengths[1000:2000]
    assert (earlier != later).any(axis=0).all(), "after 1,000 requests the lengths repeat"


@pytest.mark.task("16.1")
@at_most(20)
@given(seed=st.integers(0, 99), rate=st.sampled_from([0.3, 7.0, 40.0]))
def test_a_seed_makes_the_same_requests_again(seed, rate):
    def first(seed, rate):
        story.tell(f'islice(poisson_requests("alpaca", {rate}, inf, {CONTEXT}, {seed}), 30)')
        requests = poisson_requests("alpaca", rate, math.inf, CONTEXT, seed)
        return list(itertools.islice(requests, 30))

    story.begin("it never ends, and must begin all the same")
    once = first(seed, rate)
    assert len(once) == 30
    assert first(seed, rate) == once, "the same seed made other requests"
    assert first(seed + 1, rate) != once, "another seed made the same requests"


# 16.2: what a run comes to

requests_of_a_run = st.lists(
    st.tuples(st.floats(0.001, 50).map(lambda x: round(x, 3)), st.integers(1, 500)), max_size=30
)


def outcome_of(totals):
    return totals.outcome(preemptions=0, hit_tokens=0, steps=7, simulated=3.0, real=0.1)


@pytest.mark.task("16.2")
@given(requests=requests_of_a_run)
def test_every_request_counts_once(requests):
    story.begin()
    totals = Totals()
    story.tell("totals = Totals()")
    for latency, tokens in requests:
        totals.add_request(latency, tokens)
        story.tell(f"totals.add_request({latency}, tokens={tokens})")
    got = outcome_of(totals)
    story.tell("totals.outcome(...)", f"latency {got.latency:.4g}")
    assert got.requests == len(requests)
    assert got.tokens == sum(tokens for _, tokens in requests), "output tokens of all requests"
    expected = sum(latency for latency, _ in requests) / max(1, len(requests))
    assert got.latency == pytest.approx(expected), (
        f"the mean over the requests is {expected:.4g} s/token, not {got.latency:.4g}: each counts "
        "once, however many tokens it has"
    )
    assert (got.steps, got.simulated, got.real) == (7, 3.0, 0.1), "what is given is handed on"


@pytest.mark.task("16.2")
@given(
    base=st.sampled_from([0.002, 0.03, 1.0]),
    count=st.sampled_from([1, 3, 99, 100, 101, 150, 200, 420]),
    random=st.randoms(use_true_random=False),
)
def test_one_in_a_hundred_waits_longer_than_p99(base, count, random):
    slow = [base * 2**number for number in range(1, 7)]
    latencies = [base] * max(0, count - len(slow)) + slow[: min(count, len(slow))]
    story.begin(f"{count} requests; the slowest: {latencies[-6:]}")
    random.shuffle(latencies)
    totals = Totals()
    for latency in latencies:
        totals.add_request(latency, 1)
    got = outcome_of(totals).p99
    exact = sorted(latencies)[count - count // 100 - 1]
    assert exact / 1.051 <= got <= exact * 1.051, (
        f"of {count} latencies at most {count // 100} may lie above p99, so it is {exact:.4g}; "
        f"{got:.4g} is more than a step of the histogram, 5 %, away from it"
    )


@pytest.mark.task("16.2")
@given(
    steps=st.lists(
        st.tuples(st.floats(0.001, 2).map(lambda x: round(x, 3)), st.integers(0, 40)), max_size=8
    )
)
def test_the_batch_is_a_mean_over_time(steps):
    story.begin()
    totals = Totals()
    for seconds, running in steps:
        totals.add_step(seconds, running)
        story.tell(f"totals.add_step({seconds}, running={running})")
    got = outcome_of(totals).batch
    whole = sum(seconds for seconds, _ in steps)
    expected = sum(seconds * running for seconds, running in steps) / whole if steps else 0
    assert got == pytest.approx(expected), (
        f"over {whole:.3g} s {expected:.4g} requests ran on the mean, not {got:.4g}: a step that "
        "takes longer counts for more"
    )


@pytest.mark.task("16.2")
@given(looks=st.lists(st.tuples(st.integers(0, 16), st.booleans()), max_size=8))
def test_the_memory_is_looked_at_while_somebody_waits(looks):
    story.begin()
    totals = Totals()
    for states, waits in looks:
        totals.add_memory(MemoryUse(states=states, external=16 - states), waits)
        story.tell(
            f"totals.add_memory(MemoryUse(states={states}, external={16 - states}), {waits})"
        )
    got = outcome_of(totals).memory
    chosen = [states for states, waits in looks if waits] or [states for states, _ in looks]
    expected = sum(chosen) / max(1, len(chosen))
    assert got.states == pytest.approx(expected), (
        f"the mean of {chosen} is {expected:.4g} states, not {got.states:.4g}: looks while "
        "somebody waits, or all where nobody ever did"
    )
    assert got.external == pytest.approx(16 - expected if chosen else 0)


@pytest.mark.task("16.2")
def test_a_million_requests_take_no_more_memory_than_a_few():
    story.begin("20,000 requests with latencies of 0.01 to 10 seconds per token")
    totals = Totals()
    for number in range(20_000):
        totals.add_request(0.01 * 1000 ** (number / 20_000), 1)
    kept = sum(len(value) for value in vars(totals).values() if hasattr(value, "__len__"))
    assert kept < 1000, f"{kept} numbers are kept; sums and a histogram need a few hundred"
    assert outcome_of(totals).requests == 20_000


# 16.3: figure 2

prompts = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=4)


def check_parts(use, slots, states, reserved, internal):
    external = slots - states - reserved - internal
    for part, expected, why in (
        ("states", states, "slots that hold a token"),
        ("reserved", reserved, "slots that a sequence will fill before it ends"),
        ("internal", internal, "slots of a sequence that it will never fill"),
        ("external", external, "slots that belong to nobody, or are lost by rounding"),
    ):
        got = getattr(use, part)
        assert got == expected, f"{part} are {expected} slots, not {got}: {why}"
    assert use.total == slots, f"the parts are {slots} slots together, not {use.total}"


@pytest.mark.task("16.3")
@given(sequences=prompts, block_size=st.integers(1, 5), fork=st.booleans(), swap=st.booleans())
def test_with_paging_only_last_blocks_have_empty_slots(sequences, block_size, fork, swap):
    manager = BlockManager(block_size, 60, 60)
    story.begin(f"paging, 60 blocks of {block_size} tokens")
    for seq_id, (tokens, _) in enumerate(sequences):
        manager.append(seq_id, tokens)
        story.tell(
            f"sequence {name(seq_id)} has {tokens} tokens", f"{manager.tables[seq_id].blocks}"
        )
    final = {seq_id: sum(lengths) for seq_id, lengths in enumerate(sequences)}
    on_device = dict(enumerate(tokens for tokens, _ in sequences))
    if sequences and fork:
        manager.fork(0, 50)
        story.tell("a fork of A shares its blocks")
        final[50] = final[0]
    if len(sequences) > 1 and swap:
        manager.swap_out([1])
        story.tell("B is swapped out to the host")
        del on_device[1]
    used = sum(-(-tokens // block_size) * block_size for tokens in on_device.values())
    states = sum(on_device.values())
    check_parts(memory_use(manager, final), 60 * block_size, states, 0, used - states)


@pytest.mark.task("16.3")
@given(
    sequences=prompts, block_size=st.integers(1, 5), policy=st.sampled_from(sorted(RESERVATIONS))
)
def test_a_reservation_has_slots_for_later_and_slots_for_nothing(sequences, block_size, policy):
    context = 32
    manager = ReservationManager(block_size, 256, policy, context)
    story.begin(f"{policy}, 256 blocks of {block_size} tokens, a context of {context}")
    states = reserved = internal = 0
    final_lengths = {}
    for seq_id, (tokens, more) in enumerate(sequences):
        final = final_lengths[seq_id] = tokens + more
        manager.expect(seq_id, tokens, final, 1)
        manager.append(seq_id, tokens)
        # What the policy gives it: the output counts one token more, which needs no slot.
        given_slots = max(RESERVATIONS[policy](tokens, more + 1, context), final)
        story.tell(
            f"sequence {name(seq_id)}: {tokens} tokens now, {final} in the end",
            f"{given_slots} slots were reserved",
        )
        states += tokens
        reserved += more
        internal += given_slots - final
    use = memory_use(manager, final_lengths)
    check_parts(use, 256 * block_size, states, reserved, internal)


@pytest.mark.task("16.3")
@given(parts=st.lists(st.integers(0, 50), min_size=4, max_size=4))
def test_shares_are_percent_of_the_whole(parts):
    story.begin()
    story.tell(f"MemoryUse({', '.join(map(str, parts))}).shares()")
    shares = MemoryUse(*parts).shares()
    for number, part in enumerate(("states", "reserved", "internal", "external")):
        expected = 100 * parts[number] / (sum(parts) or 1)
        assert shares[part] == pytest.approx(expected), (
            f"{part}: {parts[number]} of {sum(parts)} slots, {expected:.1f} %, not {shares[part]}"
        )


# 16.4: how long a step takes


def scheduled(n, computed=0):
    return ScheduledSequence(0, (0,) * n, computed, (), samples=True)


@pytest.mark.task("16.4")
@given(chunks=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_chunks_make_as_many_pairs_as_the_whole(chunks):
    story.begin(f"a prompt of {sum(chunks)} tokens in chunks of {chunks}")
    work, computed = StepWork(), 0
    for n in chunks:
        work.add([scheduled(n, computed)])
        computed += n
        story.tell(f"work.add: {n} tokens behind {computed - n}", f"pairs {work.pairs:g} in all")
    assert work.tokens == computed, f"{computed} tokens go through the layers, not {work.tokens}"
    seen = sum(itertools.accumulate(chunks))
    assert work.context_tokens == seen, (
        f"each chunk reads all tokens up to its own last one, {seen} together, not "
        f"{work.context_tokens}"
    )
    # With or without the half of the diagonal.
    low, high = computed**2 / 2, computed * (computed + 1) / 2
    assert low - 1e-9 <= work.pairs <= high + 1e-9, (
        f"a prompt of {computed} tokens makes {low:g} to {high:g} pairs, in one piece or in "
        f"chunks, not {work.pairs:g}"
    )


@pytest.mark.task("16.4")
@given(contexts=st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_every_sequence_of_a_step_is_counted(contexts):
    story.begin(f"one new token each, behind {contexts}")
    work = StepWork()
    work.add([scheduled(1, computed) for computed in contexts])
    assert work.tokens == len(contexts)
    assert work.context_tokens == sum(contexts) + len(contexts), (
        "the context of a decoding sequence are the tokens before it and itself"
    )


SMALL = Deployment(ModelSize(1e9, 4, 64, 64, 512), GPUS["A100-40GB"], 1, 2048)
TWO_GPUS = dataclasses.replace(SMALL, num_gpus=2)
works = st.builds(
    StepWork,
    tokens=st.integers(0, 4000),
    context_tokens=st.sampled_from([0, 10_000, 10**8]),
    pairs=st.sampled_from([0.0, 1e7, 1e12]),
    copied_blocks=st.integers(0, 3),
    moved_blocks=st.integers(0, 3),
)


@pytest.mark.task("16.4")
@given(work=works, deployment=st.sampled_from([SMALL, TWO_GPUS, DEPLOYMENTS["opt-175b"]]))
def test_a_step_takes_the_sum_of_its_parts(work, deployment):
    cost = CostModel(deployment, 16)
    parts = {
        "reading all weights": cost._weights,
        "computing the layers": work.tokens * cost._token,
        "reading keys and values": work.context_tokens * cost._context_token,
        "computing the attention": work.pairs * cost._pair,
        "all-reduces": cost._reduce + work.tokens * cost._reduce_token,
        "copying blocks": work.copied_blocks * cost._copy,
        "swapping blocks": work.moved_blocks * cost._move,
    }
    story.begin(f"{deployment.num_gpus} GPUs, {work}")
    for what, seconds in parts.items():
        story.tell(f"{what:26}{1000 * seconds:10.4f} ms")
    layers = max(parts["reading all weights"], parts["computing the layers"])
    attention = max(parts["reading keys and values"], parts["computing the attention"])
    others = parts["all-reduces"] + parts["copying blocks"] + parts["swapping blocks"]
    expected = layers + attention + others
    got = cost.seconds(work)
    assert got == pytest.approx(expected), (
        f"the step takes {1000 * expected:.4f} ms, not {1000 * got:.4f}: the slower of each pair, "
        "reading or computing, and all the rest"
    )


@pytest.mark.task("16.4")
def test_a_batch_is_free_until_the_arithmetic_is_slower_than_the_memory():
    story.begin("OPT-13B on an A100, by its data sheet")
    cost = CostModel(DEPLOYMENTS["opt-13b"], 16)
    reading = 26e9 / (1555e9 * READ_EFFICIENCY)
    for tokens in (1, 100, 4096):
        computing = 2 * 13e9 * tokens / (312e12 * MATMUL_EFFICIENCY)
        got = cost.seconds(StepWork(tokens=tokens))
        story.tell(f"{tokens} tokens, no context", f"{1000 * got:.1f} ms")
        assert got == pytest.approx(max(reading, computing), rel=0.01), (
            f"{tokens} tokens read 26 GB of weights in {1000 * reading:.1f} ms and compute for "
            f"{1000 * computing:.1f} ms; the step takes {1000 * got:.1f} ms"
        )


# 16.5: where a system is saturated


@dataclasses.dataclass
class Served:
    """What the sweep needs of an outcome."""

    latency: float
    batch: float


class Curve:
    """In the place of `serve`: a latency that is known, and how often it was asked for."""

    def __init__(self, knee, steepness, limit):
        self.knee, self.steepness, self.limit = knee, steepness, limit
        self.rates = []
        self.asked = []

    def __call__(self, deployment, workload, rate, seconds, system):
        # The limit is crossed at the knee.
        latency = self.limit / 10 * (1 + 9 * (rate / self.knee) ** self.steepness)
        self.rates.append(rate)
        self.asked.append((deployment, workload, seconds, system))
        verdict = "too much" if latency >= self.limit else "sustained"
        story.tell(f"serve at {rate:.4g} requests/s", f"{latency:.4g} s/token, {verdict}")
        if len(self.rates) > 60:
            raise AssertionError("60 rates were served and no knee was found: does it end?")
        return Served(latency, 2 * rate)


def run_sweep(knee, steepness, start, limit=0.5):
    curve = Curve(knee, steepness, limit)
    story.begin(f"the limit of {limit} s/token is reached at {knee:.4g}; sweep from {start:.4g}")
    system = {"memory_policy": "orca-max"}
    with mock.patch.object(sweep_module, "serve", curve):
        result = sweep_module.sweep("opt-13b", "sharegpt", start, 60.0, system, limit)
    return curve, result


knees = st.floats(0.05, 40)
sweeps = given(
    knee=knees, steepness=st.floats(1.5, 20), ratio=st.sampled_from([0.02, 0.3, 0.9, 1.0, 1.4, 30])
)


@pytest.mark.task("16.5")
@sweeps
def test_the_knee_is_found(knee, steepness, ratio):
    curve, result = run_sweep(knee, steepness, knee * ratio)
    got = result["sustained"]
    assert knee / 1.08 <= got <= knee * 1.08, f"sustained is {got:.4g}, and {knee:.4g} is right"
    low = max((r for r in curve.rates if r < knee * (1 - 1e-12)), default=None)
    high = min((r for r in curve.rates if r >= knee * (1 - 1e-12)), default=None)
    assert low is not None, "no rate was tried that is sustained: go down from the start"
    assert high is not None, "no rate was tried that is too much: go up from the start"
    assert high / low <= 1.0701, f"between {low:.4g} and {high:.4g} lie more than 7 %"
    assert low * 0.999 <= got <= high * 1.001, (
        f"the knee lies between {low:.4g} and {high:.4g}, and {got:.4g} does not"
    )


@pytest.mark.task("16.5")
@sweeps
def test_few_rates_are_tried_and_all_of_them_reported(knee, steepness, ratio):
    curve, result = run_sweep(knee, steepness, knee * ratio)
    assert len(set(curve.rates)) == len(curve.rates), "a rate was served twice; keep its outcome"
    most = 10 + 2 * abs(math.log2(ratio))
    assert len(curve.rates) <= most, (
        f"{len(curve.rates)} rates were served, where {most:.0f} are enough: grow or shrink by a "
        "factor, then halve"
    )
    rates = [rate for rate, _, _ in result["points"]]
    assert rates == sorted(curve.rates), "points have every rate that was served, in order"
    for rate, latency, batch in result["points"]:
        expected = curve.limit / 10 * (1 + 9 * (rate / knee) ** steepness)
        assert latency == pytest.approx(expected), "the second of a point is its latency"
        assert batch == pytest.approx(2 * rate), "the third of a point is its mean batch"
    wanted = (DEPLOYMENTS["opt-13b"], "sharegpt", 60.0, System(memory_policy="orca-max"))
    assert all(asked == wanted for asked in curve.asked), "serve what was asked for, at each rate"
