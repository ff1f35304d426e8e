"""The engine without its model: real scheduler, real block manager, and a clock that is computed.

Discrete events: requests arrive, steps end.  Every step is planned as in the engine, and the
cost model says how long it would have taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.evaluation.arrivals import TimedRequest
from minipaged.evaluation.cost_model import CostModel, Deployment, StepWork
from minipaged.evaluation.memory_use import memory_use
from minipaged.evaluation.outcome import Outcome, Totals
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.memory.reservation import ReservationManager
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence, SequenceGroup
from minipaged.scheduling.policy import policy_named
from minipaged.scheduling.preemption import Preemption, PreemptionCosts, PreemptionMode
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.step_plan import StepPlan, default_budget

MEMORY_EVERY = 16  # steps from one look at the memory to the next

# Share of the beams that give way to a fork of another one in a step: as the shipped model's do
# in `minipaged bench sharing`, by the width of the search.
REPLACED_BEAMS = {2: 0.18, 4: 0.28, 6: 0.31}


@dataclass(frozen=True, kw_only=True)
class System:
    """What is simulated.

    width: samples or beams of every request.
    beam_search: whether they are beams.
    prompts_apart: compute the prompts of a step in a pass of their own, as vLLM did when the paper
        was written; every pass reads all weights.
    """

    memory_policy: str = "paged"
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    policy: str = "fcfs"
    preemption: PreemptionMode = "recompute"
    prefix_caching: bool = False
    width: int = 1
    beam_search: bool = False
    prompts_apart: bool = False


class Simulation:
    """One system on one deployment."""

    def __init__(self, system: System, deployment: Deployment, seed: int = 0) -> None:
        self.system, self.deployment = system, deployment
        self.cost = CostModel(deployment, system.block_size)
        self.context_length = deployment.model.context_length
        if system.beam_search and system.width not in REPLACED_BEAMS:
            raise ConfigurationError(
                f"the beam width is {system.width}; it is known how beams of "
                f"{', '.join(map(str, REPLACED_BEAMS))} fork"
            )
        self.manager = self._block_manager(seed)
        budget = system.max_num_batched_tokens
        if budget is None:
            slots = deployment.kv_slots if system.memory_policy == "static" else 0
            budget = default_budget(system.max_num_seqs, system.block_size, slots)
        costs = PreemptionCosts(self.cost.move_block, self.cost.compute_token)
        self.scheduler = Scheduler(
            self.manager,
            system.max_num_seqs,
            budget,
            policy_named(system.policy),
            Preemption(system.preemption, costs),
            static_batches=system.memory_policy == "static",
        )
        self.clock = 0.0
        self._random = np.random.default_rng(seed)
        self.num_steps = 0
        self._groups: dict[int, _Group] = {}  # by the id of every sequence that is alive
        self._num_sequences = self._num_requests = 0
        self._totals = Totals()

    def _block_manager(self, seed: int) -> BlockManager:
        system = self.system
        num_blocks = self.deployment.kv_slots // system.block_size
        if system.memory_policy != "paged":
            if system.prefix_caching or system.preemption != "recompute":
                raise ConfigurationError(
                    f"memory policy {system.memory_policy!r} neither shares nor swaps; choose "
                    '"paged" for prefix caching and swapping'
                )
            return ReservationManager(
                system.block_size, num_blocks, system.memory_policy, self.context_length
            )
        cache = PrefixCache(system.block_size, seed) if system.prefix_caching else None
        host = 0 if system.preemption == "recompute" else num_blocks
        return BlockManager(system.block_size, num_blocks, host, prefix_cache=cache)

    def run(
        self,
        requests: Iterable[TimedRequest],
        progress: Callable[[int, float], None] | None = None,
    ) -> Outcome:
        """Serve all of them; they come in the order of their arrival.

        progress: told now and then how many requests have ended, and the clock.
        """
        start = time.perf_counter()
        pending = iter(requests)
        following = next(pending, None)
        while following is not None or self.scheduler.has_unfinished:
            if not self.scheduler.has_unfinished:
                assert following is not None
                self._totals.add_step(max(0.0, following.arrival - self.clock), 0)  # nobody runs
                self.clock = max(self.clock, following.arrival)
            following = self._admit(following, pending)
            if self.scheduler.has_unfinished:
                self._step(arriving=following is not None)
            if progress is not None and self.num_steps % 256 == 0:
                progress(self._totals.requests, self.clock)
        cache = self.manager.prefix_cache
        return self._totals.outcome(
            preemptions=self.scheduler.num_preemptions,
            hit_tokens=cache.num_hit_tokens if cache is not None else 0,
            steps=self.num_steps,
            simulated=self.clock,
            real=time.perf_counter() - start,
        )

    def _admit(
        self, following: TimedRequest | None, pending: Iterator[TimedRequest]
    ) -> TimedRequest | None:
        """Queue everybody who has arrived; returns the first who has not."""
        while following is not None and following.arrival <= self.clock:
            self._add(following)
            last = following.arrival
            following = next(pending, None)
            if following is not None and following.arrival < last:
                raise InvalidRequestError(
                    f"a request arrives at {following.arrival:g} s, behind one that arrives at "
                    f"{last:g} s; sort the requests by arrival"
                )
        return following

    def _add(self, request: TimedRequest) -> None:
        params = SamplingParams(
            n=self.system.width,
            max_tokens=request.output,
            temperature=0 if self.system.beam_search else 1,
            use_beam_search=self.system.beam_search,
            ignore_eos=True,
        )
        seq_id = self._new_id()
        sequence = Sequence(seq_id, request.token_ids(own=_own_token(seq_id)))
        group = _Group(request, str(self._num_requests), [sequence], params, self._num_requests)
        self._num_requests += 1
        in_cache = request.prompt + request.output - 1
        try:
            if in_cache >= self.context_length:
                raise InvalidRequestError("longer than the model's context")
            self.scheduler.add(group, in_cache)
        except InvalidRequestError:
            self._totals.refused += 1
            return
        self._groups[sequence.seq_id] = group

    def _new_id(self) -> int:
        self._num_sequences += 1
        return self._num_sequences - 1

    def _step(self, arriving: bool) -> None:
        scheduler, totals = self.scheduler, self._totals
        plan = scheduler.schedule()
        waits = bool(scheduler.waiting)
        running = len(scheduler.running)
        seconds = sum(self.cost.seconds(work) for work in self._passes(plan))
        self.clock += seconds
        if arriving:
            totals.add_step(seconds, running)
        if self.num_steps % MEMORY_EVERY == 0:
            totals.add_memory(memory_use(self.manager, self._final_lengths()), waits)
        self.num_steps += 1
        self._advance(plan)

    def _passes(self, plan: StepPlan) -> list[StepWork]:
        """What a step has to do: one pass over all tokens, or prompts and others apart."""
        raise NotImplementedError("Task 11.4: Simulation._passes is still to be written")

    def _advance(self, plan: StepPlan) -> None:
        """Give every sequence that has computed all its tokens one more, and end who is done."""
        groups = self._groups
        tracks = self.manager.tracks_contents
        ended, searching = [], []
        for item in plan.scheduled:
            group = groups[item.seq_id]
            (sequence,) = (
                group.sequences
                if len(group.sequences) == 1
                else [s for s in group.sequences if s.seq_id == item.seq_id]
            )
            sequence.num_computed_tokens = item.num_computed_tokens + len(item.token_ids)
            if tracks:
                self.manager.mark_computed(item.seq_id, sequence.token_ids)
            if not item.samples:
                continue
            grown = [sequence]
            if len(group.sequences) < group.params.width:
                self._fork(group, sequence)
                grown = group.sequences
            for each in grown:
                each.token_ids.append(_own_token(each.seq_id))
            if sequence is not group.sequences[-1] and grown is not group.sequences:
                continue  # its siblings follow
            if len(sequence.token_ids) == group.final_length:
                ended.append(group)
            elif group.params.use_beam_search:
                searching.append(group)
        for group in searching:
            self._replace_beams(group)
        for group in ended:
            self.scheduler.remove(group)
            for sequence in group.sequences:
                del groups[sequence.seq_id]
            request = group.request
            tokens = request.output * len(group.sequences)
            self._totals.add_request((self.clock - request.arrival) / request.output, tokens)

    def _fork(self, group: _Group, parent: Sequence) -> None:
        """Let a prompt that was just computed become the samples of its request."""
        group.has_forked = True
        for _ in range(1, group.params.width):
            self._fork_one(group, parent)

    def _fork_one(self, group: _Group, parent: Sequence) -> None:
        child = parent.fork(self._new_id())
        self.scheduler.fork(group, parent.seq_id, child)
        self._groups[child.seq_id] = group

    def _replace_beams(self, group: _Group) -> None:
        """Let some beams go, and fork one of the others in their place (section 4.4)."""
        beams = list(group.sequences)
        replaced = self._random.random(len(beams)) < REPLACED_BEAMS[len(beams)]
        staying = [beam for beam, goes in zip(beams, replaced, strict=True) if not goes]
        if not staying:
            return
        for beam, goes in zip(beams, replaced, strict=True):
            if goes:
                self._fork_one(group, staying[int(self._random.integers(len(staying)))])
                self.scheduler.drop(group, beam)
                del self._groups[beam.seq_id]

    def _final_lengths(self) -> dict[int, int]:
        """Tokens that each running sequence will have in the cache in the end."""
        return {
            sequence.seq_id: group.final_length - 1
            for group in self.scheduler.running
            for sequence in group.sequences
            if isinstance(group, _Group)
        }


def _own_token(seq_id: int) -> int:
    """What a sequence writes, and nobody else: its outputs are in no other one's prefix."""
    return -1 - seq_id


class _Group(SequenceGroup):
    """A sequence group that knows when it came and how long its outputs will be."""

    __slots__ = ("final_length", "request")

    def __init__(
        self,
        request: TimedRequest,
        request_id: str,
        sequences: list[Sequence],
        params: SamplingParams,
        arrival: int,
    ) -> None:
        super().__init__(request_id, sequences, params, arrival)
        self.request = request
        self.final_length = request.prompt + request.output
