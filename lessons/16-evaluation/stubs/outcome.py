"""What a run of the simulator comes to.

Kept as sums and a histogram, so that a million requests take no more memory than those that are
served at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minipaged.evaluation.memory_use import MemoryUse

STEP = math.log(1.05)  # of the histogram of latencies


@dataclass(frozen=True)
class Outcome:
    """One run.

    latency: mean of (end - arrival) / output tokens, in seconds per token (the paper's
        normalized latency).
    p99: of the same, from a histogram with steps of 5 %.
    batch: mean number of running requests, over the time in which requests arrived.
    memory: mean use of the memory while requests waited for it, or over all if none ever did.
    simulated, real: seconds of the simulated machine, and of this one.
    """

    requests: int
    refused: int
    tokens: int
    latency: float
    p99: float
    batch: float
    preemptions: int
    memory: MemoryUse
    hit_tokens: int
    steps: int
    simulated: float
    real: float

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per simulated second."""
        return self.tokens / self.simulated if self.simulated else 0.0


class Totals:
    """Sums over a run."""

    def __init__(self) -> None:
        self.requests = self.refused = self.tokens = 0
        self._latencies = self._arriving_seconds = self._request_seconds = 0.0
        self._histogram: dict[int, int] = {}
        self._memory = {True: MemoryUse(), False: MemoryUse()}
        self._looks = {True: 0, False: 0}

    def add_request(self, latency: float, tokens: int) -> None:
        """Count one that has ended, with its seconds per token."""
        raise NotImplementedError("Task 16.2: Totals.add_request is still to be written")

    def add_step(self, seconds: float, running: int) -> None:
        """Count a step during which requests still arrive."""
        raise NotImplementedError("Task 16.2: Totals.add_step is still to be written")

    def add_memory(self, use: MemoryUse, waits: bool) -> None:
        """Count a look at the memory; waits: whether a request waits for it."""
        raise NotImplementedError("Task 16.2: Totals.add_memory is still to be written")

    def outcome(
        self, preemptions: int, hit_tokens: int, steps: int, simulated: float, real: float
    ) -> Outcome:
        """All of it, at the end."""
        raise NotImplementedError("Task 16.2: Totals.outcome is still to be written")

    def _p99(self) -> float:
        raise NotImplementedError("Task 16.2: Totals._p99 is still to be written")
