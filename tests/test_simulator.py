"""The simulator: clocks and counts that can be computed by hand, and laws that any run obeys."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.evaluation.arrivals import (
    CHAT_TOKENS,
    DATASETS,
    TimedRequest,
    poisson_requests,
)
from minipaged.evaluation.cost_model import (
    DEPLOYMENTS,
    GPUS,
    MATMUL_EFFICIENCY,
    READ_EFFICIENCY,
    CostModel,
    Deployment,
    ModelSize,
    StepWork,
    deployment_named,
    read_deployment,
)
from minipaged.evaluation.simulator import Simulation, System
from minipaged.memory.reservation import RESERVATIONS

SMALL = Deployment(ModelSize(1e9, 4, 64, 64, 512), GPUS["A100-40GB"], 1, 2048)
POLICIES = [*RESERVATIONS, "paged"]

timed_requests = st.lists(
    st.builds(
        TimedRequest,
        st.floats(0, 0.3).map(lambda x: round(x, 3)),
        st.integers(1, 200),
        st.integers(1, 100),
        st.sampled_from([(), ((1, 40),), ((1, 40), (2, 100)), ((3, 16),)]),
    ),
    min_size=1,
    max_size=30,
).map(sorted)


def test_the_clock_of_one_request():
    """A prompt of 100 tokens and 3 of output: one step for the prompt, two for the others."""
    outcome = Simulation(System(), SMALL).run([TimedRequest(5.0, 100, 3)])
    bandwidth = 1555e9 * READ_EFFICIENCY
    weights, per_token = 2e9 / bandwidth, 2 * 4 * 64 * 2 / bandwidth
    steps = [weights + context * per_token for context in (100, 101, 102)]
    assert outcome.simulated == pytest.approx(5 + sum(steps))
    assert outcome.latency == pytest.approx(sum(steps) / 3)
    assert (outcome.requests, outcome.tokens, outcome.steps) == (1, 3, 3)


def test_large_steps_are_bound_by_arithmetic():
    model = CostModel(DEPLOYMENTS["opt-13b"], 16)
    one, many = model.seconds(StepWork(1, 1, 0)), model.seconds(StepWork(4096, 4096, 0))
    assert one == pytest.approx(26e9 / (1555e9 * READ_EFFICIENCY), rel=1e-3)
    assert many == pytest.approx(2 * 13e9 * 4096 / (312e12 * MATMUL_EFFICIENCY), rel=1e-2)


@settings(max_examples=40)
@given(
    requests=timed_requests,
    policy=st.sampled_from(POLICIES),
    width=st.sampled_from([1, 1, 2, 4]),
    beams=st.booleans(),
    swaps=st.booleans(),
    prefixes=st.booleans(),
    apart=st.booleans(),
)
def test_every_request_is_served_once(requests, policy, width, beams, swaps, prefixes, apart):
    """Whatever is simulated: nobody is lost, no block is, and nobody ends before it can."""
    paged = policy == "paged"
    system = System(
        memory_policy=policy,
        width=width,
        beam_search=beams and width > 1,
        preemption="swap" if swaps and paged else "recompute",
        prefix_caching=prefixes and paged,
        prompts_apart=apart,
    )
    simulation = Simulation(system, SMALL)
    outcome = simulation.run(requests)
    assert outcome.requests + outcome.refused == len(requests)
    served = outcome.requests
    if policy == "paged" or width == 1:
        assert outcome.refused == 0
        assert outcome.tokens == width * sum(request.output for request in requests)
    least = simulation.cost.seconds(StepWork(1, 1, 0))
    assert served == 0 or outcome.latency >= least * 0.999
    assert simulation.manager.device.num_used == simulation.manager.host.num_used == 0
    assert not simulation._groups
    simulation.scheduler.check_integrity()
    shares = outcome.memory.shares()
    assert all(share >= 0 for share in shares.values()), shares
    if simulation.num_steps and paged:
        assert shares["reserved"] == 0


@settings(max_examples=20)
@given(prompt=st.integers(1, 200), output=st.integers(50, 200))
def test_whoever_reserves_less_serves_no_later(prompt, output):
    """Thirty requests at once, all alike."""
    requests = [TimedRequest(0.0, prompt, output) for _ in range(30)]
    paged, oracle, most, static = (
        Simulation(System(memory_policy=policy), SMALL).run(requests).simulated
        for policy in ("paged", "orca-oracle", "orca-max", "static")
    )
    assert max(paged, oracle) <= most * 1.01
    assert most <= static * 1.01


def test_prompts_apart_read_the_weights_twice():
    requests = [TimedRequest(0, 30, 50), TimedRequest(0.01, 30, 50)]
    together = Simulation(System(), SMALL).run(requests)
    apart = Simulation(System(prompts_apart=True), SMALL).run(requests)
    weights = 2e9 / (1555e9 * READ_EFFICIENCY)
    assert apart.simulated - together.simulated == pytest.approx(weights, rel=0.01)


def test_shared_prefixes_are_found():
    requests = [TimedRequest(i, 100, 5, ((7, 80),)) for i in range(10)]
    outcome = Simulation(System(prefix_caching=True), SMALL).run(requests)
    assert outcome.hit_tokens == 9 * 80


def test_samples_share_no_outputs_in_the_prefix_cache():
    """Samples write different texts, so that behind the prompt nothing is found to be shared.

    Requests without a common prefix then need the same memory with and without the cache.
    """
    large = dataclasses.replace(SMALL, kv_slots=20_000)  # nobody is preempted
    requests = [TimedRequest(0.0, 32, 128) for _ in range(20)]
    without, cached = (
        Simulation(System(width=4, prefix_caching=prefix_caching), large).run(requests)
        for prefix_caching in (False, True)
    )
    assert without.hit_tokens == cached.hit_tokens == 0
    assert cached.memory.states == pytest.approx(without.memory.states, rel=0.1)
    assert cached.simulated == pytest.approx(without.simulated, rel=0.1)


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("beam_search", [False, True])
def test_what_stands_in_front_of_a_fork_stays_shared(beam_search, prefix_caching):
    """And behind it every sequence has tokens and blocks of its own."""
    system = System(width=2, beam_search=beam_search, prefix_caching=prefix_caching)
    simulation = Simulation(system, SMALL)
    simulation._add(TimedRequest(0.0, 32, 200))
    forks = set()
    for _ in range(100):
        simulation._step(arriving=False)
        one, other = next(iter(simulation._groups.values())).sequences
        assert len(one.token_ids) == len(other.token_ids)
        alike = [a == b for a, b in zip(one.token_ids, other.token_ids, strict=True)]
        fork = alike.index(False) if False in alike else len(alike)
        forks.add(fork)
        assert not any(alike[fork:])
        first, second = (simulation.manager.tables[s.seq_id].blocks for s in (one, other))
        # A beam is forked when its last token is drawn but not computed: both compute that one.
        full = (fork - beam_search) // system.block_size
        assert first[:full] == second[:full]
        assert not set(first[full + 1 :]) & set(second[full + 1 :])
    assert len(forks) > 10 if beam_search else forks == {32}


def test_a_step_has_room_for_all_that_may_run():
    """As in the engine: more sequences than tokens of a step are no mistake by themselves."""
    simulation = Simulation(System(max_num_seqs=3000), DEPLOYMENTS["llama-3-8b"])
    assert simulation.scheduler.max_num_batched_tokens == 3000
    outcome = simulation.run([TimedRequest(0.0, 5, 5) for _ in range(10)])
    assert outcome.requests == 10
    asked = Simulation(System(max_num_batched_tokens=64, max_num_seqs=32), SMALL)
    assert asked.scheduler.max_num_batched_tokens == 64, "what is asked for counts"
    with pytest.raises(ConfigurationError, match="max_num_batched_tokens is 64, below"):
        Simulation(System(max_num_batched_tokens=64, max_num_seqs=65), SMALL)


def test_memory_stays_bounded_and_the_cost_of_a_token_flat():
    """What is kept does not grow with the requests that have ended."""
    simulation = Simulation(System(), SMALL)
    lengths = np.random.default_rng(0).integers(1, 30, (3000, 2)).tolist()
    most = 0

    def watch(ended, clock):
        nonlocal most
        most = max(most, len(simulation._groups))

    simulation.run((TimedRequest(i / 500, p, o) for i, (p, o) in enumerate(lengths)), watch)
    assert 0 < most < 300
    assert len(simulation._totals._histogram) < 500


class TestArrivals:
    @pytest.mark.parametrize("dataset", ["sharegpt", "alpaca"])
    def test_rates_and_means_are_those_of_the_paper(self, dataset):
        requests = list(poisson_requests(dataset, 50.0, 1000, 2048, 0))
        assert len(requests) == pytest.approx(50_000, rel=0.02)
        gaps = np.diff([request.arrival for request in requests])
        assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03), "exponential"
        for name in ("prompt", "output"):
            mean = np.mean([getattr(request, name) for request in requests])
            assert mean == pytest.approx(getattr(DATASETS[dataset], name), rel=0.05)

    def test_a_chat_keeps_its_last_tokens(self):
        requests = list(poisson_requests("chat", 50.0, 100, 2048, 0))
        prompts = [request.prompt for request in requests]
        assert max(prompts) < CHAT_TOKENS
        assert sum(p == CHAT_TOKENS - 1 for p in prompts) > len(prompts) / 2

    def test_examples_stand_in_front_of_a_translation(self):
        for request in poisson_requests("translation-5", 50.0, 10, 2048, 0):
            assert request.token_ids(-1)[:342] == [0] * 341 + [-1]
            assert request.prompt > 341

    @pytest.mark.parametrize("rate", [0, -1, math.inf, math.nan])
    def test_a_rate_that_cannot_be(self, rate):
        with pytest.raises(ConfigurationError, match=r"rate is .* above 0"):
            next(poisson_requests("alpaca", rate, 10, 2048, 0))

    def test_an_unknown_dataset(self):
        with pytest.raises(ConfigurationError, match="no dataset 'news'; choose sharegpt, alpaca"):
            next(poisson_requests("news", 1, 10, 2048, 0))


def test_the_mean_batch_is_littles_law():
    """What runs on average is the rate times the time in the system, idle times included."""
    requests = [TimedRequest(100.0 * i, 50, 20) for i in range(30)]
    outcome = Simulation(System(), SMALL).run(requests)
    assert outcome.batch == pytest.approx(outcome.latency * 20 / 100, rel=1e-6)


class TestErrors:
    def test_requests_that_run_back(self):
        requests = [TimedRequest(1.0, 5, 5), TimedRequest(0.5, 5, 5)]
        with pytest.raises(InvalidRequestError, match=r"at 0\.5 s, behind one .* 1 s; sort"):
            Simulation(System(), SMALL).run(requests)

    def test_an_unknown_deployment(self):
        with pytest.raises(ConfigurationError, match="no deployment 'gpt-5'; choose one of opt"):
            deployment_named("gpt-5")

    def test_a_deployment_from_a_file(self, tmp_path):
        path = tmp_path / "mine.json"
        entry = {"model": dataclasses.asdict(SMALL.model), "gpu": "A100-40GB", "num_gpus": 1}
        path.write_text(json.dumps({**entry, "kv_slots": 2048}))
        assert read_deployment(path) == SMALL
        path.write_text(json.dumps({**entry, "gpu": "GTX-9", "kv_slots": 2048}))
        with pytest.raises(ConfigurationError, match="no GPU 'GTX-9'; it knows A100-40GB"):
            read_deployment(path)
        path.write_text(json.dumps({**entry, "kv_slots": 0}))
        with pytest.raises(ConfigurationError, match="kv_slots is 0; it must be a number above 0"):
            read_deployment(path)
        path.write_text(json.dumps({**entry, "kv_slots": 4e5}))
        with pytest.raises(ConfigurationError, match=r"kv_slots is 400000.0; it must be a whole"):
            read_deployment(path)
        path.write_text(json.dumps(entry))
        with pytest.raises(ConfigurationError, match=r"describes no deployment: .*kv_slots"):
            read_deployment(path)

    def test_contiguous_memory_neither_shares_nor_swaps(self):
        with pytest.raises(ConfigurationError, match="'orca-max' neither shares nor swaps"):
            Simulation(System(memory_policy="orca-max", prefix_caching=True), SMALL)

    def test_a_beam_width_of_which_nothing_is_known(self):
        with pytest.raises(ConfigurationError, match="beam width is 3; it is known how beams of 2"):
            Simulation(System(width=3, beam_search=True), SMALL)
