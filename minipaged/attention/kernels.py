"""The kernels of cuda/ as an attention of the engine: on a GPU, or emulated on the CPU.

Sequences with one new token go to a decoding kernel (v1, or v2 where the context is split),
those with several to the prompt kernel; they read the blocks where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipaged.attention import build
from minipaged.attention.batch import (
    PagedAttention,
    PagedBatch,
    check_block_tables,
    check_contexts,
)
from minipaged.errors import ConfigurationError

DECODING = ("step1", "step2", "step3", "step4", "step5", "v1", "v2")
PROMPT = ("prompt", "tensor_cores")

# Types of cache and queries, and the size of the heads, to the compiled functions.
Compile = Callable[[tuple[torch.dtype, ...], tuple[int, ...]], Any]


Arguments = dict[str, Any]  # fields of a struct in cuda/arguments.h


def array(tensor: Tensor) -> tuple[int, int]:
    """Address of a tensor, and the number of elements from its first to its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), last + 1


def type_name(tensor: Tensor) -> str:
    """The name of its type without "torch."."""
    return str(tensor.dtype).removeprefix("torch.")


class Launch:
    """One decoding or prompt kernel over some sequences.

    columns: PagedBatch.columns of them, where the kernel reads them, at every run anew.
    version: a name in DECODING or PROMPT.
    splits: parts that v2 cuts each context into.
    """

    def __init__(
        self,
        columns: dict[str, Tensor],
        version: str,
        splits: int,
        block_size: int,
        window: int | None,
        max_queries: int,
        max_context: int,
    ) -> None:
        self._columns = columns  # they have to live as long as their addresses are used
        self._version, self._splits = version, splits
        self._num_seqs, max_blocks = columns["block_tables"].shape
        self._arguments: Arguments = {name: array(column) for name, column in columns.items()}
        self._arguments |= {
            "version": version,
            "splits": splits,
            "num_seqs": self._num_seqs,
            "max_blocks": max_blocks,
            "max_queries": max_queries,
            "max_context": max_context,
            "window": window or 0,
            "block_size": block_size,
        }

    @classmethod
    def of_batch(
        cls, batch: PagedBatch, seqs: np.ndarray, version: str, device: torch.device, splits: int
    ) -> Launch:
        """Over some of the sequences of a step."""
        return cls(
            {
                name: torch.from_numpy(column).to(device)
                for name, column in batch.columns(seqs).items()
            },
            version,
            splits,
            batch.block_size,
            batch.window,
            max_queries=int(batch.query_lengths[seqs].max()),
            max_context=int(batch.context_lengths[seqs].max()),
        )

    def run(
        self,
        kernels: Any,
        output: Tensor,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Write the rows of these sequences into `output`; scales: of an 8-bit cache."""
        _, heads, head_dim = query.shape
        kv_heads = keys.shape[2]
        arguments = self._arguments | {
            "output": array(output),
            "query": array(query),
            "keys": array(keys),
            "values": array(values),
            "type": type_name(query),
            "cache_type": type_name(keys),
            "query_stride": query.stride(0),
            "heads": heads,
            "kv_heads": kv_heads,
            "head_size": head_dim,
            "group": heads // kv_heads,
            "scale": 1 / math.sqrt(head_dim),
            "stream": stream_of(query),
        }
        if scales is not None:
            arguments |= {"key_scales": array(scales[0]), "value_scales": array(scales[1])}
        if self._version == "v2":
            accumulator = torch.float64 if query.dtype == torch.float64 else torch.float32
            places = self._num_seqs * heads * self._splits
            workspace = query.new_empty(places * (head_dim + 2), dtype=accumulator)
            arguments["workspace"] = array(workspace)
        kernels.attention(arguments)


def stream_of(tensor: Tensor) -> int:
    """Address of the CUDA stream that this tensor's device works on; 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def contiguous_heads(query: Tensor) -> Tensor:
    """The tensor itself if each token's heads lie next to each other, as they do in a slice."""
    _, heads, head_dim = query.shape
    if query.stride(2) == 1 and (heads == 1 or query.stride(1) == head_dim):
        return query
    return query.contiguous()


class KernelAttention:
    """Prepares the launches of each step.

    decode, prompt: the kernels for sequences with one and with several new tokens; by default
        v1, or v2 where v1 would leave most of the GPU without work, and on a GPU tensor cores
        where the type is one of 16 bits.
    debug: check the block tables of every step, since a kernel would read from anywhere.
    """

    def __init__(
        self,
        compile_kernels: Compile,
        device: str = "cpu",
        decode: str | None = None,
        prompt: str | None = None,
        splits: int | None = None,
        debug: bool = False,
    ) -> None:
        self._compile = compile_kernels
        self.device = torch.device(device)
        self.decode, self.prompt, self.splits = decode, prompt, splits
        self.debug = debug

    def kernels(self, dtype: torch.dtype, head_size: int) -> Any:
        """The functions compiled for this type and size, at the first call for it."""
        build.head_size_fits(head_size, dtype)
        return self._compile((dtype,), (head_size,))

    def cache_operations(self, dtype: torch.dtype, head_size: int) -> KernelCacheOperations:
        """What changes a cache of this type, by kernels of the same build."""
        return KernelCacheOperations(self.kernels(dtype, head_size))

    def __call__(self, batch: PagedBatch) -> PagedAttention:
        check_contexts(batch)
        single = batch.query_lengths == 1
        parts = ((np.flatnonzero(single), True), (np.flatnonzero(~single), False))
        launches: list[Launch] = []

        def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if not launches:  # the first layer of the step
                if self.debug:
                    check_block_tables(batch, num_blocks=len(keys))
                for seqs, decoding in parts:
                    if len(seqs):
                        launches.append(self._launch(batch, seqs, decoding, query, keys))
            kernels = self.kernels(query.dtype, query.shape[2])
            query = contiguous_heads(query)
            output = query.new_empty(query.shape)
            for launch in launches:
                launch.run(kernels, output, query, keys, values)
            return output

        return attention

    def _launch(
        self, batch: PagedBatch, seqs: np.ndarray, decoding: bool, query: Tensor, keys: Tensor
    ) -> Launch:
        if decoding:
            blocks = int(batch.context_lengths[seqs].max()) // batch.block_size
            version, splits = self.decoding_kernel(len(seqs) * keys.shape[2], blocks)
        else:
            suits = self.prompt is None and self._suits_tensor_cores(query, keys)
            version, splits = self.prompt or ("tensor_cores" if suits else "prompt"), 1
        return Launch.of_batch(batch, seqs, version, self.device, splits)

    def _suits_tensor_cores(self, query: Tensor, keys: Tensor) -> bool:
        """On a CPU nothing is gained by them, and the weights are rounded."""
        head_size = query.shape[2]
        if not query.is_cuda or not query.itemsize == keys.itemsize == 2 or head_size % 16:
            return False
        # Tiles of larger heads fit only where a thread block may have as much as on an A100.
        properties = torch.cuda.get_device_properties(self.device)
        memory = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return head_size <= 128 or memory >= 160 * 1024

    def decoding_kernel(self, thread_blocks: int, blocks: int) -> tuple[str, int]:
        """Which kernel decodes contexts of so many KV blocks, and in how many parts.

        So many that there are a few thread blocks for every processor.  Each part is at least 16
        KV blocks, four for each warp: adding up costs time as well.
        """
        splits = self.splits or 1
        if self.splits is None and self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
            splits = max(1, min(4 * processors // thread_blocks, blocks // 16))
        return self.decode or ("v2" if splits > 1 else "v1"), splits


class KernelCacheOperations:
    """What KVCache does to its tensors, done by the kernels: one launch for each call.

    scales: of keys and values, for an 8-bit cache, [kv_heads] each in float32.
    """

    def __init__(self, kernels: Any, scales: tuple[Tensor, Tensor] | None = None) -> None:
        self._kernels, self._scales = kernels, scales

    def write(
        self, keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Store the keys and values of tokens, [tokens, kv_heads, head_dim], in their slots."""
        key, value = contiguous_heads(key), contiguous_heads(value)
        tensors = {"key": key, "value": value, "keys": keys, "values": values, "slots": slots}
        if self._scales is not None:
            tensors |= {"key_scales": self._scales[0], "value_scales": self._scales[1]}
        self._kernels.write_cache(
            {name: array(tensor) for name, tensor in tensors.items()}
            | {
                "type": type_name(key),
                "cache_type": type_name(keys),
                "key_stride": key.stride(0),
                "value_stride": value.stride(0),
                "num_tokens": len(key),
                "kv_heads": key.shape[1],
                "head_size": key.shape[2],
                "stream": stream_of(key),
            }
        )

    def copy(self, source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks from one pool to another, or within one.

        source, target: [2, layers, num_blocks, block_size, kv_heads, head_dim], strided as the
            pool lies in memory; on a GPU the host's pool is pinned, and read over the bus.
        """
        sources, targets = zip(*pairs, strict=True)
        if source.data_ptr() == target.data_ptr() and set(sources) & set(targets):
            # A block that is read is also written: nobody could say which comes first.
            source = source[:, :, list(sources)].contiguous()
            pairs = list(enumerate(targets))
        ids = torch.tensor(pairs, dtype=torch.int64, device=self._device(source, target))
        piece, chunk = math.prod(source.shape[3:]), 16 // source.itemsize
        if piece % chunk:
            raise ConfigurationError(
                f"a block has {piece * source.itemsize} bytes of keys in a layer; the kernels copy "
                "multiples of 16 bytes, so choose a larger block_size"
            )
        self._kernels.copy_cache(
            {
                "source": (source.data_ptr(), source.untyped_storage().nbytes() // 16),
                "target": (target.data_ptr(), target.untyped_storage().nbytes() // 16),
                "pairs": array(ids),
                "source_plane": source.stride(1) // chunk,
                "source_block": source.stride(2) // chunk,
                "target_plane": target.stride(1) // chunk,
                "target_block": target.stride(2) // chunk,
                "chunks": piece // chunk,
                "num_pairs": len(pairs),
                "num_planes": source.shape[0] * source.shape[1],
                "stream": stream_of(ids),
            }
        )

    @staticmethod
    def _device(*pools: Tensor) -> torch.device:
        """Where the kernel runs: on the GPU that one of the pools lies on."""
        return next((pool.device for pool in pools if pool.is_cuda), pools[0].device)
