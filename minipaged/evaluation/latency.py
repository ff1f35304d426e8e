"""What one long prompt does to those who decode, for several token budgets (chunked prefill).

Some requests decode; after a while a long prompt arrives.  Computed in one step it stalls the
others for the whole of it; cut into chunks by max_num_batched_tokens it does not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from minipaged.engine.engine import Engine
from minipaged.request.sampling_params import SamplingParams


@dataclass(frozen=True)
class Latency:
    """Milliseconds between two tokens of the decoding requests, from the arrival on.

    first_token_ms: from the arrival of the long prompt to its first token.
    """

    budget: int
    long_prompt: int
    decoding: int
    median_ms: float
    p99_ms: float
    largest_ms: float
    first_token_ms: float


def measure_latency(
    engine: Engine, long_prompt: int, num_decoding: int, num_tokens: int, seed: int
) -> Latency:
    """Serve both, and look at the gaps until every decoding request has had num_tokens more."""
    rng = np.random.default_rng(seed)

    def prompt(length: int) -> list[int]:
        return rng.integers(1, engine.vocab_size, length).tolist()

    before = 8  # tokens that everyone decodes in peace
    for number in range(num_decoding):
        params = SamplingParams(temperature=0, max_tokens=before + num_tokens, ignore_eos=True)
        engine.add_request(f"decoding-{number}", prompt(16), params)
    for _ in range(before):
        engine.step()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engine.add_request("long", prompt(long_prompt), params)
    arrival = last = time.perf_counter()
    gaps: list[float] = []
    first_token = 0.0
    while engine.has_unfinished_requests:
        outputs = engine.step()
        now = time.perf_counter()
        names = [output.request_id for output in outputs]
        gaps += [now - last] * sum(name != "long" for name in names)
        if "long" in names:
            first_token = now - arrival
        last = now
    median, p99, largest = (1000 * float(np.percentile(gaps, q)) for q in (50, 99, 100))
    budget = engine.scheduler.max_num_batched_tokens
    return Latency(budget, long_prompt, num_decoding, median, p99, largest, 1000 * first_token)
