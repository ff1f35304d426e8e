"""The cost model against steps that can be measured: this machine in place of the GPU.

Bandwidth and arithmetic of the machine are measured by themselves, with a long sum and a large
product; the model's predictions for prompts and decoding batches then stand beside the engine's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minipaged.engine.builder import EngineOptions, build_engine
from minipaged.engine.engine import Engine
from minipaged.evaluation.cost_model import (
    MATMUL_EFFICIENCY,
    READ_EFFICIENCY,
    CostModel,
    Deployment,
    Gpu,
    ModelSize,
    StepWork,
)
from minipaged.models.linear import PackedLinear, can_pack
from minipaged.models.loader import load_decoder
from minipaged.request.sampling_params import SamplingParams

BLOCK_SIZE = 16


@dataclass(frozen=True)
class StepTime:
    """One kind of step: sequences that compute so many tokens each, the last of their context."""

    sequences: int
    tokens: int
    context: int
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Of the prediction: 0.1 is 10 % above what was measured."""
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True)
class Machine:
    """What was measured of the machine, in bytes and operations per second."""

    read_bandwidth: float
    operations: float


def measure_machine(hidden: int, seconds: float = 1.0) -> Machine:
    """Reading a gigabyte, and multiplying with weights of this width, in bfloat16."""
    numbers = torch.ones(2**28)  # 1 GiB, more than any cache
    reading = _fastest(lambda: numbers.sum(), seconds)
    linear: torch.nn.Module = torch.nn.Linear(hidden, 4 * hidden, bias=False, dtype=torch.bfloat16)
    if can_pack(torch.bfloat16):
        linear = PackedLinear(linear)  # type: ignore[arg-type]
    x = torch.ones(512, hidden, dtype=torch.bfloat16)
    with torch.inference_mode():
        product = _fastest(lambda: linear(x), seconds)
    return Machine(numbers.nbytes / reading, 2 * 512 * hidden * 4 * hidden / product)


def _fastest(work: Callable[[], object], seconds: float) -> float:
    end = time.perf_counter() + seconds
    times: list[float] = []
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def check_cost_model(
    model: str, attention: str, shapes: list[tuple[int, int, int]]
) -> tuple[Machine, list[StepTime]]:
    """Predicted and measured steps; shapes: (sequences, tokens of each, tokens before them)."""
    decoder, tokenizer = load_decoder(model, torch.bfloat16)
    config = decoder.config
    machine = measure_machine(config.hidden_size)
    gpu = Gpu(
        memory=1.0,
        bandwidth=machine.read_bandwidth / READ_EFFICIENCY,
        operations=machine.operations / MATMUL_EFFICIENCY,
        link=1.0,
        host_link=1.0,
    )
    size = ModelSize(
        config.num_weights,
        config.num_layers,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
        config.context_length,
    )
    cost = CostModel(Deployment(size, gpu, 1, 1), BLOCK_SIZE)
    times = []
    for sequences, tokens, before in shapes:
        context = sequences * (before + tokens)
        work = StepWork(sequences * tokens, context, sequences * tokens * (before + tokens / 2))
        options = EngineOptions(
            block_size=BLOCK_SIZE,
            num_blocks=2 * sequences * -(-(before + tokens + 32) // BLOCK_SIZE),
            max_num_seqs=sequences,
            max_num_batched_tokens=max(2048, sequences * (before + tokens)),
            attention=attention,
        )
        engine = build_engine(decoder, tokenizer, options)
        measured = _prompt_steps if tokens > 1 else _decoding_steps
        seconds = measured(engine, sequences, before + tokens)
        predicted = 1000 * cost.seconds(work)
        times.append(StepTime(sequences, tokens, before + tokens, predicted, 1000 * seconds))
    return machine, times


def _add(engine: Engine, name: str, length: int, max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    engine.add_request(name, [1] * length, params)


def _prompt_steps(engine: Engine, sequences: int, length: int) -> float:
    """Median of steps that compute so many whole prompts."""
    times = []
    for repeat in range(4):
        for i in range(sequences):
            _add(engine, f"{repeat} {i}", length, 1)
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _decoding_steps(engine: Engine, sequences: int, context: int) -> float:
    """Median of steps that decode so many sequences around this context."""
    for i in range(sequences):
        _add(engine, str(i), context - 8, 24)
    times = []
    while engine.has_unfinished_requests:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:-2])
