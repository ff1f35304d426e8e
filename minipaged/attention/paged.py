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
    block_size, kv_heads, head_dim = keys.shape[1:]
    heads = query.view(kv_heads, -1, head_dim) / math.sqrt(head_dim)  # grouped by KV head
    maximum = heads.new_full((*heads.shape[:2], 1), -math.inf)
    weight_sum = torch.zeros_like(maximum)
    weighted_values = torch.zeros_like(heads)
    for logical in range(first // block_size, -(-end // block_size)):
        start = logical * block_size
        seen = slice(max(first - start, 0), min(end - start, block_size))
        key = keys[table[logical], seen].transpose(0, 1)
        value = values[table[logical], seen].transpose(0, 1)
        scores = heads @ key.mT  # kv_heads x group x seen
        new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        # What was summed so far was relative to the old maximum.
        correction = torch.exp(maximum - new_maximum)
        weights = torch.exp(scores - new_maximum)
        weight_sum = weight_sum * correction + weights.sum(-1, keepdim=True)
        weighted_values = weighted_values * correction + weights @ value
        maximum = new_maximum
    return (weighted_values / weight_sum).view_as(query)


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
