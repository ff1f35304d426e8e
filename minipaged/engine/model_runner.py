"""Carries out a StepPlan: moves the blocks it names, then runs the model over its tokens.

Knows the decoder and the KV cache, and nothing of requests: a plan is all it gets.
"""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minipaged.attention import Prepare
from minipaged.attention.batch import PagedBatch
from minipaged.engine.decode_graphs import DecodeGraphs
from minipaged.memory.kv_cache import KVCache
from minipaged.models.decoder import Decoder
from minipaged.scheduling.step_plan import StepPlan


class Runner(Protocol):
    """What an engine needs of a model."""

    def execute(self, plan: StepPlan) -> Float[Tensor, "samples vocab"]:
        """Logits of the scheduled sequences with `samples` set, in the order of the plan."""
        ...


class ModelRunner:
    """One decoder, one KV cache, one kind of attention.

    graphs: replays the steps in which every sequence has one token, if there are any.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        prepare_attention: Prepare,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.prepare_attention = prepare_attention
        self.graphs = graphs
        self.attention_seconds = 0.0

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Float[Tensor, "samples vocab"]:
        """Swap out, swap in, copy, then one forward pass over all tokens of the step."""
        cache = self.cache
        cache.swap_out(plan.swap_out)
        cache.swap_in(plan.swap_in)
        cache.copy_blocks(plan.copies)
        if not plan.scheduled:
            return torch.empty(0, self.decoder.config.vocab_size)

        # Like shapes next to each other, for the attention; the logits return in plan order.
        lengths = [(len(item.token_ids), item.context_length) for item in plan.scheduled]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        items = [plan.scheduled[i] for i in order]
        batch = PagedBatch.from_lists(
            cache.shape.block_size,
            [len(item.token_ids) for item in items],
            [item.context_length for item in items],
            [item.block_table for item in items],
            self.decoder.config.sliding_window,
        )
        token_ids = np.concatenate([item.token_ids for item in items])
        last_rows = np.empty(len(items), dtype=np.int64)
        last_rows[order] = batch.query_starts[1:] - 1
        samples = [item.samples for item in plan.scheduled]
        if self.graphs is not None and self.graphs.can_run(batch):
            return self.graphs.run(batch, token_ids)[self._to_device(last_rows[samples])]
        slots = self._to_device(batch.slots())
        attention = self.prepare_attention(batch)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            start = time.perf_counter()
            cache.write(layer, slots, key, value)
            output = attention(query, cache.keys[layer], cache.values[layer])
            self.attention_seconds += time.perf_counter() - start
            return output

        return self.decoder(
            self._to_device(token_ids),
            self._to_device(batch.positions()),
            attend,
            logits_at=self._to_device(last_rows[samples]),
        )

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.cache.device)
