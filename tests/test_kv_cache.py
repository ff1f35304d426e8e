"""The tensors behind the block ids: what is written is read, what is copied is equal."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.attention import build
from minipaged.attention.kernels import KernelCacheOperations
from minipaged.errors import ConfigurationError
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.block_table import BlockCopy
from minipaged.memory.kv_cache import KVCache, KVCacheShape

SHAPE = KVCacheShape(
    num_layers=2, num_blocks=6, block_size=4, num_kv_heads=2, head_dim=3, num_host_blocks=5
)


def filled():
    cache = KVCache(SHAPE, torch.float64)
    for side in (cache._device, cache._host):
        side.copy_(torch.randn(side.shape, dtype=torch.float64))
    return cache


def test_tokens_land_in_their_slots_and_nowhere_else():
    cache = KVCache(SHAPE, torch.float64, debug=True)
    slots = torch.tensor([23, 0, 5])
    key, value = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    cache.write(1, slots, key, value)
    assert torch.equal(cache.keys[1].flatten(0, 1)[slots], key)
    assert torch.equal(cache.values[1].flatten(0, 1)[slots], value)
    assert cache.keys[1].isnan().sum() == (24 - 3) * 6
    assert cache.keys[0].isnan().all()
    assert cache.values[0].isnan().all()


@given(
    targets=st.lists(st.integers(0, 5), unique=True, max_size=4), sources=st.permutations(range(6))
)
def test_copies_happen_in_all_layers_at_once(targets, sources):
    """All sources are read before any target is written, as in one kernel launch."""
    cache = filled()
    before = cache._device.clone()
    copies = [BlockCopy(s, t) for s, t in zip(sources, targets, strict=False)]
    cache.copy_blocks(copies)
    for source, target in copies:
        assert torch.equal(cache._device[:, :, target], before[:, :, source])
    untouched = [block for block in range(6) if block not in targets]
    assert torch.equal(cache._device[:, :, untouched], before[:, :, untouched])


def test_a_block_survives_the_way_to_the_host_and_back():
    cache = filled()
    manager = BlockManager(4, 6, 5)
    manager.append(1, 7)
    manager.fork(1, 2)
    manager.append(2, 3)

    # 1: [0, 1]   2: [0, 2, 3]   the copy-on-write is done before anything moves
    def contents():
        return [cache._device[:, :, manager.tables[seq].blocks].clone() for seq in (1, 2)]

    before = contents()
    cache.swap_out(manager.swap_out([1, 2]))
    manager.append(3, 24)  # another sequence takes every device block and overwrites it
    cache._device.fill_(torch.nan)
    manager.free(3)
    cache.swap_in(manager.swap_in([1, 2]))
    for then, now in zip(before, contents(), strict=True):
        assert torch.equal(then, now)


def test_a_freed_block_is_poisoned():
    cache = filled()
    manager = BlockManager(4, 6, on_free=cache.poison)
    manager.append(1, 5)
    block, other = manager.tables[1].blocks
    manager.append(2, 1)
    third = manager.tables[2].blocks[0]
    manager.free(1)
    assert cache._device[:, :, [block, other]].isfinite().all()  # it may yet be swapped out
    cache.swap_out([])  # the next step begins
    assert cache._device[:, :, [block, other]].isnan().all()
    assert cache._device[:, :, third].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_in_bytes(dtype):
    assert KVCache(SHAPE, dtype).num_bytes == 6 * SHAPE.bytes_per_block(dtype)
    # 2 x layers x tokens x heads x head size x bytes
    assert SHAPE.bytes_per_block(dtype) == 2 * 2 * 4 * 2 * 3 * dtype.itemsize


def test_a_host_pool_larger_than_the_memory_is_named():
    shape = dataclasses.replace(SHAPE, num_host_blocks=2**50)
    with pytest.raises(ConfigurationError, match=r"has \d+.0 GiB, more .* lower swap_space_gib"):
        KVCache(shape, torch.float32)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("by", ["torch", "kernel"])
def test_swapping_on_a_gpu_keeps_the_contents(by):
    """From pinned host memory and back; the model overwrites the blocks at once."""
    shape = dataclasses.replace(SHAPE, num_blocks=64, num_host_blocks=64)
    operations = None
    if by == "kernel":
        operations = KernelCacheOperations(build.cuda_kernels((torch.float32,), (64,)))
    cache = KVCache(shape, torch.float32, device="cuda", operations=operations)
    cache._device.normal_()
    expected = cache._device[:, :, :32].clone()
    manager = BlockManager(4, 64, 64)
    manager.append(1, 4 * 32)
    before = manager.tables[1].blocks.copy()
    cache.swap_out(manager.swap_out([1]))
    cache._device.fill_(0)  # what the model would do with the blocks
    cache.swap_in(manager.swap_in([1]))
    now = cache._device[:, :, manager.tables[1].blocks]
    assert torch.equal(now, expected[:, :, before])
