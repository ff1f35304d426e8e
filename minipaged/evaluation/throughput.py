"""Useful tokens per second of one workload, here and in transformers, alternating in one process.

A useful token is a generated token that was asked for; padding and prompt tokens do not
count.  The runs alternate, so that what else the machine does hits both alike, and the
best run of each is reported.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipaged.engine.builder import EngineOptions, load_engine
from minipaged.engine.engine import Engine
from minipaged.engine.model_runner import ModelRunner
from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.evaluation.workload import WorkloadRequest
from minipaged.models.loader import resolve
from minipaged.request.sampling_params import SamplingParams


@dataclass
class Measurement:
    """The best run of one system.

    peak_memory_gib: what the process grew by when the system was loaded, and at most during
        one of its runs; memory of the host, not of a GPU.
    shares: part of the time spent in the model outside of attention, the attention, the
        scheduler, the sampler and the output; of our own engine, on a CPU.
    """

    system: str
    tokens_per_second: float
    seconds: list[float]
    peak_memory_gib: float
    shares: dict[str, float] | None = None


@dataclass
class System:
    """Something that serves a workload; `run` returns the seconds it took."""

    name: str
    run: Callable[[list[WorkloadRequest]], float]
    load_bytes: int


def measure(
    model: str, workload: list[WorkloadRequest], options: EngineOptions, against: bool, repeats: int
) -> list[Measurement]:
    """Load the systems, let them take turns, and report the best run of each."""
    before = resident_bytes()
    engine = load_engine(model, options)
    loaded = resident_bytes()
    systems = [System("minipaged", lambda w: run_engine(engine, w), loaded - before)]
    if against:
        assert isinstance(engine.runner, ModelRunner)
        weight = engine.runner.decoder.embed_tokens.weight
        peer = Transformers(model, weight.dtype, weight.device)
        grown = resident_bytes() - loaded
        systems.append(System("transformers, static batch", peer.static_batch, grown))
        systems.append(System("transformers, continuous", peer.continuous_batch, grown))
    seconds: dict[str, list[float]] = {system.name: [] for system in systems}
    growth = dict.fromkeys(seconds, 0)
    for _ in range(repeats):
        for system in systems:
            with PeakMemory() as memory:
                seconds[system.name].append(system.run(workload))
            growth[system.name] = max(growth[system.name], memory.growth)
    tokens = sum(request.output_length for request in workload)
    return [
        Measurement(
            system.name,
            tokens / min(seconds[system.name]),
            seconds[system.name],
            (system.load_bytes + growth[system.name]) / 2**30,
            time_shares(engine) if system.name == "minipaged" else None,
        )
        for system in systems
    ]


def run_engine(engine: Engine, workload: list[WorkloadRequest]) -> float:
    """Seconds to serve the workload greedily, all requests there from the start.

    Raises InvalidRequestError for one that would be cut off at the end of the context.
    """
    lengths = [len(request.prompt_token_ids) + request.output_length for request in workload]
    longest = max(lengths, default=0)
    if longest > engine.context_length:
        raise InvalidRequestError(
            f"request {lengths.index(longest) + 1} has {longest} tokens, prompt and output "
            f"together, and the model's context has {engine.context_length}; shorten one of the two"
        )
    start = time.perf_counter()
    for number, request in enumerate(workload):
        params = SamplingParams(temperature=0, max_tokens=request.output_length, ignore_eos=True)
        engine.add_request(str(number), request.prompt_token_ids, params)
    produced = 0
    while engine.has_unfinished_requests:
        produced += len(engine.step())
    assert produced == sum(request.output_length for request in workload)
    return time.perf_counter() - start


def time_shares(engine: Engine) -> dict[str, float] | None:
    """Where the engine's time went since it was built; None on a GPU, which works behind it."""
    timings, runner = engine.timings, engine.runner
    assert isinstance(runner, ModelRunner)
    if runner.cache.device.type == "cuda":
        return None
    parts = {
        "model": timings.model - runner.attention_seconds,
        "attention": runner.attention_seconds,
        "scheduler": timings.scheduler,
        "sampler": timings.sampler,
        "output": timings.output,
    }
    total = sum(parts.values())
    return {name: seconds / total for name, seconds in parts.items()}


class Transformers:
    """The same checkpoint in transformers, with its two ways to serve a batch."""

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise ConfigurationError(
                "--against transformers needs the transformers package; "
                "install it with: pip install 'minipaged[peers]'"
            ) from error
        path = resolve(model)
        where: dict[str, Any] = {"pretrained_model_name_or_path": path}
        if path.is_file():
            where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
            where |= _plain_weights()
        self.model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype).eval().to(device)

    @torch.inference_mode()
    def static_batch(self, workload: list[WorkloadRequest]) -> float:
        """One padded batch; every row runs until the longest output is done."""
        start = time.perf_counter()
        longest = max(len(request.prompt_token_ids) for request in workload)
        tokens = torch.zeros(len(workload), longest, dtype=torch.long, device=self.model.device)
        mask = torch.zeros_like(tokens)
        for row, request in enumerate(workload):
            prompt = torch.tensor(request.prompt_token_ids, device=self.model.device)
            tokens[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        new_tokens = max(request.output_length for request in workload)
        self.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    def continuous_batch(self, workload: list[WorkloadRequest]) -> float:
        """Its own paged cache and scheduler; every request ends with its own output."""
        from transformers import GenerationConfig

        start = time.perf_counter()
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        config.max_new_tokens = max(request.output_length for request in workload)
        with self.model.continuous_batching_context_manager(generation_config=config) as manager:
            for request in workload:
                manager.add_request(request.prompt_token_ids, max_new_tokens=request.output_length)
            finished = 0
            for result in manager:
                finished += result.is_finished()
                if finished == len(workload):
                    break
        return time.perf_counter() - start


def _plain_weights() -> dict[str, Any]:
    """Releases of transformers that can keep GGUF weights quantized are told not to."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


class PeakMemory:
    """Samples the resident set of this process in the background; 0 where it is not known."""

    def __init__(self) -> None:
        self._start = self._peak = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.05):
            self._peak = max(self._peak, resident_bytes())

    @property
    def growth(self) -> int:
        """Bytes at most above the beginning."""
        return self._peak - self._start


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    import resource

    return pages * resource.getpagesize()
