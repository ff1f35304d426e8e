"""T8: every kernel equals contiguous attention, run as it is on a CPU that means it no good.

The emulator (cuda/cuda_on_cpu.h) draws the order of the threads from a seed, knows the bounds
of every array and reports data races; the caches are full of NaN but for the slots that were
written, and the tables are padded with an id that no cache has.  In float64 the kernels must
equal the oracle but for the order of summation; in the types of a GPU they must be as near to
the oracle of the same (rounded) inputs as rounding the output once allows, and the sums, in
float32, add 1e-5.

With a GPU the same bodies run on it (marker `cuda`).
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_attention import Case, place, sequence_shapes

from minipaged.attention import build
from minipaged.attention.batch import PagedBatch
from minipaged.attention.contiguous import contiguous_attention
from minipaged.attention.kernels import (
    DECODING,
    KernelAttention,
    KernelCacheOperations,
    Launch,
    array,
)
from minipaged.attention.native import NativeAttention
from minipaged.errors import ConfigurationError
from minipaged.memory.block_table import BlockCopy
from minipaged.memory.kv_cache import KVCache, KVCacheShape

EXACT_SIZES = (6, 16, 40)  # 3, 8 and 20 chunks of a row: idle lanes, none, more than 16
HEAD_SIZES = (64, 80, 96, 128, 256)
GPU_TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Half a unit in the last place, relative.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])]


def exact_kernels(dtypes, head_sizes):
    """The float64 instances of all sizes in one build."""
    return build.emulated_kernels((torch.float64,), EXACT_SIZES)


def typed_kernels(dtypes, head_sizes):
    """The instances that a GPU runs, in one build, on the CPU."""
    return build.emulated_kernels(GPU_TYPES, HEAD_SIZES)


def compile_for(device):
    return typed_kernels if device == "cpu" else lambda t, h: build.cuda_kernels(t, h)


@st.composite
def exact_cases(draw, most_new=40):
    sequences = draw(st.lists(sequence_shapes(), min_size=1, max_size=4))
    return Case(
        block_size=draw(st.sampled_from([1, 2, 3, 8, 16, 32])),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9])),
        head_dim=draw(st.sampled_from(EXACT_SIZES)),
        sequences=tuple((context, min(new, most_new)) for context, new in sequences),
        seed=draw(st.integers(0, 2**32 - 1)),
        window=draw(st.one_of(st.none(), st.integers(1, 40), st.integers(1, 5))),
    )


def only_decoding(case):
    return dataclasses.replace(case, sequences=tuple((context, 1) for context, _ in case.sequences))


def expected(case, query, kv):
    keys, values = (part.double().split(case.contexts) for part in kv)
    parts = zip(query.double().split(case.queries), keys, values, strict=True)
    return torch.cat([contiguous_attention(q, k, v, case.window) for q, k, v in parts])


def queries_of(case, dtype=torch.float64):
    """Rows of a wider tensor, as the projection of queries, keys and values leaves them."""
    heads = case.kv_heads * case.group
    wide = torch.randn(sum(case.queries), heads + 2, case.head_dim, dtype=torch.float64)
    return wide.to(dtype)[:, :heads]


def check_exactly(case, **kernels):
    torch.manual_seed(case.seed)
    batch, cache, kv = place(case)
    query = queries_of(case)
    attention = KernelAttention(exact_kernels, **kernels)
    attention.kernels(torch.float64, case.head_dim).seed_emulator(case.seed)
    actual = attention(batch)(query, cache.keys[0], cache.values[0])
    torch.testing.assert_close(actual, expected(case, query, kv), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("version", DECODING)
@given(case=exact_cases(), splits=st.integers(1, 5))
def test_decoding_equals_contiguous(version, case, splits):
    check_exactly(only_decoding(case), decode=version, splits=splits)


@given(case=exact_cases())
def test_prompts_equal_contiguous(case):
    check_exactly(case)


@given(case=exact_cases())
def test_the_prompt_kernel_decodes_too(case):
    """A sequence with one new token is a short prompt."""
    case = only_decoding(case)
    torch.manual_seed(case.seed)
    batch, cache, kv = place(case)
    query = queries_of(case)
    output = torch.empty_like(query.contiguous())
    everything = np.arange(batch.num_seqs)
    launch = Launch.of_batch(batch, everything, "prompt", torch.device("cpu"), splits=1)
    launch.run(exact_kernels(None, None), output, query, cache.keys[0], cache.values[0])
    torch.testing.assert_close(output, expected(case, query, kv), rtol=1e-10, atol=1e-12)


@st.composite
def typed_cases(draw):
    return Case(
        block_size=draw(st.sampled_from([8, 16, 32])),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 4, 8])),
        head_dim=draw(st.sampled_from(HEAD_SIZES)),
        sequences=tuple(draw(st.lists(sequence_shapes(), min_size=1, max_size=2))),
        seed=draw(st.integers(0, 2**32 - 1)),
        window=draw(st.one_of(st.none(), st.integers(1, 40))),
    )


def place_typed(case, dtype, device):
    """As `place`, with the cache and everything else in a type of the GPU."""
    batch, cache, kv = place(case)
    keys, values = (part[0].to(dtype).to(device) for part in (cache.keys, cache.values))
    return batch, keys, values, kv.to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", GPU_TYPES, ids=str)
@pytest.mark.parametrize("version", [*DECODING, "prompt"])
@given(case=typed_cases())
@settings(max_examples=15)
def test_in_the_types_of_a_gpu(version, dtype, device, case):
    if version != "prompt":
        case = only_decoding(case)
    torch.manual_seed(case.seed)
    batch, keys, values, kv = place_typed(case, dtype, device)
    query = queries_of(case, dtype)
    decode = None if version == "prompt" else version
    attention = KernelAttention(compile_for(device), device, decode, "prompt", splits=3)
    actual = attention(batch)(query.to(device), keys, values).cpu()
    wanted = expected(case, query, kv)
    torch.testing.assert_close(
        actual.double(), wanted, rtol=ROUNDING[dtype] + 1e-5, atol=1e-5 * kv.abs().max().item()
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@given(case=typed_cases())
@settings(max_examples=15)
def test_tensor_cores(dtype, device, case):
    check_tensor_cores(dtype, device, case)


def check_tensor_cores(dtype, device, case):
    """Their weights are rounded too, each by at most half a unit in the last place."""
    torch.manual_seed(case.seed)
    batch, keys, values, kv = place_typed(case, dtype, device)
    query = queries_of(case, dtype)
    launch = Launch.of_batch(
        batch, np.arange(batch.num_seqs), "tensor_cores", torch.device(device), 1
    )
    output = torch.empty_like(query.contiguous(), device=device)
    kernels = compile_for(device)((dtype,), (case.head_dim,))
    launch.run(kernels, output, query.to(device), keys, values)
    largest = kv.abs().max().item()
    torch.testing.assert_close(
        output.cpu().double(),
        expected(case, query, kv),
        rtol=ROUNDING[dtype] + 1e-5,
        atol=(2 * ROUNDING[dtype] + 1e-5) * largest,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("version", ["step5", "v1", "v2"])
def test_long_contexts(version, device):
    """2,000 tokens, of which the last kernels keep no scores."""
    case = Case(16, 1, 4, 64, ((2000, 1), (1999, 1), (1, 1)), seed=5)
    torch.manual_seed(case.seed)
    batch, keys, values, kv = place_typed(case, torch.float32, device)
    query = queries_of(case, torch.float32)
    attention = KernelAttention(compile_for(device), device, decode=version, splits=6)
    actual = attention(batch)(query.to(device), keys, values).cpu()
    torch.testing.assert_close(actual.double(), expected(case, query, kv), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@given(case=typed_cases())
@settings(max_examples=20)
def test_an_8_bit_cache(dtype, device, case):
    """Written with a scale for each head, read back: equal to attention over what was stored."""
    torch.manual_seed(case.seed)
    batch, cache, kv = place(case)
    kernels = compile_for(device)((dtype,), (case.head_dim,))
    shape = cache.keys[0].shape
    keys, values = (
        torch.full(shape, float("nan")).to(torch.float8_e4m3fn).to(device) for _ in range(2)
    )
    scales = torch.rand(2, case.kv_heads, device=device) * 0.03 + 0.01
    whole = dataclasses.replace(batch, query_lengths=batch.context_lengths)
    assume(case.window is None)  # with a window some slots are gone from the tables
    operations = KernelCacheOperations(kernels, tuple(scales))
    kv = kv.to(dtype).to(device)
    operations.write(keys, values, torch.from_numpy(whole.slots()).to(device), *kv)

    in_units = kv.float() / scales[:, None, :, None]
    stored = in_units.clamp(-448, 448).to(torch.float8_e4m3fn).double()
    stored = stored * scales[:, None, :, None].double()
    query = queries_of(case, dtype)
    for version in ("v1", "v2", "prompt"):
        if version != "prompt" and any(new > 1 for new in case.queries):
            continue
        launch = Launch.of_batch(batch, np.arange(batch.num_seqs), version, torch.device(device), 2)
        output = torch.empty_like(query.contiguous(), device=device)
        launch.run(kernels, output, query.to(device), keys, values, tuple(scales))
        torch.testing.assert_close(
            output.cpu().double(),
            expected(case, query, stored.cpu()),
            rtol=ROUNDING[dtype] + 1e-5,
            atol=1e-4,
        )


POOLS = KVCacheShape(
    num_layers=2, num_blocks=7, block_size=4, num_kv_heads=2, head_dim=6, num_host_blocks=5
)


def filled_cache(operations=None):
    cache = KVCache(POOLS, torch.float64, debug=True, operations=operations)
    torch.manual_seed(0)
    for side in (cache._device, cache._host):
        side.copy_(torch.randn(side.shape, dtype=torch.float64))
    return cache


def check_copies(copies, out=(), back=()):
    ours, theirs = filled_cache(KernelCacheOperations(exact_kernels(None, None))), filled_cache()
    for cache in (ours, theirs):
        cache.copy_blocks(copies)
        cache.swap_out(out)
        cache.swap_in(back)
    assert torch.equal(ours._device, theirs._device), "the pools are not equal"
    assert torch.equal(ours._host, theirs._host), "the host's pools are not equal"


class TestCacheOperations:
    @given(
        blocks=st.permutations(range(7)), count=st.integers(1, 7), hosts=st.permutations(range(5))
    )
    def test_equal_to_torch(self, blocks, count, hosts):
        """Copies, some of them of a block that another one overwrites, and swaps both ways."""
        check_copies(
            [BlockCopy(s, t) for s, t in zip(range(count), blocks, strict=False)],
            [BlockCopy(s, t) for s, t in zip(blocks, hosts, strict=False)],
            [BlockCopy(t, s) for s, t in zip(reversed(blocks), hosts, strict=False)],
        )

    @given(slots=st.permutations(range(28)), count=st.integers(1, 28))
    def test_tokens_are_written_to_their_slots(self, slots, count):
        ours, theirs = (
            filled_cache(KernelCacheOperations(exact_kernels(None, None))),
            filled_cache(),
        )
        wide = torch.randn(count, 6, 6, dtype=torch.float64)  # keys and values are slices
        for cache in (ours, theirs):
            cache.write(1, torch.tensor(slots[:count]), wide[:, 2:4], wide[:, 4:])
        assert torch.equal(ours._device, theirs._device)


def test_a_cache_of_more_than_2_to_the_31_elements():
    """Offsets in 32 bits would read from before the cache, or from the wrong block."""
    block, kv_heads, head_dim = 16, 1, 64
    num_blocks = 2**31 // (block * kv_heads * head_dim) + 10
    try:
        cache = torch.empty(num_blocks, block, kv_heads, head_dim, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    table = [num_blocks - 1, 3, num_blocks - 2]  # only these pages are ever touched
    kv = torch.randn(40, kv_heads, head_dim).to(torch.bfloat16)
    batch = PagedBatch.from_lists(block, [1], [40], [table])
    whole = PagedBatch.from_lists(block, [40], [40], [table])
    operations = KernelCacheOperations(typed_kernels(None, None))
    operations.write(cache, cache, torch.from_numpy(whole.slots()), kv, kv)
    query = torch.randn(1, 4, head_dim).to(torch.bfloat16)
    wanted = contiguous_attention(query.double(), kv.double(), kv.double())
    for version in [*DECODING, "prompt"]:
        launch = Launch.of_batch(batch, np.arange(1), version, torch.device("cpu"), splits=2)
        output = torch.empty_like(query)
        launch.run(typed_kernels(None, None), output, query, cache, cache)
        torch.testing.assert_close(output.double(), wanted, rtol=2**-8, atol=1e-5)


def test_every_order_of_the_threads_gives_the_same():
    case = Case(8, 2, 4, 16, ((67, 5), (30, 1)), seed=1)
    torch.manual_seed(1)
    batch, cache, _ = place(case)
    query = queries_of(case)
    attention = KernelAttention(exact_kernels)
    kernels = attention.kernels(torch.float64, case.head_dim)
    outputs = []
    for seed in range(20):
        kernels.seed_emulator(seed)
        outputs.append(attention(batch)(query, cache.keys[0], cache.values[0]))
    assert all(torch.equal(outputs[0], output) for output in outputs)


@pytest.mark.cuda
@needs_gpu
def test_the_engine_on_a_gpu_generates_what_it_does_on_a_cpu():
    from minipaged import LLM, SamplingParams  # takes long, and the lessons import this file

    prompts = ["ROMEO:", "First Citizen:", "To be, or not to be"]
    params = SamplingParams(temperature=0, max_tokens=40)
    texts = {}
    for attention in ("cuda", "torch"):
        llm = LLM(dtype="float32", attention=attention, num_blocks=20, preemption="swap")
        texts[attention] = [output.outputs[0].text for output in llm.generate(prompts, params)]
    assert texts["cuda"] == texts["torch"]


class TestBadInput:
    def test_a_type_without_kernel(self):
        with pytest.raises(ConfigurationError, match=r"no kernel for torch.int8; choose one of"):
            build.head_size_fits(16, torch.int8)

    @pytest.mark.parametrize(("size", "dtype"), [(20, torch.bfloat16), (512, torch.float32)])
    def test_a_head_size_without_kernel(self, size, dtype):
        with pytest.raises(ConfigurationError, match=f'heads of {size} .* "torch"'):
            build.head_size_fits(size, dtype)

    def test_no_compiler(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(ConfigurationError, match=r"no-such-compiler.*install g"):
            build.find_compiler()

    def test_no_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigurationError, match='"cuda" needs an NVIDIA GPU'):
            build.find_nvcc()

    @pytest.mark.parametrize("native", [False, True])
    def test_a_table_with_a_block_that_the_cache_does_not_have(self, native):
        """What debug mode says before any kernel runs: the sequence, the block, the limit."""
        batch = PagedBatch.from_lists(4, [1, 1], [3, 6], [[0], [1, 9]])
        cache = torch.zeros(5, 4, 1, 6, dtype=torch.float64)
        attention = KernelAttention(exact_kernels, debug=True)
        if native:
            attention = NativeAttention(debug=True)
        query = torch.zeros(2, 1, 6, dtype=torch.float64)
        with pytest.raises(IndexError, match=r"sequence 1 .* logical block 1 .* 9, .* 5 blocks"):
            attention(batch)(query, cache, cache)

    def test_the_emulator_says_where_a_table_leads_out_of_the_cache(self):
        batch = PagedBatch.from_lists(4, [1], [6], [[1, 9]])
        # Of a pool with a second layer, in which the kernel of the first one has no business.
        cache = KVCache(KVCacheShape(2, 5, 4, 1, 6), torch.float64).keys[0]
        query = torch.zeros(1, 1, 6, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"keys\[\d+\] is out of bounds: it has 120 elem"):
            KernelAttention(exact_kernels)(batch)(query, cache, cache)

    def test_an_empty_context(self):
        batch = PagedBatch.from_lists(4, [1, 1], [3, 0], [[0], [1]])
        with pytest.raises(ValueError, match="sequence 1 has a context of 0 tokens"):
            KernelAttention(exact_kernels)(batch)


def test_an_array_ends_with_its_last_element():
    memory = torch.zeros(10, 4)
    assert array(memory)[1] == 40
    assert array(memory[3:, 1:]) == (memory.data_ptr() + 4 * 13, 40 - 13)
    assert array(memory[:2])[1] == 8, "what follows belongs to somebody else"
    assert array(memory[:0])[1] == 0
