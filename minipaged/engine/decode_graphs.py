"""Decoding steps as CUDA graphs: recorded once, and then replayed with other tokens.

A small step takes a GPU less time than Python takes to launch its operators.  A graph launches
them all at once, but only over the same memory and in the same shapes: so the inputs of a step
are written into tensors that stay where they are, and its sequences are filled up with rows that
store nothing and that nobody reads.  On the CPU the same steps run without a graph, so that they
can be tested there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minipaged.attention.batch import PagedBatch, check_block_tables, check_contexts
from minipaged.attention.kernels import KernelAttention, Launch, contiguous_heads
from minipaged.memory.kv_cache import KVCache
from minipaged.models.decoder import Decoder

NO_SLOT = -1


def padded_sizes(most: int) -> list[int]:
    """Batch sizes that are recorded: 1, 2, 4, 8, then every multiple of 8 up to `most`."""
    small = [size for size in (1, 2, 4) if size < most]
    return [*small, *range(8, most, 8), most]


class DecodeGraphs:
    """One graph for each padded batch size, recorded when it is first needed.

    max_num_seqs: the largest batch.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, attention: KernelAttention, max_num_seqs: int
    ) -> None:
        self.decoder, self.cache, self.attention = decoder, cache, attention
        self.sizes = padded_sizes(max_num_seqs)
        self._steps: dict[int, _PaddedStep] = {}
        self._recorder: _Recorder | None = None
        if cache.device.type == "cuda":
            weight = decoder.embed_tokens.weight
            logits = weight.new_empty(max_num_seqs, decoder.config.vocab_size)
            self._recorder = _Recorder(logits)

    def can_run(self, batch: PagedBatch) -> bool:
        """Whether every sequence decodes, and there are not too many."""
        return bool((batch.query_lengths == 1).all()) and batch.num_seqs <= self.sizes[-1]

    def run(self, batch: PagedBatch, token_ids: np.ndarray) -> Tensor:
        """Logits of every sequence, [seqs, vocab]; they are overwritten by the next step."""
        check_contexts(batch)
        if self.attention.debug:
            check_block_tables(batch, self.cache.shape.num_blocks)
        size = self._padded(batch.num_seqs)
        if size not in self._steps:
            self._steps[size] = _PaddedStep(self, size)
        step = self._steps[size]
        step.fill(batch, token_ids)
        return step.run(self._recorder)[: batch.num_seqs]

    def replay(self, num_seqs: int) -> None:
        """The last step with so many sequences once more, as it was: to measure it."""
        self._steps[self._padded(num_seqs)].run(self._recorder)

    def _padded(self, num_seqs: int) -> int:
        return next(size for size in self.sizes if size >= num_seqs)


class _Recorder:
    """What all graphs share, since only one of them runs at a time.

    logits: where each leaves its result, [max_num_seqs, vocab].
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, compute: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
        """A graph of what `compute` does."""
        # Once without recording: what is made at the first call must not be in the graph.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            compute()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = compute()
            self.logits[: len(logits)].copy_(logits)
        return graph


class _PaddedStep:
    """The inputs of a step of one size, and the graph that reads them."""

    def __init__(self, graphs: DecodeGraphs, size: int) -> None:
        self.decoder, self.cache = graphs.decoder, graphs.cache
        config, block_size = graphs.decoder.config, graphs.cache.shape.block_size
        most_blocks = -(-config.context_length // block_size)
        device = graphs.cache.device
        self.size = size
        self.tokens = torch.zeros(3, size, dtype=torch.int64, device=device)
        self.tables = torch.zeros(size, most_blocks, dtype=torch.int32, device=device)
        self.contexts = torch.ones(size, dtype=torch.int32, device=device)
        columns = {
            "block_tables": self.tables,
            "context_lengths": self.contexts,
            "query_starts": torch.arange(size, dtype=torch.int32, device=device),
            "query_lengths": torch.ones(size, dtype=torch.int32, device=device),
        }
        version, splits = graphs.attention.decoding_kernel(size * config.num_kv_heads, most_blocks)
        self.launch = Launch(
            columns,
            version,
            splits,
            block_size,
            config.sliding_window,
            max_queries=1,
            max_context=config.context_length,
        )
        dtype = self.decoder.embed_tokens.weight.dtype
        self.kernels = graphs.attention.kernels(dtype, config.head_dim)
        self.graph: torch.cuda.CUDAGraph | None = None

    def fill(self, batch: PagedBatch, token_ids: np.ndarray) -> None:
        """Write the inputs of a step; rows behind its sequences have a context of one token."""
        count, blocks = batch.block_tables.shape
        tokens = np.zeros((3, self.size), dtype=np.int64)
        tokens[:, :count] = token_ids, batch.positions(), batch.slots()
        tokens[2, count:] = NO_SLOT
        contexts = np.ones(self.size, dtype=np.int32)
        contexts[:count] = batch.context_lengths
        self.tokens.copy_(torch.from_numpy(tokens))
        self.contexts.copy_(torch.from_numpy(contexts))
        self.tables[count:, :1] = 0
        self.tables[:count, :blocks].copy_(torch.from_numpy(batch.block_tables))

    def run(self, recorder: _Recorder | None) -> Tensor:
        """Replay the step, which is recorded at the first call; without a recorder, compute it."""
        if recorder is None:
            return self._compute()
        if self.graph is None:
            self.graph = recorder.record(self._compute)
        self.graph.replay()
        return recorder.logits

    def _compute(self) -> Tensor:
        token_ids, positions, slots = self.tokens

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            self.cache.write(layer, slots, key, value)
            query = contiguous_heads(query)
            output = query.new_empty(query.shape)
            self.launch.run(self.kernels, output, query, keys, values)
            return output

        return self.decoder(token_ids, positions, attend)
