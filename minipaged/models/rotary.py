"""Rotary position embedding: the angles, and turning queries and keys by them.

The pairs are (i, i + head_dim / 2), as in the checkpoints of Hugging Face.  GGUF files of
LLaMA models pair neighbours instead; the loader undoes that.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minipaged.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float[Tensor, " half"]:
    """Radians that each pair turns per position, in float64, after scaling."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = rope.theta**-exponents
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        # A pair that turns more than high_freq_factor times over the trained length is kept,
        # one that turns less than low_freq_factor times is slowed by factor, others are blended.
        turns = rope.original_max_positions * frequencies / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / rope.factor
    return frequencies


def rotation_table(
    rope: RopeConfig, head_dim: int, positions: int, dtype: torch.dtype
) -> Float[Tensor, "positions 2 half"]:
    """Cosine and sine of every position's angles, computed in float64 and rounded once."""
    angles = torch.outer(
        torch.arange(positions, dtype=torch.float64), inverse_frequencies(rope, head_dim)
    )
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(dtype)


def look_up(
    table: Float[Tensor, "positions 2 half"], positions: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, "tokens 1 head_dim"], Float[Tensor, "tokens 1 head_dim"]]:
    """The cosines and signed sines of these positions, once per step for all layers."""
    cos, sin = table[positions].unbind(dim=1)
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def rotate(
    heads: Float[Tensor, "tokens heads head_dim"],
    cos: Float[Tensor, "tokens 1 head_dim"],
    signed_sin: Float[Tensor, "tokens 1 head_dim"],
) -> Float[Tensor, "tokens heads head_dim"]:
    """Turn each pair (a, b) into (a cos - b sin, b cos + a sin)."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * cos, swapped, signed_sin)
