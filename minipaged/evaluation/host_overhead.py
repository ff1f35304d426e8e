"""What the host adds to a decoding step on a GPU: launched from Python, and as a CUDA graph.

The wall-clock time of a step less the time in which the GPU works on it.  With a graph the
launches cost nothing any more; what is left is scheduling, inputs and sampling.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from minipaged.engine.builder import EngineOptions, build_engine
from minipaged.engine.model_runner import ModelRunner
from minipaged.errors import ConfigurationError
from minipaged.models.loader import load_decoder
from minipaged.request.sampling_params import SamplingParams
from minipaged.scheduling.step_plan import StepPlan

WARM_UP = 5


@dataclass(frozen=True)
class HostOverhead:
    """Medians of one way to run decoding steps, in milliseconds.

    gpu_ms: by events around the model, so with the pauses between its kernels if it has to wait
        for their launches.
    """

    mode: str
    sequences: int
    step_ms: float
    gpu_ms: float

    @property
    def host_ms(self) -> float:
        """Of a step, in which the GPU does nothing for the model."""
        return self.step_ms - self.gpu_ms


class _TimedRunner(ModelRunner):
    """Notes how long the GPU takes from the beginning of the model to its end."""

    milliseconds: list[float]

    def execute(self, plan: StepPlan) -> torch.Tensor:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        logits = super().execute(plan)
        end.record()
        end.synchronize()
        self.milliseconds.append(begin.elapsed_time(end))
        return logits


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
        for mode in ("eager", "graph"):
            options = EngineOptions(
                attention="cuda",
                num_blocks=16 * sequences,
                max_num_seqs=sequences,
                enforce_eager=mode == "eager",
            )
            engine = build_engine(decoder, tokenizer, options)
            runner = engine.runner
            assert isinstance(runner, ModelRunner)
            timed = _TimedRunner(decoder, runner.cache, runner.prepare_attention, runner.graphs)
            timed.milliseconds = []
            engine.runner = timed
            params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
            for i in range(sequences):
                engine.add_request(str(i), [1] * 100, params)
            steps = []
            while engine.has_unfinished_requests:
                start = time.perf_counter()
                engine.step()
                steps.append(1000 * (time.perf_counter() - start))
            of_step = statistics.median(steps[WARM_UP:])
            of_gpu = statistics.median(timed.milliseconds[WARM_UP:])
            results.append(HostOverhead(mode, sequences, of_step, of_gpu))
    return results
