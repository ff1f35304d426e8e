"""PagedAttention with PyTorch's own operators: gather the slots of a sequence, then attend.

Sequences of like shape form a bundle, padded to the longest of it, and each bundle is one
gather and one scaled_dot_product_attention.  Padding repeats a slot that the sequence owns
and is masked, so that nothing is read that nobody wrote.  All index tensors are built once
per step; the gathered keys and values go into one buffer that every layer uses again.

What it costs: the gather moves as many bytes as the attention reads.  A kernel that reads
the blocks in place does without.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.batch import PagedAttention, PagedBatch


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
    """Sequences padded to the same number of queries and the same context length.

    rows: token row of each query, [seqs * queries]; padded queries repeat the last one.
    slots: cache slot of each context position, [seqs * context].
    mask: which context positions a query sees, [seqs, 1, queries, context].
    """

    def __init__(self, batch: PagedBatch, members: np.ndarray) -> None:
        new, context = batch.query_lengths[members], batch.context_lengths[members]
        self.num_seqs, self.queries, self.context = len(members), int(new.max()), int(context.max())

        query = np.minimum(np.arange(self.queries), new[:, None] - 1)
        rows = batch.query_starts[members][:, None] + query
        self.rows = torch.from_numpy(rows.reshape(-1))

        position = np.arange(self.context)
        exists = position < context[:, None]
        logical, offset = np.divmod(np.where(exists, position, 0), batch.block_size)
        blocks = np.take_along_axis(batch.block_tables[members], logical, axis=1)
        self.slots = torch.from_numpy((blocks * batch.block_size + offset).reshape(-1))

        last_seen = (context - new)[:, None] + query  # position of each query in its sequence
        self.mask = torch.from_numpy(position <= last_seen[:, None, :, None])

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, workspace: Workspace
    ) -> Tensor:
        """Attention of all queries of the bundle, [seqs * queries, heads, head_dim]."""
        heads, head_dim = query.shape[1:]
        kv_heads = keys.shape[2]
        # The query heads that share a KV head are more queries on that head:
        # seqs x queries x kv_heads x group x d  ->  seqs x kv_heads x (queries group) x d
        grouped = query[self.rows].view(self.num_seqs, self.queries, kv_heads, -1, head_dim)
        grouped = grouped.transpose(1, 2).flatten(2, 3)
        key = self._gather("keys", keys, workspace)
        value = self._gather("values", values, workspace)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask)
        out = out.view(self.num_seqs, kv_heads, self.queries, -1, head_dim)
        return out.transpose(1, 2).reshape(-1, heads, head_dim)

    def _gather(self, name: str, cache: Tensor, workspace: Workspace) -> Tensor:
        """The slots of all sequences, [seqs, kv_heads, context, head_dim], as a view."""
        kv_heads, head_dim = cache.shape[2:]
        gathered = workspace.take(name, cache, len(self.slots), kv_heads * head_dim)
        torch.index_select(cache.view(-1, kv_heads * head_dim), 0, self.slots, out=gathered)
        return gathered.view(self.num_seqs, self.context, kv_heads, head_dim).transpose(1, 2)


def bundles(batch: PagedBatch) -> list[Bundle]:
    """Put together whose query and context lengths have the same power of two above them."""
    lengths = np.stack((batch.query_lengths, batch.context_lengths))
    powers = np.ceil(np.log2(lengths))
    _, bundle_of = np.unique(powers, axis=1, return_inverse=True)
    bundle_of = bundle_of.reshape(-1)
    return [Bundle(batch, np.flatnonzero(bundle_of == i)) for i in range(int(bundle_of.max()) + 1)]


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
                masks.extend(_additive_mask(part.mask, group, query) for part in parts)
            output = torch.empty_like(query)
            for part, mask in zip(parts, masks, strict=True):
                output[part.rows] = part.attend(query, keys, values, mask, self._workspace)
            return output

        return attention


def _additive_mask(visible: Tensor, group: int, query: Tensor) -> Tensor:
    """0 where a query sees a key and -inf elsewhere, one row for every query head of a group."""
    mask = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, -math.inf)
    return mask.repeat_interleave(group, dim=2) if visible.shape[2] > 1 else mask
