"""Does paging change what a model knows?  Its loss on a text, paged and in transformers.

The text is cut into windows; each is computed in chunks through block tables whose blocks lie in
no order, as in the engine, and every token but the first of a window is predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention import attention_backend, device_of
from minipaged.attention.batch import PagedAttention, PagedBatch
from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.evaluation.throughput import Transformers
from minipaged.evaluation.workload import read_file
from minipaged.memory.kv_cache import KVCache, KVCacheShape, TorchCacheOperations
from minipaged.models.decoder import Attend, Decoder
from minipaged.models.loader import load_decoder

CHUNK = 100  # tokens of a pass: no multiple of a block


class Float8Rounding(TorchCacheOperations):
    """Stores what an 8-bit cache (e4m3, scale 1) would hold, in the model's type."""

    def write(
        self, keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Round, then store."""
        key, value = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (key, value))
        super().write(keys, values, slots, key, value)


@dataclass(frozen=True)
class Loss:
    """nats: mean loss per predicted token; perplexity is its exponential."""

    system: str
    dtype: str
    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """How many tokens the model hesitates between, so to speak."""
        return math.exp(self.nats)


def measure_losses(
    model: str, text: str, dtypes: list[torch.dtype], window: int, attention: str, against: bool
) -> list[Loss]:
    """Losses in every type: paged, paged with an 8-bit cache, and in transformers if `against`."""
    losses = []
    for dtype in dtypes:
        decoder, tokenizer = load_decoder(model, dtype, device=device_of(attention))
        if tokenizer is None:
            raise ConfigurationError(f"{model} has no tokenizer, so that it can read no text")
        if not 2 <= window <= decoder.config.context_length:
            raise ConfigurationError(
                f"--window is {window}; it must be from 2 to the model's context of "
                f"{decoder.config.context_length}"
            )
        tokens = tokenizer.encode(text, add_special_tokens=False)
        windows = [torch.tensor(tokens[i : i + window]) for i in range(0, len(tokens), window)]
        windows = [each for each in windows if len(each) > 1]
        if not windows:
            raise InvalidRequestError(
                f"the text has {len(tokens)} tokens; at least 2 are needed to predict one"
            )
        name = str(dtype).removeprefix("torch.")
        count = sum(len(each) - 1 for each in windows)
        for system, operations in (
            ("paged", None),
            ("paged, 8-bit cache", Float8Rounding()),
        ):
            nats = sum(paged_loss(decoder, each, attention, operations) for each in windows)
            losses.append(Loss(system, name, nats / count, count))
        if against:
            peer = Transformers(model, dtype).model
            with torch.inference_mode():
                nats = sum(_loss(peer(each[None]).logits[0], each) for each in windows)
            losses.append(Loss("transformers", name, nats / count, count))
    return losses


@torch.inference_mode()
def paged_loss(
    decoder: Decoder, tokens: Tensor, attention: str, operations: TorchCacheOperations | None
) -> float:
    """Summed loss of all tokens but the first, in nats, computed chunk by chunk."""
    config, block_size = decoder.config, 16
    num_blocks = -(-len(tokens) // block_size)
    table = np.random.default_rng(0).permutation(num_blocks).tolist()
    shape = KVCacheShape(
        config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim
    )
    dtype, device = decoder.embed_tokens.weight.dtype, decoder.embed_tokens.weight.device
    tokens = tokens.to(device)
    cache = KVCache(shape, dtype, device, debug=True, operations=operations)
    prepare = attention_backend(attention)
    logits = []
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        end = start + len(chunk)
        blocks = table[: -(-end // block_size)]
        batch = PagedBatch.from_lists(
            block_size, [len(chunk)], [end], [blocks], config.sliding_window
        )
        attend = _attend(cache, torch.from_numpy(batch.slots()).to(device), prepare(batch))
        logits.append(decoder(chunk, torch.arange(start, end, device=device), attend))
    return _loss(torch.cat(logits), tokens)


def _attend(cache: KVCache, slots: Tensor, attention: PagedAttention) -> Attend:
    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.write(layer, slots, key, value)
        return attention(query, cache.keys[layer], cache.values[layer])

    return attend


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return F.cross_entropy(logits[:-1].double(), tokens[1:], reduction="sum").item()


def read_text(path: Path, last_share: float) -> str:
    """The last part of a text file, from 0 to 1 of it."""
    if not 0 < last_share <= 1:
        raise ConfigurationError(f"--last is {last_share:g}; it must be above 0 and at most 1")
    text = read_file(path)
    return text[round(len(text) * (1 - last_share)) :]
