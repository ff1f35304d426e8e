"""PagedAttention block by block, as the paper defines it (section 4.1, equation 4).

The slow and obvious version: one sequence, one query, one block at a time, with the running
maximum and sum of an online softmax.  It never puts a sequence's keys next to each other,
which is the whole point; `gathered.py` is the fast version and must equal it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minipaged.attention.batch import PagedAttention, PagedBatch


def attend_over_blocks(
    query: Tensor, keys: Tensor, values: Tensor, table: list[int], first: int, end: int
) -> Tensor:
    """Attention of one token, [heads, head_dim], over the tokens first .. end - 1 of its table."""
    raise NotImplementedError("Task 5.4: attend_over_blocks is still to be written")


def prepare(batch: PagedBatch) -> PagedAttention:
    """The attention of one step, token by token."""
    window = batch.window or int(batch.context_lengths.max())
    rows = [
        (seq, position)
        for seq, (new, context) in enumerate(
            zip(batch.query_lengths, batch.context_lengths, strict=True)
        )
        for position in range(context - new, context)
    ]

    def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        outputs = [
            attend_over_blocks(
                q,
                keys,
                values,
                batch.block_tables[seq].tolist(),
                max(0, position + 1 - window),
                position + 1,
            )
            for q, (seq, position) in zip(query, rows, strict=True)
        ]
        return torch.stack(outputs)

    return attention
