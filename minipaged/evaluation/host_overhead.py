"""What the host adds to a decoding step on a GPU: launched from Python, and as a CUDA graph.

The wall-clock time of a step less the time that the GPU needs for the model, which is that of its
graph, replayed back to back.  With a graph the launches cost nothing any more; what is left is
scheduling, inputs and sampling.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from minipaged.engine.builder import EngineOptions, build_engine
from minipaged.engine.engine import Engine
from minipaged.engine.model_runner import ModelRunner
from minipaged.errors import ConfigurationError
from minipaged.evaluation.kernel import seconds_of
from minipaged.models.loader import load_decoder
from minipaged.request.sampling_params import SamplingParams

WARM_UP = 5
REPLAYS = 20


@dataclass(frozen=True)
class HostOverhead:
    """Medians of one way to run decoding steps, in milliseconds.

    gpu_ms: of the model alone, without pauses between its kernels.
    """

    mode: str
    sequences: int
    step_ms: float
    gpu_ms: float

    @property
    def host_ms(self) -> float:
        """Of a step, in which the GPU waits for the host."""
        return self.step_ms - self.gpu_ms


def measure_host_overhead(model: str, dtype: torch.dtype, batches: list[int]) -> list[HostOverhead]:
    """Decoding steps of each batch size, eager and replayed; ConfigurationError without a GPU."""
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "the host's overhead is that of launching work on a GPU, and there is none; "
            "`minipaged bench throughput` shows where the time goes on a CPU"
        )
    decoder, tokenizer = load_decoder(model, dtype, device="cuda")
    results = []
    for sequences in batches:
        steps = {}
        for mode in ("eager", "graph"):
            options = EngineOptions(
                attention="cuda",
                num_blocks=16 * sequences,
                max_num_seqs=sequences,
                enforce_eager=mode == "eager",
            )
            engine = build_engine(decoder, tokenizer, options)
            steps[mode] = _decode(engine, sequences)
        assert isinstance(engine.runner, ModelRunner)
        gpu = _replay_milliseconds(engine.runner, sequences)
        results += [HostOverhead(mode, sequences, step, gpu) for mode, step in steps.items()]
    return results


def _decode(engine: Engine, sequences: int) -> float:
    """Median milliseconds of a decoding step, which ends when its tokens are known."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for i in range(sequences):
        engine.add_request(str(i), [1] * 100, params)
    steps = []
    while engine.has_unfinished_requests:
        start = time.perf_counter()
        engine.step()
        steps.append(1000 * (time.perf_counter() - start))
    return statistics.median(steps[WARM_UP:])


def _replay_milliseconds(runner: ModelRunner, sequences: int) -> float:
    """Of the last decoding step, the mean of many of it."""
    graphs = runner.graphs
    assert graphs is not None

    def replay() -> None:
        for _ in range(REPLAYS):
            graphs.replay(sequences)

    return 1000 * seconds_of(replay, runner.cache.device) / REPLAYS
