"""PagedAttention with PyTorch's own operators: gather the slots of a sequence, then attend.

Neighbouring sequences of like shape form a bundle, padded to the longest of it, and each
bundle is one gather and one scaled_dot_product_attention; the runner sorts the sequences of
a step so that bundles are large.  Padding repeats a slot that the sequence owns and is
masked, so that nothing is read that nobody wrote.  All index tensors are built once per
step; the gathered keys and values go into one buffer that every layer uses again.

What it costs: the gather moves as many bytes as the attention reads.  A kernel that reads
the blocks in place does without.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.batch import PagedAttention, PagedBatch

# Slots that a bundle may waste: about what one more bundle costs (measured with SmolLM2).
MOST_PADDING = 512


class Workspace:
    """Buffers for gathered keys and values; they grow to the largest bundle and stay."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor of this shape, with the type and device of `like` and any contents."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype:
            buffer = self._buffers[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(shape)


class Bundle:
    """Consecutive sequences, padded to the same number of queries and the same context length.

    rows: the token rows of its sequences.
    padded: row of each padded query within them, [seqs * queries], or None without padding.
    real: which of the padded queries are not padding, or None.
    slots: cache slot of each context position, [seqs * context].
    visible: which context positions a query sees, [seqs, 1, queries, context].
    """

    def __init__(self, batch: PagedBatch, seqs: slice) -> None:
        new, context = batch.query_lengths[seqs], batch.context_lengths[seqs]
        starts = batch.query_starts[seqs]
        self.num_seqs, self.queries, self.context = len(new), int(new.max()), int(context.max())
        self.rows = slice(int(starts[0]), int(starts[-1] + new[-1]))

        query = np.arange(self.queries)
        exists = query < new[:, None]
        query = np.minimum(query, new[:, None] - 1)  # padding repeats the last one
        self.padded = self.real = None
        if not exists.all():
            self.padded = torch.from_numpy((starts[:, None] - starts[0] + query).reshape(-1))
            self.real = torch.from_numpy(np.flatnonzero(exists))

        position = np.arange(self.context)
        logical, offset = np.divmod(
            np.where(position < context[:, None], position, 0), batch.block_size
        )
        blocks = np.take_along_axis(batch.block_tables[seqs], logical, axis=1)
        self.slots = torch.from_numpy((blocks * batch.block_size + offset).reshape(-1))

        last_seen = (context - new)[:, None] + query  # position of each query in its sequence
        self.visible = torch.from_numpy(position <= last_seen[:, None, :, None])

    def additive_mask(self, group: int, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a key and -inf elsewhere; a row for each query head of a group."""
        mask = torch.zeros(self.visible.shape, dtype=dtype).masked_fill_(~self.visible, -math.inf)
        return mask.repeat_interleave(group, dim=2) if self.queries > 1 else mask

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, workspace: Workspace
    ) -> Tensor:
        """Attention of the bundle's rows, [rows, heads, head_dim]."""
        heads, head_dim = query.shape[1:]
        kv_heads = keys.shape[2]
        query = query[self.rows]
        if self.padded is not None:
            query = query.index_select(0, self.padded)
        # The query heads that share a KV head are more queries on that head:
        # seqs x queries x kv_heads x group x d  ->  seqs x kv_heads x (queries group) x d
        grouped = query.view(self.num_seqs, self.queries, kv_heads, -1, head_dim)
        grouped = grouped.transpose(1, 2).flatten(2, 3)
        key = self._gather("keys", keys, workspace)
        value = self._gather("values", values, workspace)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask)
        out = out.view(self.num_seqs, kv_heads, self.queries, -1, head_dim)
        out = out.transpose(1, 2).reshape(-1, heads, head_dim)
        return out if self.real is None else out.index_select(0, self.real)

    def _gather(self, name: str, cache: Tensor, workspace: Workspace) -> Tensor:
        """The slots of all sequences, [seqs, kv_heads, context, head_dim], as a view."""
        kv_heads, head_dim = cache.shape[2:]
        gathered = workspace.take(name, cache, len(self.slots), kv_heads * head_dim)
        torch.index_select(cache.view(-1, kv_heads * head_dim), 0, self.slots, out=gathered)
        return gathered.view(self.num_seqs, self.context, kv_heads, head_dim).transpose(1, 2)


def bundles(batch: PagedBatch) -> list[Bundle]:
    """Cut the batch where the query lengths grow apart or the contexts would pad too much."""
    powers = np.ceil(np.log2(batch.query_lengths)).tolist()
    contexts = batch.context_lengths.tolist()
    cuts, longest, total = [0], 0, 0
    for i, context in enumerate(contexts):
        longest, total = max(longest, context), total + context
        if powers[i] != powers[cuts[-1]] or longest * (i + 1 - cuts[-1]) - total > MOST_PADDING:
            cuts.append(i)
            longest = total = context
    return [
        Bundle(batch, slice(start, end))
        for start, end in itertools.pairwise([*cuts, len(contexts)])
    ]


class GatheredAttention:
    """Prepares the attention of each step; keeps the buffers from step to step."""

    def __init__(self) -> None:
        self._workspace = Workspace()

    def __call__(self, batch: PagedBatch) -> PagedAttention:
        parts = bundles(batch)
        masks: list[Tensor] = []

        def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if not masks:  # the first layer of the step
                group = query.shape[1] // keys.shape[2]
                masks.extend(part.additive_mask(group, query.dtype) for part in parts)
            outputs = [
                part.attend(query, keys, values, mask, self._workspace)
                for part, mask in zip(parts, masks, strict=True)
            ]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        return attention
