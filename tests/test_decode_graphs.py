"""Padded decoding steps: the same tokens as eager ones.  On a GPU they are CUDA graphs."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from strategies import Request, Workload, workloads

from minipaged import LLM, SamplingParams
from minipaged.attention.kernels import KernelAttention
from minipaged.engine.decode_graphs import DecodeGraphs, padded_sizes
from minipaged.engine.model_runner import ModelRunner


@dataclasses.dataclass(frozen=True)
class PaddedWorkload(Workload):
    """The same on an engine that pads its decoding steps, without a graph on the CPU."""

    def engine(self):
        engine = super().engine()
        runner = engine.runner
        assert isinstance(runner, ModelRunner)
        assert isinstance(runner.prepare_attention, KernelAttention)
        runner.graphs = DecodeGraphs(
            runner.decoder, runner.cache, runner.prepare_attention, self.max_num_seqs
        )
        return engine


@settings(max_examples=20)
@given(workload=workloads(backends=("emulated",)))
def test_padded_steps_draw_the_same_tokens(workload):
    """T4 again: rows that fill a step up change no token and write into nobody's block."""
    PaddedWorkload(**vars(workload)).check()


def test_padded_steps_are_used():
    requests = tuple(
        Request((1, 2, 4 + i), {"max_tokens": 9, "ignore_eos": True}) for i in range(3)
    )
    engine = PaddedWorkload(requests, 2, 30, 6, 30, attention="emulated").engine()
    for i, request in enumerate(requests):
        engine.add_request(str(i), request.prompt, SamplingParams(**request.params))
    while engine.has_unfinished_requests:
        engine.step()
    assert set(engine.runner.graphs._steps) == {4}, "three sequences in a step of four"


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 20])
def test_every_batch_has_a_size(most):
    sizes = padded_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for batch in range(1, most + 1):
        size = next(size for size in sizes if size >= batch)
        assert size < batch + 8, "at most seven rows for nothing"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_draw_the_same_tokens_as_eager_steps():
    prompts = ["ROMEO:", "First Citizen:", "To be, or not to be", "O, what light"]
    params = SamplingParams(max_tokens=50, temperature=0.8, seed=1, ignore_eos=True)
    tokens = []
    for enforce_eager in (True, False):
        llm = LLM("tiny", dtype="float32", attention="cuda", enforce_eager=enforce_eager)
        outputs = llm.generate(prompts, params)
        tokens.append([output.outputs[0].token_ids for output in outputs])
    assert tokens[0] == tokens[1]
