"""Measures the shipped model: `python -m minipaged.models.tiny.evaluate --text FILE`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from minipaged.models.decoder import Attend, Decoder


def causal_attend(batch_size: int) -> Attend:
    """Attention over a batch of windows of equal length, with no cache."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.unflatten(0, (batch_size, -1)).transpose(1, 2) for t in (query, key, value))
        # Under autocast the rotary embedding has raised queries and keys to float32.
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attend


@torch.inference_mode()
def nats_per_character(decoder: Decoder, tokenizer: Tokenizer, text: str) -> float:
    """Negative log-likelihood of a text over its number of characters.

    The text is cut into windows as long as the context that advance by half of it; each
    token but the first of the text is predicted once, from half a context of tokens or more
    wherever there are so many before it.
    """
    length = decoder.config.context_length
    tokens = torch.tensor(tokenizer.encode(text).ids)
    total, predicted = 0.0, 1
    for start in range(0, max(1, len(tokens) - length // 2), length // 2):
        window = tokens[start : start + length]
        logits = decoder(window, torch.arange(len(window)), causal_attend(1))
        new = predicted - start  # the tokens before it were predicted in the window before
        losses = F.cross_entropy(logits[new - 1 : -1].float(), window[new:], reduction="none")
        total += losses.double().sum().item()
        predicted = start + len(window)
    return total / len(text)
