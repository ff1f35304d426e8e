"""The tensors behind the block ids: keys and values of every layer, on the device and the host.

Owns the memory and the three ways to change it: write tokens into slots, copy blocks, swap
blocks.  Which block belongs to whom is the block manager's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minipaged.memory.block_allocator import BlockId
from minipaged.memory.block_table import BlockCopy

LayerCache = Float[Tensor, "num_blocks block_size num_kv_heads head_dim"]


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
    ) -> None:
        self.shape = shape
        self.debug = debug
        self._freed: list[BlockId] = []
        block = (shape.block_size, shape.num_kv_heads, shape.head_dim)
        layers = (2, shape.num_layers)
        # The operating system hands out the pages of `empty` as they are first written.
        self._device = torch.empty(*layers, shape.num_blocks, *block, dtype=dtype, device=device)
        self._host = torch.empty(*layers, shape.num_host_blocks, *block, dtype=dtype)
        self.keys: tuple[LayerCache, ...] = self._device[0].unbind(0)
        self.values: tuple[LayerCache, ...] = self._device[1].unbind(0)
        if debug:
            self._device.fill_(torch.nan)
            self._host.fill_(torch.nan)

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
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Perform the copy-on-writes of a step in all layers at once."""
        _copy(self._device, self._device, copies)

    def swap_out(self, copies: Iterable[BlockCopy]) -> None:
        """Copy device blocks to host blocks, in all layers at once: the first act of a step."""
        _copy(self._device, self._host, copies)
        if self._freed:
            self._device[:, :, self._freed] = torch.nan
            self._freed.clear()

    def swap_in(self, copies: Iterable[BlockCopy]) -> None:
        """Copy host blocks to device blocks, in all layers at once."""
        _copy(self._host, self._device, copies)

    def poison(self, block: BlockId) -> None:
        """Overwrite a freed device block with NaN, when the next step has begun.

        A block that is swapped out is freed before its contents are copied to the host.
        """
        self._freed.append(block)


def _copy(source: Tensor, target: Tensor, copies: Iterable[BlockCopy]) -> None:
    pairs = list(copies)
    if pairs:
        sources, targets = torch.tensor(pairs).T
        blocks = source.index_select(2, sources.to(source.device)).to(target.device)
        target.index_copy_(2, targets.to(target.device), blocks)
