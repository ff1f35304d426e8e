"""T4, scheduling invariance, and T5, no leaks: the whole engine in float64 against the oracle."""

import copy
import dataclasses
import itertools
import operator
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st
from strategies import (
    CONTEXT,
    EOS,
    VOCAB,
    Request,
    Workload,
    check_output,
    tiny_decoder,
    workloads,
)

from minipaged.engine.builder import EngineOptions, build_engine
from minipaged.engine.trace import Trace
from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence


@given(workload=workloads(backends=("torch", "torch", "reference", "native", "emulated")))
@example(  # two sequences that take turns in a pool for one and a half
    Workload((Request((1, 2, 4), {"max_tokens": 9}), Request((5,), {"max_tokens": 12})), 2, 7, 2, 4)
)
def test_tokens_do_not_depend_on_the_schedule(workload):
    workload.check()


@given(workload=workloads(crowded=True))
def test_tokens_do_not_depend_on_preemption(workload):
    """Pools so small that most runs preempt, by recomputation or swapping."""
    preemption = workload.check().scheduler.preemption
    event(f"recomputations: {min(preemption.num_recomputations, 3)}")
    event(f"swaps: {min(preemption.num_swaps, 3)}")


def test_small_pools_preempt_in_most_runs():
    """The property above is worth something: here is how often its engine had to preempt."""
    counts = Counter()
    for seed in range(40):
        rng = random.Random(seed)
        chosen = tuple(
            Request(
                tuple(rng.choices(range(VOCAB), k=rng.randint(1, 20))),
                {"max_tokens": 16, "ignore_eos": True, "temperature": rng.choice([0.0, 1.0])},
                rng.randint(0, 5),
            )
            for _ in range(5)
        )
        swaps = seed % 2 == 1
        preemption, host = ("swap", 20) if swaps else ("recompute", 0)
        engine = Workload(chosen, 2, 20, 6, 30, preemption=preemption, num_host_blocks=host).check()
        counts["swapped"] += engine.scheduler.preemption.num_swaps > 0
        counts["recomputed"] += engine.scheduler.preemption.num_recomputations > 0
    print(f"of 40 runs: {dict(counts)}")
    assert counts["swapped"] > 15
    assert counts["recomputed"] > 15


@given(workload=workloads())
def test_abort_at_any_step_frees_every_block(workload):
    """T5: whenever everything is aborted, nothing is left."""
    engine = workload.engine()
    for i, request in enumerate(workload.requests):
        engine.add_request(str(i), request.prompt, SamplingParams(**request.params))
    for _ in range(workload.requests[0].arrival):
        engine.step()
    for i in range(len(workload.requests)):
        output = engine.abort(str(i))
        if output is not None:
            reasons = [completion.finish_reason for completion in output.outputs]
            assert None not in reasons
            assert "abort" in reasons or workload.requests[i].params.get("use_beam_search")
        engine.check_integrity()
    assert engine.scheduler.manager.device.num_used == 0
    assert not engine.has_unfinished_requests


@given(
    workload=workloads(),
    call=st.integers(1, 12),
    where=st.sampled_from(["runner.execute", "_branching.draw", "_branching.end_step"]),
    before=st.booleans(),
)
def test_a_step_that_fails_leaves_nothing_behind(workload, call, where, before):
    """What it had planned to copy and swap is lost: all end, and who comes next is served well."""
    engine = workload.engine()
    owner, method = operator.attrgetter(where.split(".")[0])(engine), where.split(".")[1]
    work, calls = getattr(owner, method), itertools.count(1)

    def fails(*arguments):
        if before and next(calls) == call:
            raise MemoryError
        result = work(*arguments)
        if not before and next(calls) == call:
            raise MemoryError
        return result

    setattr(owner, method, fails)
    try:
        workload.run(engine)
    except MemoryError:
        event(f"failed in {where}")
        engine.check_integrity()
        assert not engine.has_unfinished_requests
        assert engine.scheduler.manager.device.num_used == 0
        assert engine.scheduler.manager.host.num_used == 0
    setattr(owner, method, work)
    first = workload.requests[0]
    again = Request(first.prompt, {**first.params, "seed": 7})
    outputs, _ = dataclasses.replace(workload, requests=(again,)).run(engine)
    check_output(again, outputs[0], again.expected(workload.decoder, 0))


