"""The tensors behind the block ids: keys and values of every layer, on the device and the host.

Owns the memory and the three ways to change it: write tokens into slots, copy blocks, swap
blocks.  With torch's operators, or with kernels that do the same.  Which block belongs to whom is
the block manager's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minipaged.errors import ConfigurationError
from minipaged.memory.block_allocator import BlockId
from minipaged.memory.block_table import BlockCopy

LayerCache = Float[Tensor, "num_blocks block_size num_kv_heads head_dim"]
Pool = Float[Tensor, "2 layers num_blocks block_size num_kv_heads head_dim"]


@dataclass(frozen=True)
class KVCacheShape:
    """Sizes of the cache of one model, in elements, blocks and tokens."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    num_host_blocks: int = 0

    def bytes_per_block(self, dtype: torch.dtype) -> int:
        """Keys and values of one block in all layers."""
        elements = 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim
        return elements * dtype.itemsize


class CacheOperations(Protocol):
    """The ways to change a cache's tensors; torch's operators, or kernels that do the same."""

    def write(
        self, keys: LayerCache, values: LayerCache, slots: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Store the keys and values of a step's tokens in their slots, for one layer."""

    def copy(self, source: Pool, target: Pool, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks in all layers at once; everything is read before anything is written."""


class TorchCacheOperations:
    """With torch's operators."""

    def write(
        self, keys: LayerCache, values: LayerCache, slots: Tensor, key: Tensor, value: Tensor
    ) -> None:
        keys.flatten(0, 1).index_copy_(0, slots, key)
        values.flatten(0, 1).index_copy_(0, slots, value)

    def copy(self, source: Pool, target: Pool, pairs: Sequence[tuple[int, int]]) -> None:
        read, written = torch.tensor(pairs).unbind(1)
        blocks = source.index_select(2, read.to(source.device))
        target.index_copy_(2, written.to(target.device), blocks.to(target.device))


class KVCache:
    """Keys and values of all layers; token i is at offset i % B of block table[i // B].

    In debug mode every block is filled with NaN at first and again after it was freed, so that
    a read of a slot that nobody wrote shows in the result.
    """

    def __init__(
        self,
        shape: KVCacheShape,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        debug: bool = False,
        operations: CacheOperations | None = None,
    ) -> None:
        self.shape = shape
        self.debug = debug
        self._operations = operations or TorchCacheOperations()
        self._freed: list[BlockId] = []
        block = (shape.block_size, shape.num_kv_heads, shape.head_dim)
        layers = (2, shape.num_layers)
        # The operating system hands out the pages of `empty` as they are first written.
        self._device = torch.empty(*layers, shape.num_blocks, *block, dtype=dtype, device=device)
        # On the host a block is one piece, which moves at the speed of the bus; with a GPU its
        # pages are pinned, so that a kernel can read and write them.
        on_gpu = self._device.is_cuda
        blocks = (shape.num_host_blocks, *layers, *block)
        try:
            host = torch.empty(*blocks, dtype=dtype, pin_memory=on_gpu)
        except RuntimeError as error:
            size = math.prod(blocks) * dtype.itemsize / 2**30
            raise ConfigurationError(
                f"the pool to swap to has {size:.1f} GiB, more than the host can give; "
                "lower swap_space_gib"
            ) from error
        self._host = host.movedim(0, 2)
        self.keys: tuple[LayerCache, ...] = self._device[0].unbind(0)
        self.values: tuple[LayerCache, ...] = self._device[1].unbind(0)
        if debug:
            self._device.fill_(torch.nan)
            self._host.fill_(torch.nan)

    @property
    def device(self) -> torch.device:
        """Where the pool that the model works on is."""
        return self._device.device

    @property
    def num_bytes(self) -> int:
        """Size of the device pool."""
        return self._device.nbytes

    def write(
        self,
        layer: int,
        slots: Int[Tensor, " tokens"],
        key: Float[Tensor, "tokens num_kv_heads head_dim"],
        value: Float[Tensor, "tokens num_kv_heads head_dim"],
    ) -> None:
        """Store the keys and values of a step's tokens in their slots (section 5.1)."""
        self._operations.write(self.keys[layer], self.values[layer], slots, key, value)

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Perform the copy-on-writes of a step in all layers at once."""
        if pairs := list(copies):
            self._operations.copy(self._device, self._device, pairs)

    def swap_out(self, copies: Iterable[BlockCopy]) -> None:
        """Copy device blocks to host blocks, in all layers at once: the first act of a step."""
        if pairs := list(copies):
            self._operations.copy(self._device, self._host, pairs)
        if self._freed:
            self._device[:, :, self._freed] = torch.nan
            self._freed.clear()

    def swap_in(self, copies: Iterable[BlockCopy]) -> None:
        """Copy host blocks to device blocks, in all layers at once."""
        if pairs := list(copies):
            self._operations.copy(self._host, self._device, pairs)

    def poison(self, block: BlockId) -> None:
        """Overwrite a freed device block with NaN, when the next step has begun.

        A block that is swapped out is freed before its contents are copied to the host.
        """
        self._freed.append(block)
