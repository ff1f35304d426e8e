"""Recorded runs of the engine for the tests of pictures."""

from strategies import Workload

from minipaged.engine.engine import Engine
from minipaged.engine.trace import StepRecord, TableRecord, Trace
from minipaged.request.sampling_params import SamplingParams
from minipaged.scheduling.step_plan import StepPlan


def record(workload: Workload) -> tuple[Trace, Engine]:
    """All records of a workload whose requests are there from the start."""
    engine, trace = workload.engine(), Trace()
    engine.observers.append(trace)
    for i, request in enumerate(workload.requests):
        engine.add_request(str(i), request.prompt, SamplingParams(**request.params))
    while engine.has_unfinished_requests:
        engine.step()
    return trace, engine


def shared_record() -> StepRecord:
    """Two sequences that share their first block: A: [3, 1]   B: [3, 2]   block size 4."""
    return StepRecord(
        step=7,
        seconds=0.01,
        plan=StepPlan(),
        block_size=4,
        num_blocks=6,
        tables=(TableRecord(0, "x", (3, 1), 6), TableRecord(1, "x", (3, 2), 5)),
        running=("x",),
        waiting=(),
        finished={},
        new_text={},
        num_preemptions=0,
    )
