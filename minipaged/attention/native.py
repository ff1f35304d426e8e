"""Paged attention on the CPU by a compiled kernel that reads the blocks in place.

`cuda/native_attention.cpp`, compiled when it is first needed; about twice as fast as gathering.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from minipaged.attention import build
from minipaged.attention.batch import (
    PagedAttention,
    PagedBatch,
    check_block_tables,
    check_contexts,
)
from minipaged.attention.gathered import GatheredAttention
from minipaged.attention.kernels import contiguous_heads
from minipaged.errors import ConfigurationError

logger = logging.getLogger("minipaged")


class NativeAttention:
    """Prepares the arrays of each step for the compiled kernel.

    debug: check the block tables of every step, since the kernel would read from anywhere.
    """

    def __init__(self, debug: bool = False) -> None:
        self._run = build.native_attention().native_attention
        self.debug = debug

    def __call__(self, batch: PagedBatch) -> PagedAttention:
        check_contexts(batch)
        arrays = [torch.from_numpy(column) for column in batch.columns().values()]

        def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if self.debug:
                check_block_tables(batch, num_blocks=len(keys))
            query = contiguous_heads(query)
            output = query.new_empty(query.shape)
            scale = 1 / math.sqrt(query.shape[2])
            self._run(output, query, keys, values, *arrays, batch.window or 0, scale)
            return output

        return attention


def native_or_gathered(debug: bool = False) -> NativeAttention | GatheredAttention:
    """The compiled attention; where it cannot be compiled, a warning and PyTorch's."""
    try:
        return NativeAttention(debug)
    except ConfigurationError as error:
        logger.warning("attention runs on PyTorch's own operators instead: %s", error)
        return GatheredAttention()
