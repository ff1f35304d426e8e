"""Workloads for the engine, printed as code to paste, and the tiny model that serves them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from minipaged.engine.builder import EngineOptions, build_engine
from minipaged.engine.engine import Engine
from minipaged.engine.naive import generate_alone
from minipaged.models.config import ModelConfig
from minipaged.models.decoder import Decoder
from minipaged.request.sampling_params import SamplingParams

VOCAB = 13
CONTEXT = 64
EOS = (3,)


@functools.cache
def tiny_decoder(seed: int = 0) -> Decoder:
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

    def engine(self) -> Engine:
        """A fresh engine in debug mode: freed blocks are poisoned."""
        return build_engine(
            tiny_decoder(self.model_seed),
            None,
            EngineOptions(
                block_size=self.block_size,
                num_blocks=self.num_blocks,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                attention=self.attention,
                debug=True,
                seed=42,
            ),
        )

    def run(self) -> tuple[list[list[int]], Engine]:
        """Serve everything, checking all invariants after every step; outputs by request."""
        engine = self.engine()
        outputs: list[list[int]] = [[] for _ in self.requests]
        pending = sorted(range(len(self.requests)), key=lambda i: self.requests[i].arrival)
        step = 0
        while pending or engine.has_unfinished_requests:
            while pending and self.requests[pending[0]].arrival <= step:
                i = pending.pop(0)
                request = self.requests[i]
                engine.add_request(str(i), request.prompt, SamplingParams(**request.params))
            for i, request in enumerate(self.requests):
                if request.abort_at == step:
                    engine.abort(str(i))
            for output in engine.step():
                outputs[int(output.request_id)] = output.outputs[0].token_ids
            engine.check_integrity()
            step += 1
            assert step < 5000, "the engine does not come to an end"
        return outputs, engine

    def expected(self) -> list[list[int]]:
        """What naive contiguous generation gives for each request alone."""
        order = sorted(range(len(self.requests)), key=lambda i: self.requests[i].arrival)
        outputs: list[list[int]] = [[] for _ in self.requests]
        for arrival, i in enumerate(order):
            params = SamplingParams(**self.requests[i].params)
            key = (42, arrival) if params.seed is None else (params.seed,)
            outputs[i] = generate_alone(
                tiny_decoder(self.model_seed), self.requests[i].prompt, params, key, EOS
            )
        return outputs


token_ids = st.integers(0, VOCAB - 1)

sampling = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 16), "temperature": st.sampled_from([0.0, 0.0, 0.8, 1.5])},
    optional={
        "top_k": st.integers(1, 6),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.sampled_from([0.05, 0.3]),
        "repetition_penalty": st.sampled_from([0.8, 1.4]),
        "presence_penalty": st.sampled_from([-0.5, 0.7]),
        "frequency_penalty": st.sampled_from([0.3]),
        "seed": st.integers(0, 5),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(token_ids, max_size=2).map(tuple),
    },
)

requests = st.builds(
    Request,
    prompt=st.lists(token_ids, min_size=1, max_size=20).map(tuple),
    params=sampling,
    arrival=st.integers(0, 12),
    abort_at=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 25)),
)


@st.composite
def workloads(draw: st.DrawFn, backends: tuple[str, ...] = ("torch",)) -> Workload:
    """Pools from the smallest that can serve each request alone to half of what all would use."""
    chosen = tuple(draw(st.lists(requests, min_size=1, max_size=7)))
    block_size = draw(st.integers(1, 5))
    sizes = [
        -(-(len(request.prompt) + request.params["max_tokens"] - 1) // block_size)
        for request in chosen
    ]
    max_num_seqs = draw(st.integers(1, 8))
    return Workload(
        requests=chosen,
        block_size=block_size,
        num_blocks=draw(st.integers(max(sizes), max(max(sizes), sum(sizes) // 2))),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 25)),
        attention=draw(st.sampled_from(backends)),
        model_seed=draw(st.integers(0, 3)),
    )
