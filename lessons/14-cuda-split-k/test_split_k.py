"""Lesson 14: v1 and v2 equal contiguous attention (T8), and what a step costs."""

import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import quick_kernels
import torch
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st
from lesson_kernels import Emulator
from test_attention import Case, place
from test_kernels import expected, queries_of

from minipaged.attention.kernels import KernelAttention, Launch, array
from minipaged.course.narration import story
from minipaged.course.notation import name
from minipaged.evaluation.cost_model import (
    BYTES,
    DEPLOYMENTS,
    MATMUL_EFFICIENCY,
    READ_EFFICIENCY,
    CostModel,
    StepWork,
)
from minipaged.scheduling.step_plan import ScheduledSequence

HEAD_SIZE = 16


KERNELS = Emulator(HEAD_SIZE, versions=("v1", "v2"))


@st.composite
def decoding_cases(draw):
    contexts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=2))
    return Case(
        block_size=draw(st.sampled_from([1, 2, 3, 4, 16])),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 4, 5, 7, 8, 9])),
        head_dim=HEAD_SIZE,
        sequences=tuple((context, 1) for context in contexts),
        seed=draw(st.integers(0, 2**16)),
    )


def tell(case, batch, call):
    story.begin()
    story.tell(f"block_size, head_size = {case.block_size}, {case.head_dim}")
    story.tell(f"heads, kv_heads = {case.kv_heads * case.group}, {case.kv_heads}")
    for seq, context in enumerate(case.contexts):
        table = batch.block_tables[seq][: -(-context // case.block_size)].tolist()
        story.tell(f"# table {name(seq)}: {table}   {context} tokens")
    story.tell(call)


def compare(actual, wanted, what):
    """Both [seqs, heads, head_size]."""
    close = torch.isclose(actual, wanted, rtol=1e-9, atol=1e-11)
    for seq, head, element in (~close).nonzero().tolist()[:1]:
        got, right = actual[seq, head, element].item(), wanted[seq, head, element].item()
        why = ": not written, or computed from a slot that nobody wrote" if got != got else ""
        raise AssertionError(
            f"{what}[{element}] of head {head} of sequence {name(seq)} "
            f"is {got:.5g}{why}; it must be {right:.5g}"
        )


def run(kernels, case, batch, cache, query, version, splits):
    KERNELS.seed_emulator(case.seed)
    output = torch.full(query.shape, math.nan, dtype=torch.float64)
    seqs = np.arange(batch.num_seqs)
    launch = Launch.of_batch(batch, seqs, version, torch.device("cpu"), splits)
    launch.run(kernels, output, query, cache.keys[0], cache.values[0])
    return output


@pytest.mark.task("14.1")
@given(case=decoding_cases())
@at_most(25)
def test_v1_equals_contiguous_attention(case):
    torch.manual_seed(case.seed)
    batch, cache, kv = place(case)
    query = queries_of(case)
    tell(case, batch, "v1(queries, cache, tables)")
    output = run(KERNELS, case, batch, cache, query, "v1", 1)
    compare(output, expected(case, query, kv), "output")


class FirstKernelOnly:
    """Runs v2 and keeps the workspace that its first kernel leaves; the second is task 14.3's."""

    def __init__(self, seqs, heads, splits):
        self.sizes = seqs, heads, splits
        self.memory = torch.full((math.prod(self.sizes) * (HEAD_SIZE + 2),), math.nan).double()

    def attention(self, arguments):
        try:
            KERNELS.attention(arguments | {"workspace": array(self.memory)})
        except NotImplementedError as error:
            if "add_up_splits" not in str(error):
                raise

    def parts(self):
        """Largest score and sum of weights [seqs, heads, splits], weighted values of each part."""
        places = math.prod(self.sizes)
        values, largest, weight_sum = self.memory.split([places * HEAD_SIZE, places, places])
        return (
            largest.view(self.sizes),
            weight_sum.view(self.sizes),
            values.view(*self.sizes, HEAD_SIZE),
        )


def run_first_kernel(case, splits, no_keys=False):
    torch.manual_seed(case.seed)
    batch, cache, kv = place(case)
    if no_keys:
        cache.keys[0].mul_(0)
    query = queries_of(case)
    call = "paged_attention_v2(queries, cache, tables, workspace)"
    tell(case, batch, f"workspace.splits = {splits}")
    if no_keys:
        story.tell("keys[...] = 0", "so that every token has the weight 1")
    story.tell(call)
    kernel = FirstKernelOnly(batch.num_seqs, query.shape[1], splits)
    run(kernel, case, batch, cache, query, "v2", splits)
    return kernel.parts(), expected(case, query, kv)


splits_drawn = st.integers(1, 6)


@pytest.mark.task("14.2")
@given(case=decoding_cases(), splits=splits_drawn)
@at_most(20)
def test_every_token_is_in_one_part(case, splits):
    """With keys of 0 all scores are 0 and all weights 1: the sums count tokens."""
    (largest, weight_sum, _), _ = run_first_kernel(case, splits, no_keys=True)
    for seq, context in enumerate(case.contexts):
        blocks = -(-context // case.block_size)
        for head in range(case.kv_heads * case.group):
            counts = [
                total if not total else total * math.exp(most)
                for most, total in zip(
                    largest[seq, head].tolist(), weight_sum[seq, head].tolist(), strict=True
                )
            ]
            who = f"the parts of sequence {name(seq)}, head {head}, have {counts} tokens"
            if not math.isclose(sum(counts), context, rel_tol=1e-9):
                raise AssertionError(f"{who}: {sum(counts):g} in all, of a context of {context}")
            most = -(-blocks // splits) * case.block_size
            if max(counts) > most + 1e-9:
                raise AssertionError(
                    f"{who}: {blocks} blocks in {splits} parts are at most {most} tokens a part"
                )


@pytest.mark.task("14.2")
@given(case=decoding_cases(), splits=splits_drawn)
@at_most(20)
def test_the_parts_together_are_the_attention(case, splits):
    (largest, weight_sum, values), wanted = run_first_kernel(case, splits)
    if not weight_sum.isfinite().all() or not values.isfinite().all():
        raise AssertionError("a part left a sum in the workspace unwritten, or infinite")
    filled = weight_sum > 0
    best = torch.where(filled, largest, -math.inf).amax(-1, keepdim=True)
    factor = torch.where(filled, (largest - best).exp(), 0.0)
    total = (weight_sum * factor).sum(-1, keepdim=True)
    story.tell("output = the parts added up, as this test does it")
    compare((values * factor[..., None]).sum(2) / total, wanted, "output")


@pytest.mark.task("14.3")
@given(case=decoding_cases(), splits=splits_drawn, sunk=st.booleans())
@at_most(25)
def test_v2_equals_contiguous_attention(case, splits, sunk):
    torch.manual_seed(case.seed)
    batch, cache, kv = place(case)
    query = queries_of(case)
    if sunk:
        query, kv = quick_kernels.sink_scores(query, cache, kv)
    below = "   # every score is far below 0" if sunk else ""
    tell(case, batch, f"v2(queries, cache, tables, splits={splits}){below}")
    output = run(KERNELS, case, batch, cache, query, "v2", splits)
    compare(output, expected(case, query, kv), "output")


# ---- 14.4 ---------------------------------------------------------------------------------


@pytest.mark.task("14.4")
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_keys_and_values_of_a_token(deployment):
    model = DEPLOYMENTS[deployment].model
    story.begin()
    story.tell(f"{model.num_layers} layers, keys of {model.kv_hidden} numbers of {BYTES} bytes")
    got = model.kv_bytes_per_token
    wanted = model.num_layers * (model.kv_hidden + model.kv_hidden) * BYTES
    assert got == wanted, f"a token of {deployment} takes {wanted} bytes in the cache, not {got}"


sequences = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 200)), max_size=4)


@pytest.mark.task("14.4")
@given(first=sequences, second=sequences)
def test_the_work_of_a_step_is_counted(first, second):
    story.begin()
    story.tell("work = StepWork()")
    work = StepWork()
    tokens = context_tokens = pairs = 0
    for added in (first, second):
        story.tell(f"work.add({added})", "(new tokens, tokens in the cache before)")
        work.add(
            ScheduledSequence(seq, tuple(range(new)), cached, (), True)
            for seq, (new, cached) in enumerate(added)
        )
        for new, cached in added:
            tokens += new
            context_tokens += cached + new
            pairs += sum(cached + i + 1 for i in range(new))
        assert work.tokens == tokens, "every new token goes through the layers once"
        assert work.context_tokens == context_tokens, "the context includes the new tokens"
        # Half a key more or less for each query: a query sees itself, or half of itself.
        if not pairs - tokens / 2 - 1e-6 <= work.pairs <= pairs + 1e-6:
            pytest.fail(f"{work.pairs} pairs of a query and a key that it sees; there are {pairs}")


@pytest.mark.task("14.4")
@given(
    name=st.sampled_from(sorted(DEPLOYMENTS)),
    tokens=st.integers(0, 4000),
    context=st.integers(0, 400_000),
    pairs=st.integers(0, 10**8),
    copied=st.integers(0, 5),
    moved=st.integers(0, 5),
)
def test_the_slower_of_reading_and_computing_counts(name, tokens, context, pairs, copied, moved):
    deployment = DEPLOYMENTS[name]
    model, gpu, n = deployment.model, deployment.gpu, deployment.num_gpus
    cost = CostModel(deployment, block_size=16)
    work = StepWork(tokens, context, pairs, copied, moved)
    story.begin()
    story.tell(f"cost = CostModel(DEPLOYMENTS[{name!r}], block_size=16)")
    story.tell(f"cost.seconds({work})")
    bandwidth = n * gpu.bandwidth * READ_EFFICIENCY
    operations = n * gpu.operations * MATMUL_EFFICIENCY
    read_weights = model.num_weights * BYTES / bandwidth
    compute_tokens = tokens * 2 * model.num_weights / operations
    kv_bytes = 2 * model.num_layers * model.kv_hidden * BYTES
    read_contexts = context * kv_bytes / bandwidth
    compute_pairs = pairs * 4 * model.num_layers * model.hidden / operations
    # What is given: links between GPUs, copies and swaps.
    rest = cost._reduce + tokens * cost._reduce_token + copied * cost._copy + moved * cost._move
    wanted = max(read_weights, compute_tokens) + max(read_contexts, compute_pairs) + rest
    got = cost.seconds(work)
    if not math.isclose(got, wanted, rel_tol=1e-9):
        pytest.fail(
            f"the step takes {wanted * 1e3:.4f} ms, not {got * 1e3:.4f}: weights are read in "
            f"{read_weights * 1e3:.3f} ms and computed with in {compute_tokens * 1e3:.3f}, "
            f"contexts read in {read_contexts * 1e3:.3f} and computed with in "
            f"{compute_pairs * 1e3:.3f}; links, copies and swaps {rest * 1e3:.3f}"
        )


# ---- 14.5 ---------------------------------------------------------------------------------


@pytest.mark.task("14.5")
@given(
    processors=st.integers(1, 200), thread_blocks=st.integers(1, 600), blocks=st.integers(0, 8000)
)
def test_as_many_parts_as_fill_the_gpu_and_no_smaller_than_16_blocks(
    processors, thread_blocks, blocks
):
    story.begin()
    story.tell(f"# a GPU of {processors} processors")
    story.tell(f"decoding_kernel(thread_blocks={thread_blocks}, blocks={blocks})")
    gpu = SimpleNamespace(multi_processor_count=processors)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=gpu):
        version, splits = KernelAttention(None, "cuda").decoding_kernel(thread_blocks, blocks)

    def fits(splits):
        return splits * thread_blocks <= 4 * processors and splits * 16 <= blocks

    assert isinstance(splits, int), f"{splits} is no whole number of parts"
    assert splits >= 1, f"a context cannot be in {splits} parts"
    if splits > 1 and not fits(splits):
        pytest.fail(
            f"{splits} parts are too many: {splits * thread_blocks} thread blocks for "
            f"{processors} processors, {blocks / splits:.1f} KV blocks a part"
        )
    assert not fits(splits + 1), f"{splits} parts are too few: {splits + 1} would fit"
    wanted = "v2" if splits > 1 else "v1"
    assert version == wanted, f"{splits} parts are for {wanted}, not for {version}"


@pytest.mark.task("14.5")
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("decode", [None, "step5", "v2"])
def test_what_was_asked_for_goes_first(decode, splits):
    story.begin()
    story.tell(f"attention = KernelAttention(compile, decode={decode!r}, splits={splits})", "a CPU")
    story.tell("attention.decoding_kernel(thread_blocks=1, blocks=4000)")
    attention = KernelAttention(None, decode=decode, splits=splits)
    got = attention.decoding_kernel(1, 4000)
    wanted = (decode or ("v2" if splits == 3 else "v1"), splits or 1)
    assert got == wanted, f"on a CPU, where nothing is gained by splitting: {wanted}, not {got}"
