"""Workloads for the engine, printed as code to paste, and the tiny model that serves them."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from minipaged.engine.builder import EngineOptions, build_engine, cache_shape
from minipaged.engine.engine import Engine
from minipaged.engine.naive import beam_search_alone, generate_alone
from minipaged.engine.outputs import RequestOutput
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.reservation import RESERVATIONS, ReservationManager
from minipaged.models.config import ModelConfig
from minipaged.models.decoder import Decoder
from minipaged.request.sampling_params import SamplingParams

VOCAB = 13
CONTEXT = 64
EOS = (3,)
ENGINE_SEED = 42


@functools.cache
def tiny_decoder(seed: int = 0, sliding_window: int | None = None) -> Decoder:
    """A random LLaMA in float64, with logits far enough apart for lively outputs."""
    config = ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        intermediate_size=24,
        max_positions=CONTEXT,
        sliding_window=sliding_window,
        eos_token_ids=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = Decoder(config).double().requires_grad_(False)
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.7)
    return decoder


@dataclass(frozen=True)
class Request:
    """One prompt; it arrives before step `arrival` and is aborted before step `abort_at`."""

    prompt: tuple[int, ...]
    params: dict[str, Any] = field(default_factory=dict)
    arrival: int = 0
    abort_at: int | None = None
    priority: int = 0

    def expected(self, decoder: Decoder, arrival: int) -> list[tuple[list[int], float | None]]:
        """Token ids and score of each output of this request alone, naively generated."""
        params = SamplingParams(**self.params)
        if params.use_beam_search:
            return list(beam_search_alone(decoder, self.prompt, params, EOS))
        key = (ENGINE_SEED, arrival) if params.seed is None else (params.seed,)
        return [
            (generate_alone(decoder, self.prompt, params, (*key, index), EOS), None)
            for index in range(params.width)
        ]


@dataclass(frozen=True)
class Workload:
    """Requests and the engine they meet.  `Workload(...)` as printed can be pasted and run."""

    requests: tuple[Request, ...]
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    attention: str = "torch"
    model_seed: int = 0
    preemption: str = "recompute"
    num_host_blocks: int = 0
    prefix_caching: bool = False
    sliding_window: int | None = None
    policy: str = "fcfs"
    memory_policy: str = "paged"

    @property
    def decoder(self) -> Decoder:
        """The model that serves it."""
        return tiny_decoder(self.model_seed, self.sliding_window)

    def engine(self) -> Engine:
        """A fresh engine in debug mode: freed blocks are poisoned."""
        return build_engine(self.decoder, None, self.options(self.decoder))

    def options(self, decoder: Decoder) -> EngineOptions:
        """What `engine` is built with, for a decoder of any shape."""
        shape = cache_shape(decoder.config, 1, self.block_size)
        return EngineOptions(
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            attention=self.attention,
            preemption=self.preemption,
            swap_space_gib=self.num_host_blocks * shape.bytes_per_block(torch.float64) / 2**30,
            enable_prefix_caching=self.prefix_caching,
            prefix_cache_seed=1,
            policy=self.policy,
            memory_policy=self.memory_policy,
            debug=True,
            seed=ENGINE_SEED,
        )

    def run(self, engine: Engine | None = None) -> tuple[dict[int, RequestOutput], Engine]:
        """Serve everything, checking all invariants after every step; last outputs by request.

        engine: to serve it with, if not one of its own.
        """
        engine = engine or self.engine()
        outputs: dict[int, RequestOutput] = {}
        pending = sorted(range(len(self.requests)), key=lambda i: self.requests[i].arrival)
        step = 0
        while pending or engine.has_unfinished_requests:
            while pending and self.requests[pending[0]].arrival <= step:
                i = pending.pop(0)
                request = self.requests[i]
                params = SamplingParams(**request.params)
                engine.add_request(str(i), request.prompt, params, request.priority)
            for i, request in enumerate(self.requests):
                if request.abort_at == step:
                    engine.abort(str(i))
            for output in engine.step():
                outputs[int(output.request_id)] = output
            engine.check_integrity()
            step += 1
            assert step < 5000, "the engine does not come to an end"
        return outputs, engine

    def check(self) -> Engine:
        """Serve everything and compare with naive generation of each request alone (T4, T5)."""
        outputs, engine = self.run()
        order = sorted(range(len(self.requests)), key=lambda i: self.requests[i].arrival)
        for arrival, i in enumerate(order):
            request = self.requests[i]
            check_output(request, outputs.get(i), request.expected(self.decoder, arrival))
        manager = engine.scheduler.manager
        assert manager.device.num_used == manager.host.num_used == 0
        cache = manager.prefix_cache
        if cache is not None and all(request.abort_at is None for request in self.requests):
            # Every prompt is looked for once, however often it is preempted.
            assert cache.num_queried_tokens == sum(len(r.prompt) for r in self.requests)
        assert not engine.has_unfinished_requests
        return engine


def check_output(
    request: Request, output: RequestOutput | None, expected: list[tuple[list[int], float | None]]
) -> None:
    """Compare what the engine gave with what it should; an aborted request has a part of it."""
    params = SamplingParams(**request.params)
    whole = [tokens for tokens, _ in expected]
    if output is None or not output.finished:
        assert request.abort_at is not None, f"{request} did not finish"
        if output is not None and not params.use_beam_search:
            for completion in output.outputs:
                tokens = completion.token_ids
                assert tokens in [other[: len(tokens)] for other in whole]
        return
    got = [completion.token_ids for completion in output.outputs]
    if not params.is_ranked:
        assert got == whole
    elif params.use_beam_search:
        assert got == whole
        scores = [completion.score for completion in output.outputs]
        assert scores == pytest.approx([score for _, score in expected], abs=1e-9)
    else:
        logprobs = [completion.cumulative_logprob for completion in output.outputs]
        assert logprobs == sorted(logprobs, reverse=True)
        assert len(got) == params.n
        for tokens in got:  # n of the best_of, each as often as it was drawn at most
            assert got.count(tokens) <= whole.count(tokens)


token_ids = st.integers(0, VOCAB - 1)
max_tokens = st.integers(1, 14)
ignore_eos = st.sampled_from([True, True, False])  # long outputs fill the pool

sampling = st.fixed_dictionaries(
    {
        "max_tokens": max_tokens,
        "temperature": st.sampled_from([0.0, 0.0, 0.8, 1.5]),
        "ignore_eos": ignore_eos,
    },
    optional={
        "top_k": st.integers(1, 6),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.sampled_from([0.05, 0.3]),
        "repetition_penalty": st.sampled_from([0.8, 1.4]),
        "presence_penalty": st.sampled_from([-0.5, 0.7]),
        "frequency_penalty": st.sampled_from([0.3]),
        "seed": st.integers(0, 5),
        "stop_token_ids": st.lists(token_ids, max_size=2).map(tuple),
    },
)

parallel_sampling = st.fixed_dictionaries(
    {
        "max_tokens": max_tokens,
        "temperature": st.sampled_from([0.8, 1.5]),
        "n": st.integers(2, 4),
        "ignore_eos": ignore_eos,
    },
    optional={
        "top_k": st.integers(1, 6),
        "frequency_penalty": st.sampled_from([0.3]),
        "seed": st.integers(0, 5),
        "best_of": st.sampled_from([4, 5]),
    },
)

beam_search = st.fixed_dictionaries(
    {
        "max_tokens": max_tokens,
        "temperature": st.just(0.0),
        "use_beam_search": st.just(True),
        "best_of": st.integers(2, 4),
        "ignore_eos": ignore_eos,
    },
    optional={
        "n": st.integers(1, 2),
        "length_penalty": st.sampled_from([0.0, 0.5, 2.0, -1.0]),
        "early_stopping": st.sampled_from([True, "never"]),
        "min_tokens": st.just(1),
        "stop_token_ids": st.lists(token_ids, max_size=2).map(tuple),
    },
)

# Some prompts begin alike, so that there are prefixes to share.
prompts = st.one_of(
    st.lists(token_ids, min_size=1, max_size=20),
    st.builds(
        lambda common, own: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12][:common] + own,
        st.integers(1, 12),
        st.lists(token_ids, max_size=5),
    ),
).map(tuple)

any_params = st.one_of(sampling, sampling, parallel_sampling, beam_search)

requests = st.builds(
    Request,
    prompt=prompts,
    params=any_params,
    arrival=st.integers(0, 8),
    abort_at=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 25)),
    priority=st.sampled_from([0, 0, 1, 2]),
)

# Long outputs that come at the same time: most of them meet a pool that is full.
crowding_requests = st.builds(
    Request,
    prompt=prompts,
    params=st.builds(
        lambda params, tokens: {**params, "max_tokens": tokens, "ignore_eos": True},
        any_params,
        st.integers(8, 14),
    ),
    arrival=st.integers(0, 3),
    abort_at=st.one_of(st.none(), st.none(), st.none(), st.none(), st.integers(5, 25)),
    priority=st.sampled_from([0, 0, 1, 2]),
)


@st.composite
def workloads(
    draw: st.DrawFn, backends: tuple[str, ...] = ("torch",), crowded: bool = False
) -> Workload:
    """Pools from the smallest that can serve each request alone to half of what all would use."""
    policy = draw(st.sampled_from(["fcfs", "fcfs", "priority", "shortest"]))
    kind, fewest = (crowding_requests, 4) if crowded else (requests, 1)
    chosen = tuple(draw(st.lists(kind, min_size=fewest, max_size=7)))
    if policy != "priority":
        chosen = tuple(dataclasses.replace(request, priority=0) for request in chosen)
    block_size = draw(st.integers(1, 5))
    window = draw(st.sampled_from([None, None, None, 3, 4, 7]))
    widths = [SamplingParams(**request.params).width for request in chosen]
    max_num_seqs = 24 if crowded else draw(st.integers(max(widths), 12))
    budget = max(max_num_seqs, block_size) + draw(st.integers(0, 25))
    sizes = [smallest_pool(request, block_size, window, budget) for request in chosen]
    most = max(sizes) + 2 if crowded else max(max(sizes), sum(sizes) // 2)
    num_blocks = draw(st.integers(max(sizes), most))
    preemption = draw(st.sampled_from(["recompute", "swap", "swap", "auto"]))
    return Workload(
        requests=chosen,
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        attention=draw(st.sampled_from(backends)),
        model_seed=draw(st.integers(0, 3)),
        preemption=preemption,
        num_host_blocks=draw(st.integers(1, num_blocks)) if preemption != "recompute" else 0,
        prefix_caching=window is None and draw(st.booleans()),
        sliding_window=window,
        policy=policy,
    )


@st.composite
def reserving_workloads(draw: st.DrawFn) -> Workload:
    """The same with contiguous reservations, in pools that hold from one request to some."""
    workload = draw(workloads())
    policy = draw(st.sampled_from(sorted(RESERVATIONS)))
    manager = ReservationManager(workload.block_size, 1, policy, CONTEXT)
    sizes = []
    for request in workload.requests:
        params, prompt = SamplingParams(**request.params), len(request.prompt)
        tokens = prompt + params.max_tokens - 1
        sizes.append(manager.most_blocks(prompt, tokens, params.width, 0))
    return dataclasses.replace(
        workload,
        num_blocks=draw(st.integers(max(sizes), max(max(sizes), sum(sizes)))),
        memory_policy=policy,
        preemption="recompute",
        num_host_blocks=0,
        prefix_caching=False,
    )


def smallest_pool(request: Request, block_size: int, window: int | None, budget: int) -> int:
    """Blocks of the smallest pool in which the request is not refused."""
    params = SamplingParams(**request.params)
    manager = BlockManager(block_size, 1, sliding_window=window)
    prompt = len(request.prompt)
    return manager.most_blocks(prompt, prompt + params.max_tokens - 1, params.width, budget)
