"""The whole engine under a state machine: requests of every kind come, go and are aborted.

T2, T3, T5 and T6 after every step (`check_integrity`, with freed blocks poisoned), T4 for every
request that ends.  The number of steps of the long life is MINIPAGED_STEPS.
"""

import dataclasses
import os
import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from strategies import VOCAB, Request, Workload, check_output, requests

from minipaged.errors import InvalidRequestError
from minipaged.request.sampling_params import SamplingParams


class Life:
    """An engine and what it was asked for."""

    def __init__(self, workload):
        self.workload = workload
        self.engine = workload.engine()
        self.asked = {}  # request id -> (request, number of its arrival)
        self.num_accepted = self.num_finished = 0

    def add(self, request):
        """Ask for it, if the policy and the pool allow it; a refusal changes nothing."""
        if self.workload.policy == "fcfs":
            request = dataclasses.replace(request, priority=0)
        number = self.num_accepted
        try:
            self.engine.add_request(
                str(number), request.prompt, SamplingParams(**request.params), request.priority
            )
        except InvalidRequestError:
            return
        self.asked[str(number)] = request, number
        self.num_accepted += 1

    def step(self):
        for output in self.engine.step():
            if output.finished:
                request, number = self.asked.pop(output.request_id)
                expected = request.expected(self.workload.decoder, number)
                check_output(request, output, expected)
                self.num_finished += 1
        self.engine.check_integrity()

    def abort(self, index):
        request_id = list(self.asked)[index % len(self.asked)]
        request, number = self.asked.pop(request_id)
        output = self.engine.abort(request_id)
        assert output.finished
        if not request.params.get("use_beam_search"):
            expected = [tokens for tokens, _ in request.expected(self.workload.decoder, number)]
            for completion in output.outputs:
                tokens = completion.token_ids
                assert tokens in [whole[: len(tokens)] for whole in expected]
        self.engine.check_integrity()

    def end(self):
        """Everything that was asked for ends, and nothing is left (T5, T6)."""
        steps = 0
        while self.engine.has_unfinished_requests:
            self.step()
            steps += 1
            assert steps < 3000, "the engine does not come to an end"
        assert not self.asked
        manager = self.engine.scheduler.manager
        assert manager.device.num_used == manager.host.num_used == 0


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.integers(1, 5),
        num_blocks=st.integers(8, 30),
        max_num_seqs=st.integers(1, 10),
        extra=st.integers(0, 20),
        preemption=st.sampled_from(["recompute", "swap", "auto"]),
        num_host_blocks=st.integers(1, 30),
        special=st.sampled_from(["cache", "cache", None, 3, 6]),
        attention=st.sampled_from(["torch", "torch", "reference", "native", "emulated"]),
        policy=st.sampled_from(["fcfs", "priority"]),
    )
    def build(
        self,
        block_size,
        num_blocks,
        max_num_seqs,
        extra,
        preemption,
        num_host_blocks,
        special,
        attention,
        policy,
    ):
        self.life = Life(
            Workload(
                (),
                block_size,
                num_blocks,
                max_num_seqs,
                max(max_num_seqs, block_size) + extra,
                attention,
                preemption=preemption,
                num_host_blocks=num_host_blocks,
                prefix_caching=special == "cache",
                sliding_window=special if isinstance(special, int) else None,
                policy=policy,
            )
        )

    @rule(request=requests)
    def add(self, request):
        self.life.add(request)

    @rule(steps=st.integers(1, 5))
    def step(self, steps):
        for _ in range(steps):
            self.life.step()

    @precondition(lambda self: self.life.asked)
    @rule(index=st.integers(0, 30))
    def abort(self, index):
        self.life.abort(index)

    @invariant()
    def all_agree(self):
        if hasattr(self, "life"):
            self.life.engine.check_integrity()

    def teardown(self):
        if hasattr(self, "life"):
            self.life.end()


class TestEngine(EngineMachine.TestCase):
    settings = settings(stateful_step_count=30, max_examples=settings().max_examples // 2)


def random_request(rng):
    """A request of any kind; a third of the prompts begin alike."""
    prompt = rng.choices(range(VOCAB), k=rng.randint(1, 18))
    if rng.random() < 0.33:
        prompt = [*range(1, rng.randint(2, 12)), *prompt[:4]]
    params = {"max_tokens": rng.randint(1, 14), "ignore_eos": rng.random() < 0.7}
    kind = rng.choice(["greedy", "sampled", "n", "best_of", "beams"])
    if kind in ("greedy", "beams"):
        params["temperature"] = 0.0
    if kind in ("n", "best_of"):
        params["n"] = rng.randint(2, 3)
    if kind == "best_of":
        params["best_of"] = 4
    if kind == "beams":
        params |= {"use_beam_search": True, "best_of": rng.randint(2, 4)}
        params["early_stopping"] = rng.choice([True, False, "never"])
        params["length_penalty"] = rng.choice([0.0, 1.0, 2.0])
    return Request(tuple(prompt), params, priority=rng.randint(0, 2))


def random_workload(rng):
    """An engine of any kind, with a pool that is small."""
    special = rng.choice(["cache", "cache", None, 3, 6])
    block_size, max_num_seqs = rng.randint(1, 5), rng.randint(4, 12)
    num_blocks = rng.randint(36, 60) // block_size + 4
    return Workload(
        (),
        block_size,
        num_blocks,
        max_num_seqs,
        max(max_num_seqs, block_size) + rng.randint(0, 20),
        model_seed=rng.randint(0, 3),
        preemption=rng.choice(["recompute", "swap", "auto"]),
        num_host_blocks=rng.randint(1, num_blocks),
        prefix_caching=special == "cache",
        sliding_window=special if isinstance(special, int) else None,
        policy=rng.choice(["fcfs", "priority"]),
    )


def test_a_long_life():
    """Engines of random kinds, each loaded for 100 steps with more than it can take at once."""
    steps, seed = int(os.environ.get("MINIPAGED_STEPS", "600")), 0
    finished = recomputations = swaps = hits = 0
    while steps > 0:
        rng = random.Random(seed)
        life = Life(random_workload(rng))
        try:
            for _ in range(min(100, steps)):
                if len(life.asked) < 6:
                    life.add(random_request(rng))
                if life.asked and rng.random() < 0.03:
                    life.abort(rng.randrange(10))
                life.step()
            life.end()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {life.workload}") from error
        steps -= life.engine.num_steps
        seed += 1
        finished += life.num_finished
        recomputations += life.engine.scheduler.preemption.num_recomputations
        swaps += life.engine.scheduler.preemption.num_swaps
        cache = life.engine.scheduler.manager.prefix_cache
        hits += cache.num_hit_tokens if cache is not None else 0
    print(
        f"{seed} engines, {finished} requests finished, {recomputations} recomputations, "
        f"{swaps} swaps, {hits} tokens of prompts found in the prefix cache"
    )
    assert min(finished, recomputations, swaps, hits) > 0