def engine_of(**options):
    options = {"block_size": 4, "num_blocks": 8, "debug": True, **options}
    return build_engine(tiny_decoder(), None, EngineOptions(**options))


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, VOCAB], {}, f"token {VOCAB} of prompt is outside the vocabulary.* 0 to {VOCAB - 1}"),
        ([-1], {}, "token -1 of prompt"),
        ([1.0], {}, "token 1.0 of prompt"),
        ([True], {}, "token True of prompt"),
        ([1], {"stop_token_ids": [99]}, "token 99 of stop_token_ids"),
        ([1] * CONTEXT, {}, f"the prompt has {CONTEXT} tokens and the model's context {CONTEXT}"),
        ([1] * 33, {"max_tokens": 1}, "may need 9 blocks of 4 tokens and the whole pool has 8"),
        ([1] * 30, {"max_tokens": 4}, "may need 9 blocks"),
        ("text", {}, "no tokenizer"),
        (
            [1],
            {"stop_token_ids": list(range(VOCAB)), "min_tokens": 1},
            "min_tokens is 1 and every token of the vocabulary ends the output",
        ),
        ([1] * 9, {"n": 4, "max_tokens": 8}, "may need 10 blocks .* n or the beam width"),
        ([1], {"n": 300, "max_tokens": 1, "best_of": 300}, "the whole pool has 8"),
        (
            [1],
            {"best_of": 14, "use_beam_search": True, "temperature": 0},
            "the beam width is 14 and the vocabulary has 13 tokens",
        ),
    ],
)
def test_bad_requests_are_refused_and_harm_nobody(prompt, params, message):
    engine = engine_of()
    engine.add_request("good", [1, 2], SamplingParams(temperature=0, max_tokens=5))
    with pytest.raises(InvalidRequestError, match=message):
        engine.add_request("bad", prompt, SamplingParams(**params))
    engine.check_integrity()
    outputs = []
    while engine.has_unfinished_requests:
        outputs = engine.step()
    assert outputs[0].request_id == "good"
    assert outputs[0].finished


@pytest.mark.parametrize(
    ("policy", "priority", "message"),
    [
        ("fcfs", -1, "priority is -1; it must be a whole number, and 0 is the most urgent"),
        ("priority", 1.5, "priority is 1.5"),
        ("fcfs", 1, "order of service knows no priorities"),
    ],
)
def test_bad_priorities(policy, priority, message):
    engine = engine_of(policy=policy)
    with pytest.raises(InvalidRequestError, match=message):
        engine.add_request("a", [1], priority=priority)
    assert not engine.has_unfinished_requests


def test_a_prefix_cache_is_refused_with_a_sliding_window():
    options = EngineOptions(block_size=4, num_blocks=8, enable_prefix_caching=True)
    with pytest.raises(ConfigurationError, match="leave enable_prefix_caching off"):
        build_engine(tiny_decoder(0, 8), None, options)


