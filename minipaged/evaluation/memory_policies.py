"""What paging gains on this machine: the same model, requests and memory under each policy.

Nothing is simulated.  The memory is so small that reservations hurt as much as in the paper's
setting, where 15,700 slots hold 7 contexts of 2,048 tokens; lengths are those of ShareGPT,
scaled to the model's context.  The policies take turns in one process.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minipaged.attention import device_of
from minipaged.engine.builder import EngineOptions, build_engine, parse_dtype
from minipaged.engine.engine import Engine
from minipaged.evaluation.arrivals import DATASETS, draw_lengths
from minipaged.evaluation.cost_model import DEPLOYMENTS
from minipaged.evaluation.workload import WorkloadRequest
from minipaged.models.loader import load_decoder
from minipaged.request.sampling_params import SamplingParams

PAPER = DEPLOYMENTS["opt-13b"]  # whose cache and context are scaled


@dataclass(frozen=True)
class PolicyRun:
    """The fastest run of one policy.

    latency: mean of (end - start) / output tokens, in seconds per token; all requests are there
        from the start.
    batch: mean number of running requests over the steps.
    seconds: of every run.
    """

    policy: str
    tokens_per_second: float
    batch: float
    latency: float
    preemptions: int
    seconds: list[float]


def sharegpt_workload(
    count: int, context_length: int, vocab_size: int, seed: int
) -> list[WorkloadRequest]:
    """Random tokens in ShareGPT's lengths, scaled from the paper's context to this one."""
    rng = np.random.default_rng(seed)
    scale, lengths = context_length / PAPER.model.context_length, DATASETS["sharegpt"]
    half = context_length // 2
    prompts = draw_lengths(lengths.prompt * scale, count, half, rng)
    outputs = draw_lengths(lengths.output * scale, count, half, rng)
    return [
        WorkloadRequest(rng.integers(1, vocab_size, prompt).tolist(), output)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def measure_policies(
    model: str, policies: Sequence[str], num_requests: int, repeats: int, options: EngineOptions
) -> list[PolicyRun]:
    """Serve the same requests under every policy in turn; options: all but policy and memory."""
    decoder, tokenizer = load_decoder(
        model, dtype=parse_dtype(options.dtype), device=device_of(options.attention)
    )
    context = decoder.config.context_length
    slots = context * PAPER.kv_slots // PAPER.model.context_length
    workload = sharegpt_workload(num_requests, context, decoder.config.vocab_size, options.seed)
    options = dataclasses.replace(options, num_blocks=slots // options.block_size)
    runs: dict[str, list[PolicyRun]] = {policy: [] for policy in policies}
    for _ in range(repeats):
        for policy in policies:
            chosen = dataclasses.replace(options, memory_policy=policy)
            engine = build_engine(decoder, tokenizer, chosen)
            runs[policy].append(_serve(policy, engine, workload))
    return [
        dataclasses.replace(
            max(of_policy, key=lambda run: run.tokens_per_second),
            seconds=[second for run in of_policy for second in run.seconds],
        )
        for of_policy in runs.values()
    ]


def _serve(policy: str, engine: Engine, workload: list[WorkloadRequest]) -> PolicyRun:
    for number, request in enumerate(workload):
        params = SamplingParams(temperature=0, max_tokens=request.output_length, ignore_eos=True)
        engine.add_request(str(number), request.prompt_token_ids, params)
    start = time.perf_counter()
    latencies = []
    running = steps = 0
    while engine.has_unfinished_requests:
        outputs = engine.step()
        now = time.perf_counter() - start
        running += len(outputs)
        steps += 1
        for output in outputs:
            if output.finished:
                latencies.append(now / workload[int(output.request_id)].output_length)
    seconds = time.perf_counter() - start
    tokens = sum(request.output_length for request in workload)
    return PolicyRun(
        policy,
        tokens / seconds,
        running / steps,
        sum(latencies) / len(latencies),
        engine.scheduler.num_preemptions,
        [seconds],
    )
