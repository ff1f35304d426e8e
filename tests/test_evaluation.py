"""What the bench commands measure, checked against a second way to count it."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Request, Workload

from minipaged.attention import BACKENDS
from minipaged.attention.batch import PagedBatch
from minipaged.attention.contiguous import contiguous_attention
from minipaged.attention.paged import prepare
from minipaged.engine.builder import EngineOptions, load_engine
from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.evaluation import cost_check, kernel
from minipaged.evaluation.arrivals import SPREAD, draw_lengths
from minipaged.evaluation.cost_check import check_cost_model
from minipaged.evaluation.kernel import DecodeShape, measure_kernels
from minipaged.evaluation.kernel_peers import compressed_tables
from minipaged.evaluation.latency import measure_latency
from minipaged.evaluation.memory_policies import measure_policies
from minipaged.evaluation.prefix_replay import read_block_trace, replay
from minipaged.evaluation.sharing import PAPER, measure_sharing
from minipaged.evaluation.sweep import paging_cost
from minipaged.evaluation.throughput import run_engine
from minipaged.evaluation.workload import WorkloadRequest
from minipaged.request.sampling_params import SamplingParams

MOONCAKE = Path(__file__).parents[2] / "shared" / "data" / "mooncake_conversation.jsonl"

traces = st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=30)


@given(trace=traces)
def test_with_an_unbounded_pool_every_prefix_seen_before_is_a_hit(trace):
    seen, hits = set(), 0
    for blocks in trace:
        prefixes = [tuple(blocks[: i + 1]) for i in range(len(blocks))]
        hits += sum(prefix in seen for prefix in prefixes)
        seen.update(prefixes)
    result = replay(trace, None)
    assert result.hits == hits
    assert result.blocks == sum(map(len, trace))
    assert result.evictions == 0


@given(trace=traces, pool=st.integers(1, 30))
def test_a_smaller_pool_never_finds_more(trace, pool):
    result = replay(trace, pool)
    assert result.hits <= replay(trace, None).hits
    assert result.refused == sum(len(blocks) for blocks in trace if len(blocks) > pool)
    assert 0 <= result.hit_rate <= 1


@pytest.mark.skipif(not MOONCAKE.exists(), reason=f"the trace is not at {MOONCAKE.name}")
def test_the_conversations_of_mooncake():
    trace = read_block_trace(MOONCAKE)
    result = replay(trace, None)
    assert (result.requests, result.hits, result.blocks) == (12_031, 105_710, 288_500)
    rates = [replay(trace, size).hit_rate for size in (1_000, 30_000)]
    assert rates == sorted(rates)
    assert rates[-1] < result.hit_rate


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no request"),
        ('{"hash_ids": [1]}\nnothing', "line 2 of .* is not"),
        ('{"ids": [1]}', "line 1 of .* is not .*hash_ids"),
        ('{"hash_ids": [1.5]}', "whole numbers"),
        ('{"hash_ids": [-1]}', "0 or more"),
        ("[1, 2]", "line 1"),
    ],
)
def test_files_that_are_no_trace(tmp_path, text, message):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=message):
        read_block_trace(path)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_block_trace(tmp_path / "missing")


def test_lengths_have_the_mean_that_was_asked_for():
    rng = np.random.default_rng(0)
    lengths = draw_lengths(60.0, 20_000, 10_000, rng)
    assert np.mean(lengths) == pytest.approx(60, rel=0.03)
    assert np.std(np.log(lengths)) == pytest.approx(SPREAD, rel=0.05)
    assert max(draw_lengths(60.0, 1000, 100, rng)) == 100


def test_savings_are_those_of_the_block_tables():
    """The same request by hand: three samples of 10 + 6 tokens in blocks of 4."""
    request = Request((1,) * 10, {"n": 3, "max_tokens": 6, "ignore_eos": True})
    workload = Workload((request,), 4, 40, 4, 16)
    engine = workload.engine()
    engine.add_request("0", request.prompt, SamplingParams(**request.params))
    used = without = 0
    while engine.has_unfinished_requests:
        engine.step()
        tables = engine.scheduler.manager.tables.values()
        used += len({block for table in tables for block in table.blocks})
        without += sum(len(table.blocks) for table in tables)
    # 10: 3 shared thrice; 11 and 12: 2 shared, 3 own; 13 to 15: 2 shared, 6 own (15: freed)
    assert (used, without) == (3 + 5 + 5 + 8 + 8, 9 + 9 + 9 + 12 + 12)


@pytest.mark.parametrize("decoding", ["parallel", "beam"])
def test_wider_requests_save_more(decoding):
    engine = load_engine("tiny", EngineOptions(num_blocks=600, max_num_seqs=40))
    two, five = (measure_sharing(engine, "alpaca", decoding, w, 6, 0) for w in (2, 5))
    assert 0 < two.saved < five.saved < 0.9
    assert two.paper == PAPER["alpaca", decoding][2]
    assert engine.scheduler.manager.device.num_used == 0
    with pytest.raises(ConfigurationError, match="no dataset 'pile'"):
        measure_sharing(engine, "pile", decoding, 2, 1, 0)


@pytest.mark.parametrize("budget", [16, 512])
def test_latency_counts_every_gap(budget):
    engine = load_engine(
        "tiny", EngineOptions(num_blocks=100, max_num_seqs=8, max_num_batched_tokens=budget)
    )
    result = measure_latency(engine, long_prompt=100, num_decoding=3, num_tokens=10, seed=0)
    assert result.budget == budget
    assert 0 < result.median_ms <= result.p99_ms <= result.largest_ms
    assert result.first_token_ms > 0
    # With 16 tokens a step, 3 of them for those who decode, the prompt takes 8 steps.
    assert engine.num_steps >= 8 + (8 if budget == 16 else 1)


def test_json_of_a_replay(tmp_path):
    from typer.testing import CliRunner

    from minipaged.cli import app

    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text('{"hash_ids": [1, 2]}\n{"hash_ids": [1, 3]}\n')
    command = ["bench", "prefix-cache", "--trace", str(trace), "--pool-blocks", "2"]
    result = CliRunner().invoke(app, [*command, "--json", str(out)])
    assert result.exit_code == 0, result.output
    measurements = json.loads(out.read_text())["measurements"]
    assert [m["hits"] for m in measurements] == [1, 1]
    assert [m["pool_blocks"] for m in measurements] == [2, None]


def test_a_workload_has_to_fit_the_context():
    """A request that the context cuts off would be timed for fewer tokens than it asks for."""
    engine = load_engine("tiny", EngineOptions(num_blocks=100))
    context = engine.context_length
    assert run_engine(engine, [WorkloadRequest([1] * (context - 2), 2)]) > 0
    workload = [WorkloadRequest([1] * 5, 5), WorkloadRequest([1] * (context - 2), 3)]
    message = rf"request 2 has {context + 1} tokens, .* context has {context}; shorten"
    with pytest.raises(InvalidRequestError, match=message):
        run_engine(engine, workload)
    assert not engine.has_unfinished_requests


@pytest.mark.parametrize("attention", ["torch", "native"])
def test_kernel_times_are_of_the_bytes_they_name(attention, monkeypatch):
    monkeypatch.setattr(kernel, "BYTES_IN_ALL", {"cpu": 2**20})
    shape = DecodeShape(batch=3, context=40, heads=6, kv_heads=2, head_dim=16, block_size=8)
    times = measure_kernels(shape, attention, torch.float32, repeats=2)
    assert [t.name for t in times if "torch" not in t.name or attention == "torch"] == [
        f"{attention}, scattered blocks",
        f"{attention}, blocks in a row",
        "SDPA, contiguous",
    ]
    for t in times:
        assert t.gigabytes_per_second * 1e9 * t.microseconds / 1e6 == pytest.approx(
            2 * 3 * 40 * 2 * 16 * 4  # keys and values x sequences x tokens x heads x size x bytes
        )
        assert t.of_copy > 0


def test_the_caches_of_the_kernel_bench_stay_within_their_bytes(monkeypatch):
    """A context of one token still takes a whole block of every cache."""
    sizes = []

    def systems(shape, attention, query, caches, seed):
        sizes.extend(pool.nbytes for pools in caches for pool in pools)
        return {"nothing": lambda layer: query}

    monkeypatch.setattr(kernel, "BYTES_IN_ALL", {"cpu": 2**20})
    monkeypatch.setattr(kernel, "_systems", systems)
    shape = DecodeShape(batch=3, context=1, heads=6, kv_heads=2, head_dim=16, block_size=256)
    measure_kernels(shape, "torch", torch.float32, repeats=1)
    assert 2**19 < sum(sizes) <= 2**20


def test_the_cost_of_paging_is_that_of_each_way(monkeypatch, one_thread):
    monkeypatch.setattr(kernel, "BYTES_IN_ALL", {"cpu": 2**20, "cuda": 2**20})
    times = paging_cost(batch=2, context=40, repeats=1)
    assert {"scattered blocks", "blocks in a row", "SDPA, contiguous"} <= times.keys()
    assert all(microseconds > 0 for microseconds in times.values())


def test_the_systems_of_the_kernel_bench_compute_the_same():
    """Blocks in a row are the contiguous keys of each sequence; a context that fills no block."""
    shape = DecodeShape(batch=3, context=37, heads=6, kv_heads=2, head_dim=16, block_size=8)
    pools = [torch.randn(15, 8, 2, 16, dtype=torch.float64) for _ in range(2)]
    query = torch.randn(3, 6, 16, dtype=torch.float64)
    in_a_row = kernel._batch(shape, torch.arange(15).view(3, 5).tolist())
    paged = kernel._paged("torch", in_a_row, query, [tuple(pools)])(0)
    contiguous = kernel._contiguous(shape, query, [tuple(pools)])(0)
    for seq in range(3):
        keys, values = (pool[5 * seq : 5 * seq + 5].flatten(0, 1)[:37] for pool in pools)
        wanted = contiguous_attention(query[seq : seq + 1], keys, values)[0]
        torch.testing.assert_close(paged[seq], wanted)
        torch.testing.assert_close(contiguous[seq].reshape(6, 16), wanted)


def test_an_attention_that_computes_something_else_is_not_measured(monkeypatch):
    def forgets_the_last_token(batch):
        return prepare(dataclasses.replace(batch, context_lengths=batch.context_lengths - 1))

    monkeypatch.setattr(kernel, "BYTES_IN_ALL", {"cpu": 2**20})
    monkeypatch.setitem(BACKENDS, "broken", lambda debug: forgets_the_last_token)
    shape = DecodeShape(batch=3, context=37, heads=6, kv_heads=2, head_dim=16, block_size=8)
    with pytest.raises(ValueError, match=r"broken is 0.* away from PyTorch's attention"):
        measure_kernels(shape, "broken", torch.float32, repeats=1)


@given(
    contexts=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 3, 8]),
    random=st.randoms(use_true_random=False),
)
def test_the_tables_for_flashinfer_name_the_same_blocks(contexts, block_size, random):
    blocks = list(range(sum(contexts)))
    random.shuffle(blocks)
    tables = [[blocks.pop() for _ in range(-(-tokens // block_size))] for tokens in contexts]
    batch = PagedBatch.from_lists(block_size, [1] * len(contexts), contexts, tables)
    starts, rows, in_last = compressed_tables(batch)
    assert starts[0] == 0
    assert [rows[a:b].tolist() for a, b in itertools.pairwise(starts)] == tables
    for table, tokens, last in zip(tables, contexts, in_last, strict=True):
        assert 1 <= last <= block_size
        assert (len(table) - 1) * block_size + last == tokens


def test_paging_serves_more_at_a_time_than_reservations_do():
    """Not a matter of speed: batches are counted in steps."""
    options = EngineOptions(seed=0)
    policies = ["paged", "orca-oracle", "orca-max", "static"]
    runs = measure_policies("tiny", policies, 12, 1, options)
    batches = [run.batch for run in runs]
    assert [run.policy for run in runs] == policies
    assert batches == sorted(batches, reverse=True)
    assert batches[0] > 1.1 * batches[2]
    assert all(run.tokens_per_second > 0 and run.latency > 0 for run in runs)


def test_the_cost_model_is_compared_with_the_engine(monkeypatch):
    measured = functools.partial(cost_check.measure_machine, seconds=0.1)
    monkeypatch.setattr(cost_check, "measure_machine", measured)
    machine, times = check_cost_model("tiny", "torch", [(2, 1, 63), (2, 40, 0)])
    assert machine.read_bandwidth > 1e8
    assert machine.operations > 1e8
    assert [(t.sequences, t.tokens, t.context) for t in times] == [(2, 1, 64), (2, 40, 40)]
    for step in times:
        assert step.predicted_ms > 0
        assert step.error == step.predicted_ms / step.measured_ms - 1
