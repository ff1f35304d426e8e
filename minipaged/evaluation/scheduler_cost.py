"""What one call of the scheduler costs, for growing numbers of running sequences; no model runs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from minipaged.memory.block_manager import BlockManager
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence, SequenceGroup
from minipaged.scheduling.scheduler import Scheduler

PROMPT_LENGTHS = range(16, 257)
BLOCK_SIZE = 16


@dataclass(frozen=True)
class SchedulerCost:
    """Median and largest time of one step's plan, in milliseconds."""

    num_seqs: int
    median_ms: float
    largest_ms: float

    @property
    def microseconds_per_sequence(self) -> float:
        """Cost of one sequence in one step."""
        return self.median_ms * 1000 / self.num_seqs


def measure_scheduler(num_seqs: int, steps: int) -> SchedulerCost:
    """Decode num_seqs sequences of mixed length for some steps, with blocks enough for all."""
    longest = PROMPT_LENGTHS[-1] + steps + 2
    manager = BlockManager(BLOCK_SIZE, num_seqs * -(-longest // BLOCK_SIZE))
    scheduler = Scheduler(manager, num_seqs, max_num_batched_tokens=num_seqs * longest)
    sequences = {}
    for i in range(num_seqs):
        sequences[i] = Sequence(i, range(PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)]))
        group = SequenceGroup(str(i), [sequences[i]], SamplingParams(), i)
        scheduler.add(group, longest)
    milliseconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        plan = scheduler.schedule()
        milliseconds.append((time.perf_counter() - start) * 1000)
        for item in plan.scheduled:
            sequence = sequences[item.seq_id]
            sequence.num_computed_tokens = item.context_length
            sequence.token_ids.append(0)
    decoding = milliseconds[1:]  # the first step admits all prompts
    return SchedulerCost(num_seqs, statistics.median(decoding), max(decoding))
