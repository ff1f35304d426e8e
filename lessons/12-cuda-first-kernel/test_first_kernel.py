"""Lesson 12: the first kernels, on an emulated GPU, equal torch and contiguous attention (T8)."""

import dataclasses
import mmap

import numpy as np
import pytest
import torch
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st
from lesson_kernels import Emulator, check_decoding
from test_attention import Case
from test_kernels import filled_cache

from minipaged.attention.batch import PagedBatch
from minipaged.attention.contiguous import contiguous_attention
from minipaged.attention.kernels import KernelCacheOperations, Launch
from minipaged.course.narration import story
from minipaged.memory.block_table import BlockCopy

HEAD_SIZE = 16


KERNELS = Emulator(HEAD_SIZE, versions=("step1", "prompt"))


# ---- 12.1 ---------------------------------------------------------------------------------


@pytest.mark.task("12.1")
@given(
    kv_heads=st.sampled_from([1, 2, 9]),
    block_size=st.sampled_from([1, 4]),
    slots=st.permutations(range(8)),
    count=st.integers(1, 8),
    padding=st.integers(0, 2),
)
@at_most(40)
def test_tokens_are_written_to_their_slots(kv_heads, block_size, slots, count, padding):
    slots = [*slots[:count], *[-1, -16][:padding]]
    story.begin()
    story.tell(f"block_size, kv_heads, head_size = {block_size}, {kv_heads}, {HEAD_SIZE}")
    story.tell(f"slots = {slots}", "below 0: a row that only fills up the batch")
    torch.manual_seed(0)
    # Rows are slices of wider rows, as the projection of queries, keys and values leaves them.
    key = torch.randn(len(slots), kv_heads + 2, HEAD_SIZE, dtype=torch.float64)[:, 2:]
    value = torch.randn(len(slots), kv_heads + 1, HEAD_SIZE, dtype=torch.float64)[:, :-1]
    story.tell("write(keys, values, slots, key, value)")
    cache = torch.full((2, 8, kv_heads, HEAD_SIZE), -1.0, dtype=torch.float64)
    keys, values = cache.view(2, 8 // block_size, block_size, kv_heads, HEAD_SIZE)
    KernelCacheOperations(KERNELS).write(keys, values, torch.tensor(slots), key, value)
    for part, array, rows in (("keys", cache[0], key), ("values", cache[1], value)):
        for slot in range(8):
            wanted = rows[slots.index(slot)] if slot in slots else torch.full_like(rows[0], -1)
            wrong = (array[slot] != wanted).flatten().nonzero().flatten().tolist()
            where = f"slot {slot} of the {part}"
            if wrong and slot not in slots:
                pytest.fail(f"{where} is nobody's, and was changed at elements {wrong[:4]}")
            if wrong:
                pytest.fail(
                    f"{where} must hold token {slots.index(slot)}; {len(wrong)} of its "
                    f"{wanted.numel()} elements do not, the first of them {wrong[:4]}"
                )


def large_memory(elements):
    """Memory of which only the touched pages take room."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, elements * 8, flags=flags)
    except (OSError, ValueError):
        pytest.skip("no 16 GiB of address space")
    return torch.frombuffer(memory, dtype=torch.float64)


FAR = 2**31 // HEAD_SIZE + 5  # a slot whose elements lie beyond 2^31


@pytest.mark.task("12.1")
def test_a_slot_beyond_2_to_the_31_elements():
    slots = [3, FAR]
    story.begin()
    story.tell(f"slots = {slots}", f"times {HEAD_SIZE} elements: more than 32 bits can say")
    keys = large_memory((FAR + 11) * HEAD_SIZE)[: (FAR + 11) * HEAD_SIZE].view(-1, 16, 1, HEAD_SIZE)
    key = torch.randn(2, 1, HEAD_SIZE, dtype=torch.float64)
    KernelCacheOperations(KERNELS).write(keys, keys, torch.tensor(slots), key, key)
    for token, slot in enumerate(slots):
        there = keys.view(-1, 1, HEAD_SIZE)[slot]
        assert torch.equal(there, key[token]), f"token {token} is not in slot {slot}"


# ---- 12.2 ---------------------------------------------------------------------------------


@pytest.mark.task("12.2")
@given(blocks=st.permutations(range(7)), count=st.integers(1, 5), hosts=st.permutations(range(5)))
@at_most(40)
def test_blocks_are_copied_in_all_layers(blocks, count, hosts):
    pairs = list(zip(blocks, hosts, strict=False))[:count]
    copies = list(zip(blocks[:count], blocks[count:], strict=False))
    story.begin()
    story.tell("cache = 2 layers, 7 blocks of the device, 5 of the host")
    ours, theirs = filled_cache(KernelCacheOperations(KERNELS)), filled_cache()
    for operation, ids in (
        ("copy_blocks", copies),
        ("swap_out", pairs),
        ("swap_in", [(host, block) for block, host in reversed(pairs)]),
    ):
        story.tell(f"cache.{operation}({ids})", "(source, target)")
        for cache in (ours, theirs):
            getattr(cache, operation)([BlockCopy(source, target) for source, target in ids])
        for pool in ("device", "host"):
            same = getattr(ours, f"_{pool}") == getattr(theirs, f"_{pool}")
            wrong = (~same.flatten(3).all(3)).nonzero().tolist()
            for part, layer, block in wrong[:1]:
                pytest.fail(
                    f"after {operation}, block {block} of the {pool} does not have the "
                    f"{['keys', 'values'][part]} of layer {layer} that it must have"
                )


# ---- 12.3 and 12.4 ------------------------------------------------------------------------


@st.composite
def decoding_cases(draw):
    contexts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    return Case(
        block_size=draw(st.sampled_from([1, 2, 3, 4, 16])),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        head_dim=HEAD_SIZE,
        sequences=tuple((context, 1) for context in contexts),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.task("12.3")
@given(case=decoding_cases())
@at_most(30)
def test_every_token_is_found_through_the_table(case):
    check_decoding(KERNELS, case, "prompt")  # the kernel for prompts, which no lesson asks for


@pytest.mark.task("12.3")
def test_a_block_beyond_2_to_the_31_elements():
    block_size = 16
    num_blocks = FAR // block_size + 3
    table = [num_blocks - 1, 2, num_blocks - 2]
    story.begin()
    story.tell(f"block_size, heads, head_size = {block_size}, 1, {HEAD_SIZE}")
    story.tell(f"# table A: {table}   40 tokens", f"of {num_blocks} blocks")
    size = num_blocks * block_size * HEAD_SIZE
    keys = large_memory(size).view(num_blocks, block_size, 1, HEAD_SIZE)
    kv = torch.randn(40, 1, HEAD_SIZE, dtype=torch.float64)
    slots = PagedBatch.from_lists(block_size, [40], [40], [table]).slots()
    keys.view(-1, 1, HEAD_SIZE)[torch.from_numpy(slots)] = kv
    query = torch.randn(1, 1, HEAD_SIZE, dtype=torch.float64)
    batch = PagedBatch.from_lists(block_size, [1], [40], [table])
    output = torch.empty_like(query)
    story.tell("prompt(queries, cache, tables)")
    launch = Launch.of_batch(batch, np.arange(1), "prompt", torch.device("cpu"), splits=1)
    launch.run(KERNELS, output, query, keys, keys)
    if not torch.allclose(output, contiguous_attention(query, kv, kv)):
        pytest.fail("the attention over these three blocks is not what it must be")


@pytest.mark.task("12.4")
@given(case=decoding_cases(), larger=st.sampled_from([1.0, 1.0, 300.0, -1.0]))
@at_most(60)
def test_step1_equals_contiguous_attention(case, larger):
    check_decoding(KERNELS, case, "step1", larger)


@pytest.mark.task("12.4")
@given(case=decoding_cases(), new=st.integers(2, 4))
@at_most(15)
def test_step1_beside_a_prompt(case, new):
    """The rows of a prompt come first: the query of a sequence is not in the row of its number."""
    check_decoding(
        KERNELS, dataclasses.replace(case, sequences=((7, new), *case.sequences)), "step1"
    )