def test_the_prompt_is_computed_once_and_its_blocks_are_shared():
    """Figure 8: samples share all blocks; a shared last block is copied when it is written."""
    engine, trace = engine_of(num_blocks=20), Trace()
    engine.observers.append(trace)
    engine.add_request("a", [1] * 10, SamplingParams(n=3, max_tokens=4, ignore_eos=True))
    while engine.has_unfinished_requests:
        outputs = engine.step()
    prompt, second, third, last = trace.records
    assert prompt.plan.num_tokens == 10
    assert prompt.forks == ((0, 1), (0, 2))
    # 0, 1 and 2: [b0, b1, b2], b2 holds two tokens
    assert prompt.num_used_blocks == prompt.num_shared_blocks == 3
    assert prompt.num_unshared_blocks == 9
    assert len(second.plan.copies) == 2, "the last of three writes in place"
    assert second.num_used_blocks == 5
    assert third.plan.copies == last.plan.copies == ()
    assert len({tuple(o.token_ids) for o in outputs[0].outputs}) > 1
    assert [o.index for o in outputs[0].outputs] == [0, 1, 2]
    used = sum(record.num_used_blocks for record in trace)
    without = sum(record.num_unshared_blocks for record in trace)
    assert trace.saved_by_sharing == pytest.approx(1 - used / without)
    assert trace.num_copied_blocks == 2


def test_best_of_returns_the_most_probable():
    engine = engine_of(num_blocks=40)
    params = {"max_tokens": 6, "seed": 3, "ignore_eos": True}
    engine.add_request("all", [1, 2], SamplingParams(n=5, logprobs=0, **params))
    engine.add_request("best", [1, 2], SamplingParams(n=2, best_of=5, **params))
    done = {}
    while engine.has_unfinished_requests:
        done |= {o.request_id: o.outputs for o in engine.step() if o.finished}
    ranked = sorted(done["all"], key=lambda o: -o.cumulative_logprob)
    assert [o.token_ids for o in done["best"]] == [o.token_ids for o in ranked[:2]]
    assert done["best"][0].cumulative_logprob == pytest.approx(ranked[0].cumulative_logprob)
    assert done["best"][0].logprobs is None


def test_a_known_prefix_is_not_computed_again():
    engine = engine_of(num_blocks=20, enable_prefix_caching=True)
    trace = Trace()
    engine.observers.append(trace)
    for i, prompt in enumerate([[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 10]]):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=1))
        engine.step()
    assert [record.plan.num_tokens for record in trace] == [9, 1]
    assert trace.records[-1].num_hit_tokens == 8
    assert trace.records[-1].num_queried_tokens == 18
    assert engine.scheduler.manager.device.num_used == 0
    assert engine.scheduler.manager.device.num_cached == 2


def test_a_salt_hides_a_prefix_from_the_others():
    engine = engine_of(num_blocks=9, enable_prefix_caching=True)
    prompt, params = [0, 1, 2, 3, 4, 5, 6, 7, 9], SamplingParams(temperature=0, max_tokens=8)
    found = {}
    for name, salt in [("a", b"x"), ("b", b"y"), ("c", b"x"), ("d", b"")]:
        engine.add_request(name, prompt, params, cache_salt=salt)
        done = [output for _ in range(8) for output in engine.step() if output.finished]
        found[name] = done[0].num_cached_tokens
    assert found == {"a": 0, "b": 0, "c": 8, "d": 0}


