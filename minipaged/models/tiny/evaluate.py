"""Measures the shipped model: `python -m minipaged.models.tiny.evaluate --text FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.models.decoder import Attend, Decoder
from minipaged.models.loader import load_decoder


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
def nats_per_character(decoder: Decoder, token_ids: list[int], num_characters: int) -> float:
    """Negative log-likelihood of a text's tokens over its number of characters.

    The tokens are cut into windows as long as the context that advance by half of it; each
    token but the first is predicted once, from half a context of tokens or more wherever
    there are so many before it.
    """
    length, tokens = decoder.config.context_length, torch.tensor(token_ids)
    total, predicted = 0.0, 1
    for start in range(0, max(1, len(tokens) - length // 2), length // 2):
        window = tokens[start : start + length]
        logits = decoder(window, torch.arange(len(window)), causal_attend(1))
        new = predicted - start  # what is before it was predicted in the window before
        losses = F.cross_entropy(logits[new - 1 : -1].float(), window[new:], reduction="sum")
        total += losses.item()
        predicted = start + len(window)
    return total / num_characters


def split_text(text: str) -> tuple[str, str]:
    """The text to train on, and the last tenth of the characters, which is held out."""
    cut = len(text) - len(text) // 10
    return text[:cut], text[cut:]


def held_out_loss(text: str) -> float:
    """Nats per character of the shipped weights, in float32, over the held-out tenth."""
    decoder, tokenizer = load_decoder("tiny", torch.float32)
    assert tokenizer is not None
    _, held_out = split_text(text)
    return nats_per_character(decoder, tokenizer.encode(held_out), len(held_out))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="the text it was trained on")
    loss = held_out_loss(parser.parse_args().text.read_text(encoding="utf-8"))
    print(f"{loss:.4f} nats per character of the last tenth")
