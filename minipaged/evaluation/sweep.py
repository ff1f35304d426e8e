"""The tasks that the paper's figures are made of, each a function of plain values.

Plain values in and out, so that a task can run in another process, be stored as JSON, and be
recognised when it has been done before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from minipaged.evaluation.arrivals import TimedRequest, poisson_requests
from minipaged.evaluation.cost_model import DEPLOYMENTS, CostModel, Deployment
from minipaged.evaluation.outcome import Outcome
from minipaged.evaluation.simulator import Simulation, System


def serve(
    target: Deployment, workload: str, rate: float, seconds: float, system: System
) -> Outcome:
    """One system at one rate."""
    requests = poisson_requests(workload, rate, seconds, target.model.context_length, seed=0)
    return Simulation(system, target).run(requests)


def run_at(
    deployment: str, workload: str, rate: float, seconds: float, system: dict[str, Any]
) -> dict[str, Any]:
    """The same, as plain values."""
    outcome = serve(DEPLOYMENTS[deployment], workload, rate, seconds, System(**system))
    return dataclasses.asdict(outcome) | {"shares": outcome.memory.shares()}


def sweep(
    deployment: str,
    workload: str,
    start: float,
    seconds: float,
    system: dict[str, Any],
    limit: float,
) -> dict[str, Any]:
    """Latency over the rate, from `start` on until the system is saturated, and the knee.

    limit: seconds per token; rates are sustained at which the mean normalized latency is less.
    Returns points, [rate, s/token, mean batch] by rate, and sustained: the rate at which the
    limit is crossed, found between two points at most 7 % apart.
    """
    points: dict[float, Outcome] = {}

    def saturated(rate: float) -> bool:
        points[rate] = serve(DEPLOYMENTS[deployment], workload, rate, seconds, System(**system))
        return points[rate].latency >= limit

    low, high = 0.0, start
    while not saturated(high):
        low, high = high, high * 1.5
    while low == 0.0 or high / low > 1.07:
        middle = math.sqrt(low * high) if low else high / 2
        low, high = (low, middle) if saturated(middle) else (middle, high)
    before, after = points[low].latency, points[high].latency
    part = math.log(limit / before) / math.log(after / before)
    return {
        "points": [[rate, p.latency, p.batch] for rate, p in sorted(points.items())],
        "sustained": low * (high / low) ** part,
    }


def under_pressure(
    kv_slots: int, prompt: int, output: int, count: int, system: dict[str, Any]
) -> dict[str, Any]:
    """Requests all alike, all at once, on OPT-13B with a cache of so many slots."""
    target = dataclasses.replace(DEPLOYMENTS["opt-13b"], kv_slots=kv_slots)
    simulation = Simulation(System(**system), target)
    outcome = simulation.run(TimedRequest(0.0, prompt, output) for _ in range(count))
    return dataclasses.asdict(outcome) | {"tokens_per_second": outcome.tokens_per_second}


def sharing(dataset: str, decoding: str, width: int, num_requests: int) -> dict[str, Any]:
    """Blocks saved by sharing, with the shipped model: nothing is simulated here."""
    import torch

    from minipaged.engine.builder import EngineOptions, load_engine
    from minipaged.evaluation.sharing import measure_sharing

    torch.set_num_threads(1)
    engine = load_engine("tiny", EngineOptions(max_num_seqs=num_requests * width))
    return dataclasses.asdict(measure_sharing(engine, dataset, decoding, width, num_requests, 0))


def paging_cost(batch: int, context: int, repeats: int) -> dict[str, float]:
    """Microseconds of one layer's decoding attention with OPT-13B's heads, paged and contiguous.

    Measured with this machine's attention, on its GPU or on one core: nothing is simulated here.
    """
    import torch

    from minipaged.evaluation.kernel import DecodeShape, measure_kernels

    torch.set_num_threads(1)
    attention = "cuda" if torch.cuda.is_available() else "native"
    shape = DecodeShape(batch, context, heads=40, kv_heads=40, head_dim=128)
    times = measure_kernels(shape, attention, torch.bfloat16, repeats)
    return {time.name.removeprefix(f"{attention}, "): time.microseconds for time in times}


def preemption_costs(deployment: str, block_size: int, tokens: int) -> dict[str, Any]:
    """Seconds to bring back one sequence of so many tokens, by each way (figure 19a)."""
    cost = CostModel(DEPLOYMENTS[deployment], block_size)
    blocks = -(-tokens // block_size)
    return {
        "swap in and out": 2 * blocks * cost.move_block,
        "recompute": cost.recompute(tokens),
    }


def tune_block_size(
    deployment: Deployment, workload: str, rate: float, seconds: float, sizes: Sequence[int]
) -> tuple[int, dict[int, Outcome]]:
    """The largest block size that serves a workload within 1 % of the best, and all outcomes.

    Large blocks waste slots; small ones make long tables, more copies to swap, and short reads.
    Rated by tokens per second, so that the rate should be more than can be sustained.
    """
    outcomes = {
        size: serve(deployment, workload, rate, seconds, System(block_size=size)) for size in sizes
    }
    best = max(outcome.tokens_per_second for outcome in outcomes.values())
    return max(s for s, o in outcomes.items() if o.tokens_per_second >= 0.99 * best), outcomes
