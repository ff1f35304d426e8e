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
        self.requests += 1
        self.tokens += tokens
        self._latencies += latency
        place = math.floor(math.log(latency) / STEP)
        self._histogram[place] = self._histogram.get(place, 0) + 1

    def add_step(self, seconds: float, running: int) -> None:
        """Count a step during which requests still arrive."""
        self._arriving_seconds += seconds
        self._request_seconds += seconds * running

    def add_memory(self, use: MemoryUse, waits: bool) -> None:
        """Count a look at the memory; waits: whether a request waits for it."""
        self._memory[waits] = self._memory[waits] + use
        self._looks[waits] += 1

    def outcome(
        self, preemptions: int, hit_tokens: int, steps: int, simulated: float, real: float
    ) -> Outcome:
        """All of it, at the end."""
        full = self._looks[True] > 0
        arriving = self._arriving_seconds
        return Outcome(
            requests=self.requests,
            refused=self.refused,
            tokens=self.tokens,
            latency=self._latencies / max(1, self.requests),
            p99=self._p99(),
            batch=self._request_seconds / arriving if arriving else 0.0,
            preemptions=preemptions,
            memory=self._memory[full] / max(1, self._looks[full]),
            hit_tokens=hit_tokens,
            steps=steps,
            simulated=simulated,
            real=real,
        )

    def _p99(self) -> float:
        left = self.requests - self.requests // 100
        for place in sorted(self._histogram):
            left -= self._histogram[place]
            if left <= 0:
                return math.exp((place + 1) * STEP)
        return 0.0
