"""The tensors behind the block ids: keys and values of every layer, on the device and the host.

Owns the memory and the three ways to change it: write tokens into slots, copy blocks, swap
blocks.  Which block belongs to whom is the block manager's business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
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
        # On the host a block is one piece, which moves at the speed of the bus.  With a GPU its
        # pages are pinned, so that the copies run beside the model on a stream of their own.
        on_gpu = self._device.is_cuda
        self._host = torch.empty(
            shape.num_host_blocks, *layers, *block, dtype=dtype, pin_memory=on_gpu
        )
        self._stream = torch.cuda.Stream(self._device.device) if on_gpu else None
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
        if pairs := list(copies):
            sources, targets = torch.tensor(pairs, device=self._device.device).T
            self._device.index_copy_(2, targets, self._device.index_select(2, sources))

    def swap_out(self, copies: Iterable[BlockCopy]) -> None:
        """Copy device blocks to host blocks, in all layers at once: the first act of a step."""
        if pairs := list(copies):
            sources, targets = zip(*pairs, strict=True)
            with self._beside_the_model():
                ids = torch.tensor(sources, device=self._device.device)
                gathered = self._device.index_select(2, ids).movedim(2, 0).contiguous()
                self._let_the_model_go_on()  # it may overwrite the blocks from here on
                for block, target in zip(gathered, targets, strict=True):
                    self._host[target].copy_(block, non_blocking=True)
        if self._freed:
            self._device[:, :, self._freed] = torch.nan
            self._freed.clear()

    def swap_in(self, copies: Iterable[BlockCopy]) -> None:
        """Copy host blocks to device blocks, in all layers at once."""
        if pairs := list(copies):
            sources, targets = zip(*pairs, strict=True)
            with self._beside_the_model():
                blocks = self._device.new_empty(len(sources), *self._host.shape[1:])
                for block, source in zip(blocks, sources, strict=True):
                    block.copy_(self._host[source], non_blocking=True)
                ids = torch.tensor(targets, device=self._device.device)
                self._device.index_copy_(2, ids, blocks.movedim(0, 2))
                self._let_the_model_go_on()  # it needs the blocks, and waits for them

    @contextlib.contextmanager
    def _beside_the_model(self) -> Iterator[None]:
        """On a GPU, work on the stream of the copies, behind what the model was told to do."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device.device))
        with torch.cuda.stream(self._stream):
            yield

    def _let_the_model_go_on(self) -> None:
        """On a GPU, let the model's stream wait for what the copies' stream was told so far."""
        if self._stream is not None:
            model = torch.cuda.default_stream(self._device.device)
            model.wait_event(self._stream.record_event())

    def poison(self, block: BlockId) -> None:
        """Overwrite a freed device block with NaN, when the next step has begun.

        A block that is swapped out is freed before its contents are copied to the host.
        """
        self._freed.append(block)
