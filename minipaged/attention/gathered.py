"""PagedAttention with PyTorch's own operators: gather the slots of a sequence, then attend.

Neighbouring sequences of like shape form a bundle, padded to the longest of it, and each
bundle is one scaled_dot_product_attention; the runner sorts the sequences of a step so that
bundles are large.  Padding repeats a slot that the sequence owns and is masked, so that
nothing is read that nobody wrote.  All index tensors are built once per step, and so are the
views of the two buffers that every layer gathers its keys and values into.

What it costs: the gather moves as many bytes as the attention reads.  A kernel that reads
the blocks in place does without.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.batch import PagedAttention, PagedBatch

# Slots that a bundle may waste: about what one more bundle costs (measured with SmolLM2).
MOST_PADDING = 512
# Slots of a bundle: keys and values of more fall out of the processor's caches before they are
# read (measured with SmolLM2, 1 MiB of second-level cache per core).
MOST_SLOTS = 2048


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
        starts, first = batch.query_starts[seqs], batch.context_starts[seqs, None]
        self.num_seqs, self.queries = len(new), int(new.max())
        self.context = int((context[:, None] - first).max())
        self.rows = slice(int(starts[0]), int(starts[-1] + new[-1]))

        query = np.arange(self.queries)
        exists = query < new[:, None]
        query = np.minimum(query, new[:, None] - 1)  # padding repeats the last one
        self.padded = self.real = None
        if not exists.all():
            self.padded = torch.from_numpy((starts[:, None] - starts[0] + query).reshape(-1))
            self.real = torch.from_numpy(np.flatnonzero(exists))

        position = first + np.arange(self.context)
        logical, offset = np.divmod(np.minimum(position, context[:, None] - 1), batch.block_size)
        blocks = np.take_along_axis(batch.block_tables[seqs], logical, axis=1)
        self.slots = torch.from_numpy((blocks * batch.block_size + offset).reshape(-1))

        last_seen = (context - new)[:, None] + query  # position of each query in its sequence
        distance = last_seen[:, None, :, None] - position[:, None, None]
        visible = distance >= 0
        if batch.window is not None:
            visible &= distance < batch.window
        self.visible = torch.from_numpy(visible)

    def additive_mask(self, group: int, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a key and -inf elsewhere; a row for each query head of a group."""
        mask = torch.zeros(self.visible.shape, dtype=dtype).masked_fill_(~self.visible, -math.inf)
        return mask.repeat_interleave(group, dim=2) if self.queries > 1 else mask

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Attention of the bundle's rows of `query`, [rows, heads, head_dim].

        key, value: gathered for the bundle, [seqs, kv_heads, context, head_dim].
        """
        query = query[self.rows]
        heads, head_dim = query.shape[1:]
        if self.padded is not None:
            query = query.index_select(0, self.padded)
        # The query heads that share a KV head are more queries on that head:
        # seqs x queries x kv_heads x group x d  ->  seqs x kv_heads x (queries group) x d
        kv_heads = key.shape[1]
        grouped = query.view(self.num_seqs, self.queries, kv_heads, -1, head_dim)
        grouped = grouped.transpose(1, 2).flatten(2, 3)
        out = F.scaled_dot_product_attention(grouped, key, value, mask)
        out = out.view(self.num_seqs, kv_heads, self.queries, -1, head_dim)
        out = out.transpose(1, 2).reshape(-1, heads, head_dim)
        return out if self.real is None else out.index_select(0, self.real)


class Buffers(NamedTuple):
    """Where a bundle's keys and values are gathered in every layer, and its mask.

    keys, values: [seqs * context, kv_heads * head_dim]; key, value: the same, as attention has
    them, [seqs, kv_heads, context, head_dim].
    """

    keys: Tensor
    values: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor


def bundles(batch: PagedBatch) -> list[Bundle]:
    """Cut the batch where the query lengths grow apart or the contexts would pad too much."""
    powers = np.ceil(np.log2(batch.query_lengths)).tolist()
    contexts = (batch.context_lengths - batch.context_starts).tolist()
    cuts, longest, total = [0], 0, 0
    for i, context in enumerate(contexts):
        longest, total = max(longest, context), total + context
        slots = longest * (i + 1 - cuts[-1])
        unlike = powers[i] != powers[cuts[-1]]
        if i > cuts[-1] and (unlike or slots - total > MOST_PADDING or slots > MOST_SLOTS):
            cuts.append(i)
            longest = total = context
    return [
        Bundle(batch, slice(start, end))
        for start, end in itertools.pairwise([*cuts, len(contexts)])
    ]


class GatheredAttention:
    """Prepares the attention of each step; keeps one pair of buffers from step to step."""

    def __init__(self) -> None:
        self._buffers = torch.empty(2, 0)

    def __call__(self, batch: PagedBatch) -> PagedAttention:
        parts = bundles(batch)
        views: list[Buffers] = []

        def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if not views:  # the first layer of the step
                views.extend(self._views(parts, query, keys))
            keys, values = keys.flatten(0, 1).flatten(1), values.flatten(0, 1).flatten(1)
            outputs = []
            for part, view in zip(parts, views, strict=True):
                # One bundle at a time, so that what was gathered is still in the caches.
                torch.index_select(keys, 0, part.slots, out=view.keys)
                torch.index_select(values, 0, part.slots, out=view.values)
                outputs.append(part.attend(query, view.key, view.value, view.mask))
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        return attention

    def _views(self, parts: list[Bundle], query: Tensor, keys: Tensor) -> list[Buffers]:
        """Where each bundle is gathered: all at the beginning of the same two buffers."""
        kv_heads, head_dim = keys.shape[2:]
        width = kv_heads * head_dim
        size = max(len(part.slots) for part in parts) * width
        if self._buffers.shape[1] < size or self._buffers.dtype != keys.dtype:
            self._buffers = keys.new_empty(2, size)
        views = []
        for part in parts:
            slots = len(part.slots)
            gathered = self._buffers[:, : slots * width].view(2, slots, width)
            shape = (2, part.num_seqs, part.context, kv_heads, head_dim)
            key, value = gathered.view(shape).transpose(2, 3)
            mask = part.additive_mask(query.shape[1] // kv_heads, query.dtype)
            views.append(Buffers(gathered[0], gathered[1], key, value, mask))
        return views
