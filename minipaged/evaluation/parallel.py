"""One workload on one rank and on several: tokens per second, and the bytes that it costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from minipaged.distributed.parallel_runner import ParallelRunner
from minipaged.distributed.traffic import Traffic, step_traffic
from minipaged.engine.builder import EngineOptions, load_engine
from minipaged.engine.engine import Engine
from minipaged.engine.trace import StepRecord
from minipaged.evaluation.throughput import run_engine
from minipaged.evaluation.workload import WorkloadRequest

LOOPBACK_COUNTERS = Path("/proc/net/dev")


@dataclass(frozen=True)
class ParallelRun:
    """A run with this many ranks on this host; all bytes are those of the whole run.

    counted: payload of the collectives, as rank 0 counted it.
    formula: the same by `step_traffic`.
    on_the_wire: what all ranks should send for it, without headers.
    loopback: what went over the loopback interface meanwhile, headers and all that other programs
        sent included; None where the system does not say.
    """

    ranks: int
    steps: int
    tokens_per_second: float
    counted: Traffic
    formula: Traffic
    on_the_wire: int
    loopback: int | None


def measure_parallel(
    model: str, workload: list[WorkloadRequest], options: EngineOptions, sizes: list[int]
) -> list[ParallelRun]:
    """Serve the workload with each number of ranks: once to warm up, and once that counts."""
    runs = []
    for size in sizes:
        engine = load_engine(model, dataclasses.replace(options, tensor_parallel_size=size))
        run_engine(engine, workload)
        runs.append(_measure(engine, workload, size))
        if isinstance(engine.runner, ParallelRunner):
            engine.runner.close()
    return runs


def _measure(engine: Engine, workload: list[WorkloadRequest], size: int) -> ParallelRun:
    runner, formula = engine.runner, Traffic()
    counted = before = Traffic()
    if isinstance(runner, ParallelRunner):
        counted = runner.ranks.communicator.payload
        before = dataclasses.replace(counted)
        decoder = runner.decoder
        element_size = decoder.embed_tokens.weight.itemsize

        def add(record: StepRecord) -> None:
            nonlocal formula
            formula += step_traffic(decoder.whole_config, record.plan, size, element_size)

        engine.observers.append(add)
    steps, sent = engine.num_steps, loopback_bytes()
    seconds = run_engine(engine, workload)
    after = loopback_bytes()
    return ParallelRun(
        ranks=size,
        steps=engine.num_steps - steps,
        tokens_per_second=sum(request.output_length for request in workload) / seconds,
        counted=counted - before,
        formula=formula,
        on_the_wire=formula.on_the_wire(size),
        loopback=None if sent is None or after is None else after - sent,
    )


def loopback_bytes() -> int | None:
    """Bytes that this host has sent to itself since it was started, where Linux counts them."""
    if not LOOPBACK_COUNTERS.exists():
        return None
    for line in LOOPBACK_COUNTERS.read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    return None