def test_a_window_serves_a_long_output_from_a_small_pool():
    """60 tokens of a model that sees 5, where a whole context would need 15 blocks."""
    options = EngineOptions(block_size=4, num_blocks=5, max_num_batched_tokens=8, max_num_seqs=4)
    engine = build_engine(tiny_decoder(0, 5), None, options)
    engine.add_request("a", [1, 2], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    while engine.has_unfinished_requests:
        (output,) = engine.step()
    assert len(output.outputs[0].token_ids) == 60


def test_a_request_id_is_used_once_at_a_time():
    engine = engine_of()
    engine.add_request("a", [1])
    with pytest.raises(InvalidRequestError, match="request id 'a' is in use"):
        engine.add_request("a", [1])
    engine.abort("a")
    engine.add_request("a", [1])
    assert engine.abort("unknown") is None
    engine.abort("a")


def test_prompts_may_be_arrays():
    engine = engine_of()
    engine.add_request("a", np.array([1, 2, 3]), SamplingParams(temperature=0, max_tokens=1))
    (output,) = engine.step()
    assert output.prompt_token_ids == [1, 2, 3]
    with pytest.raises(InvalidRequestError, match=f"token {VOCAB} of prompt"):
        engine.add_request("b", np.array([VOCAB]))


def test_the_largest_request_that_fits_is_served():
    """30 + 3 tokens in 8 blocks of 4: the last token needs no slot."""
    engine = engine_of()
    engine.add_request("a", [1] * 30, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    while engine.has_unfinished_requests:
        outputs = engine.step()
    assert len(outputs[0].outputs[0].token_ids) == 3


@pytest.mark.parametrize(
    ("num_blocks", "prompt", "n", "expected"),
    # 30 tokens fill 7 blocks, which 3 samples share: 7 more are 2 for each, up to 36 tokens
    [(8, 30, 1, 3), (99, 30, 1, 34), (14, 30, 3, 7), (99, 30, 3, 34)],
)
def test_without_max_tokens_pool_and_context_are_the_limit(num_blocks, prompt, n, expected):
    engine = engine_of(num_blocks=num_blocks)
    params = SamplingParams(n=n, max_tokens=None, ignore_eos=True, temperature=0 if n == 1 else 1)
    engine.add_request("a", [1] * prompt, params)
    while engine.has_unfinished_requests:
        outputs = engine.step()
    assert len(outputs[0].outputs[0].token_ids) == expected
    assert outputs[0].outputs[0].finish_reason == "length"


def test_an_end_token_is_the_last_of_the_output():
    """Whatever is drawn, an end-of-sequence token can only stand at the end."""
    engine = engine_of(num_blocks=200)
    for i in range(40):
        engine.add_request(str(i), [1 + i % 12], SamplingParams(max_tokens=12))
    done = []
    while engine.has_unfinished_requests:
        done += [output.outputs[0] for output in engine.step() if output.finished]
    assert {output.finish_reason for output in done} == {"stop", "length"}
    for output in done:
        assert not set(EOS) & set(output.token_ids[:-1])
        assert (output.token_ids[-1] in EOS) == (output.finish_reason == "stop")


def test_seeds_decide_the_tokens():
    def tokens(seed=None, engine_seed=0):
        engine = engine_of(seed=engine_seed)
        engine.add_request("a", [1, 2, 3], SamplingParams(seed=seed, max_tokens=15))
        while engine.has_unfinished_requests:
            outputs = engine.step()
        return outputs[0].outputs[0].token_ids

    assert tokens(seed=1) == tokens(seed=1, engine_seed=9)
    assert tokens() == tokens()
    assert len({tuple(tokens(seed=i)) for i in range(8)}) > 4
    assert len({tuple(tokens(engine_seed=i)) for i in range(8)}) > 4


def test_records_follow_the_cache():
    workload = Workload(
        tuple(
            Request((1, 2, 3, i), {"max_tokens": 9, "temperature": 0.0, "ignore_eos": True})
            for i in range(4)
        ),
        block_size=2,
        num_blocks=9,
        max_num_seqs=4,
        max_num_batched_tokens=12,
    )
    engine, trace = workload.engine(), Trace()
    engine.observers.append(trace)
    for i, request in enumerate(workload.requests):
        engine.add_request(str(i), request.prompt, SamplingParams(**request.params))
    while engine.has_unfinished_requests:
        engine.step()
    assert [record.step for record in trace] == list(range(engine.num_steps))
    assert trace.records[-1].num_preemptions == engine.scheduler.num_preemptions > 0
    assert sum(len(record.plan.preempted) for record in trace) == engine.scheduler.num_preemptions
    assert {r for record in trace for r in record.finished} == {"0", "1", "2", "3"}
    assert all(record.num_used_blocks <= 9 for record in trace)
    assert trace.fullest.num_used_blocks >= 8
    assert 0 < trace.mean_waste < 0.5
    # 4 + 9 - 1 tokens were in the cache when the last one was drawn.
    assert [table.num_tokens for table in trace.last_tables().values()] == [12] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"block_size": 0, "num_blocks": None}, "block_size is 0"),
        ({"block_size": 0, "preemption": "swap", "swap_space_gib": 1}, "block_size is 0"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "below max_num_seqs 9"),
        ({"attention": "flash"}, "no attention 'flash'"),
        ({"num_blocks": None, "kv_cache_gib": 1e-7}, "raise kv_cache_gib or lower block_size"),
        ({"max_num_seqs": 1, "max_num_batched_tokens": 3}, "is 3, below block_size 4"),
        ({"max_num_seqs": 1, "max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"preemption": "swap", "swap_space_gib": 0}, "swap_space_gib is 0, below one block"),
        ({"preemption": "swap", "swap_space_gib": -1}, "swap_space_gib is -1"),
        ({"preemption": "later"}, "preemption is 'later'"),
        ({"policy": "lifo"}, "no scheduling policy 'lifo'"),
        ({"prefix_cache_seed": -1, "enable_prefix_caching": True}, "prefix_cache_seed is -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigurationError, match=message):
        engine_of(**options)


def test_the_pool_is_sized_from_the_budget():
    # 2 layers x keys and values x 2 heads x 6 elements x 8 bytes x 4 tokens = 1536 bytes a block
    engine = engine_of(num_blocks=None, kv_cache_gib=1536 * 100.5 / 2**30)
    assert engine.scheduler.manager.device.num_blocks == 100
    # No more than max_num_seqs contexts of 64 tokens can use.
    engine = engine_of(num_blocks=None, kv_cache_gib=1, max_num_seqs=3)
    assert engine.scheduler.manager.device.num_blocks == 3 * 64 // 4


def test_an_end_token_that_the_vocabulary_lacks():
    decoder = copy.copy(tiny_decoder())
    config = dataclasses.replace(decoder.config, eos_token_ids=(10**6,))
    decoder.config = decoder.whole_config = config
    engine = build_engine(decoder, None, EngineOptions(num_blocks=20))
    engine.add_request("a", [1, 2], SamplingParams(min_tokens=2, max_tokens=3))
    while engine.has_unfinished_requests:
        engine.step()


@pytest.mark.parametrize(
    ("window", "memory_policy", "num_blocks", "n"),
    [(8, "paged", 8, 1), (None, "orca-oracle", 5, 1), (None, "orca-pow2", 12, 2)],
)
def test_without_max_tokens_every_pool_is_a_limit(window, memory_policy, num_blocks, n):
    options = EngineOptions(block_size=4, num_blocks=num_blocks, memory_policy=memory_policy)
    engine = build_engine(tiny_decoder(0, window), None, options)
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=None, n=n, ignore_eos=True))
    while engine.has_unfinished_requests:
        (output,) = engine.step()
    most = len(output.outputs[0].token_ids)
    with pytest.raises(InvalidRequestError, match="may need"):
        engine.add_request("b", [1, 2, 3], SamplingParams(max_tokens=most + 1, n=n))


def test_beams_report_the_logprobs_of_the_model():
    params = {"temperature": 0, "min_tokens": 4, "max_tokens": 4, "logprobs": VOCAB}
    engine = engine_of()
    engine.add_request("greedy", [1, 2, 5], SamplingParams(**params))
    engine.add_request("beam", [1, 2, 5], SamplingParams(**params, use_beam_search=True))
    while engine.has_unfinished_requests:
        outputs = engine.step()
    greedy, beam = (output.outputs[0].logprobs for output in outputs)
    assert [list(each) for each in beam] == [list(each) for each in greedy]


def test_no_two_keys_have_one_stream():
    """NumPy fills plain numbers up with zeros, and cuts large ones into several."""
    keys = [(0,), (0, 0), (0, 1), (0, 0, 0), (0, 1, 0), (2**32, 0), (1, 0), (0, 0, 1)]
    keys.append((2**32, 0, 0))
    assert len({Sequence(0, [1], key).random.random() for key in keys}) == len(keys)
