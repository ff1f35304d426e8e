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
        raise NotImplementedError("Task 15.4: ModelRunner.execute is still to be written")

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.cache.device)
