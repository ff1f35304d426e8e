"""The decoding attention of FlashInfer and of flash-attn, where they are installed, on a GPU.

Both are given the caches that ours is given.  FlashInfer reads blocks of any size through a table;
flash-attn only those of 256 tokens, and so it gets the blocks in a row, as one run of tokens for
each sequence.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from minipaged.attention.batch import PagedBatch

Caches = list[tuple[Tensor, Tensor]]  # keys and values of each layer, as PagedAttention has them
Layer = Callable[[int], Tensor]  # the attention of one layer

FLASHINFER_WORKSPACE = 128 * 2**20  # bytes, as its documentation recommends


def is_usable(package: str, query: Tensor) -> bool:
    """Whether it is installed and can compute this: 16 bits to a number, on a GPU."""
    return query.is_cuda and query.itemsize == 2 and importlib.util.find_spec(package) is not None


def compressed_tables(
    batch: PagedBatch,
) -> tuple[Int[np.ndarray, " seqs_plus_one"], Int[np.ndarray, " blocks"], Int[np.ndarray, " seqs"]]:
    """The block tables one behind the other, as FlashInfer wants them, in int32.

    Where the blocks of each sequence begin, the blocks, and the tokens in the last of each.
    """
    num_blocks = -(-batch.context_lengths // batch.block_size)
    used = np.arange(batch.block_tables.shape[1]) < num_blocks[:, None]
    starts = np.concatenate(([0], np.cumsum(num_blocks)))
    in_last = batch.context_lengths - (num_blocks - 1) * batch.block_size
    return (
        starts.astype(np.int32),
        batch.block_tables[used].astype(np.int32),
        in_last.astype(np.int32),
    )


def flashinfer_attention(batch: PagedBatch, query: Tensor, caches: Caches) -> Layer:
    """Over blocks that lie anywhere."""
    import flashinfer  # type: ignore[import-not-found, unused-ignore]

    block_size, kv_heads, head_dim = caches[0][0].shape[1:]
    heads = query.shape[1]
    workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=query.device)
    # Query heads that share a KV head fill the rows of a tensor core, if there are enough.
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=heads // kv_heads >= 4
    )
    tables = [torch.from_numpy(table).to(query.device) for table in compressed_tables(batch)]
    types = {"q_data_type": query.dtype, "kv_data_type": query.dtype}
    decode.plan(*tables, heads, kv_heads, head_dim, block_size, **types)
    return lambda layer: decode.run(query, caches[layer])


def flash_attn_attention(in_a_row: PagedBatch, query: Tensor, caches: Caches) -> Layer:
    """Over the blocks of each sequence as one run of tokens."""
    from flash_attn import (  # type: ignore[import-not-found, unused-ignore]
        flash_attn_with_kvcache,
    )

    lengths = torch.from_numpy(in_a_row.context_lengths.astype(np.int32)).to(query.device)

    def attend(layer: int) -> Tensor:
        keys, values = (pool.view(in_a_row.num_seqs, -1, *pool.shape[2:]) for pool in caches[layer])
        return flash_attn_with_kvcache(query.unsqueeze(1), keys, values, cache_seqlens=lengths)

    return attend
