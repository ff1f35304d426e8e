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
    raise NotImplementedError("Task 1.1: contiguous_attention is still to be written")
