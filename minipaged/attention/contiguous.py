"""Naive attention over contiguous keys and values of one sequence: the oracle of the project.

Every other attention is tested against this one, in float64.  It is written to be
obviously right, not fast: one sequence, all scores at once, the softmax as in the books.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def contiguous_attention(
    query: Float[Tensor, "queries heads head_dim"],
    key: Float[Tensor, "context kv_heads head_dim"],
    value: Float[Tensor, "context kv_heads head_dim"],
    window: int | None = None,
) -> Float[Tensor, "queries heads head_dim"]:
    """Causal attention of the last `queries` tokens of a context (equation 3 of the paper).

    The queries are the last tokens: query i sees the first context - queries + i + 1 keys.
    With fewer key than query heads, `heads / kv_heads` neighbouring query heads share one.
    With a sliding window only the last `window` of those keys are seen (Mistral).
    """
    queries, heads, head_dim = query.shape
    context, kv_heads, _ = key.shape
    key = key.repeat_interleave(heads // kv_heads, dim=1)
    value = value.repeat_interleave(heads // kv_heads, dim=1)

    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(head_dim)
    query_position = torch.arange(context - queries, context).unsqueeze(1)
    key_position = torch.arange(context).unsqueeze(0)
    hidden = key_position > query_position
    if window is not None:
        hidden = hidden | (key_position <= query_position - window)
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), value)
