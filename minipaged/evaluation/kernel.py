"""How fast one layer of decoding attention is, and what paging costs it.

The same queries over the same number of keys, by a paged attention with its blocks scattered,
by the same attention with the blocks of each sequence in a row, by PyTorch's
scaled_dot_product_attention over contiguous tensors, and on a GPU by other projects' attention
where it is installed.  That all compute the same is checked first.  Then they take turns, each
call works on another layer's cache, so that nothing is left in a cache of the processor, and the
median counts.  What can be reached is the speed of a plain copy, measured in the same run.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention import attention_backend, backend_name, device_of
from minipaged.attention.batch import PagedBatch
from minipaged.attention.build import find_compiler
from minipaged.evaluation.kernel_peers import (
    Caches,
    Layer,
    flash_attn_attention,
    flashinfer_attention,
    is_usable,
)

# Keys and values of all layers together: more than any processor's cache holds.
BYTES_IN_ALL = {"cpu": 2**28, "cuda": 2**30}

# Between two attentions that round to bfloat16 in different places, relative to the norm.
MOST_DIFFERENCE = 0.02


@dataclass(frozen=True)
class KernelTime:
    """One way to compute the attention of a batch, each sequence with one new token.

    gigabytes_per_second: of the keys and values, each counted once.
    of_copy: that, relative to what a copy reads and writes in the same time.
    """

    name: str
    batch: int
    context: int
    heads: int
    kv_heads: int
    microseconds: float
    gigabytes_per_second: float
    of_copy: float


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of a decoding step; every sequence has `context` tokens in the cache."""

    batch: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks of each table, the last one perhaps not full."""
        return -(-self.context // self.block_size)

    def bytes_read(self, dtype: torch.dtype) -> int:
        """Keys and values of all sequences in one layer."""
        return 2 * self.batch * self.context * self.kv_heads * self.head_dim * dtype.itemsize


def measure_kernels(
    shape: DecodeShape, attention: str, dtype: torch.dtype, repeats: int, seed: int = 0
) -> list[KernelTime]:
    """Every system's time, those over scattered blocks first.

    Raises ValueError if they do not compute the same.
    """
    device = torch.device(device_of(attention))
    if attention == "native":
        find_compiler()  # without one, what is measured would be PyTorch's
    generator = torch.Generator(device).manual_seed(seed)
    # Whole blocks are allocated, also where a context ends soon after the last one begins.
    whole = dataclasses.replace(shape, context=shape.blocks_per_sequence * shape.block_size)
    layers = max(1, BYTES_IN_ALL[device.type] // whole.bytes_read(dtype))

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).to(dtype)

    num_blocks = shape.batch * shape.blocks_per_sequence
    pool = (num_blocks, shape.block_size, shape.kv_heads, shape.head_dim)
    caches = [(random(*pool), random(*pool)) for _ in range(layers)]
    query = random(shape.batch, shape.heads, shape.head_dim)

    systems = _systems(shape, attention, query, caches, seed)
    rounds = {name: _all_layers(run, layers, device) for name, run in systems.items()}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for call in range(repeats + 1):  # the first one warms up
        for name, round_of_layers in rounds.items():
            elapsed = seconds_of(round_of_layers, device) / layers
            if call:
                seconds[name].append(elapsed)
    copy = copy_speed(device)
    times = []
    for name, runs in seconds.items():
        speed = shape.bytes_read(dtype) / statistics.median(runs)
        times.append(
            KernelTime(
                name,
                shape.batch,
                shape.context,
                shape.heads,
                shape.kv_heads,
                statistics.median(runs) * 1e6,
                speed / 1e9,
                speed / copy,
            )
        )
    return times


def _systems(
    shape: DecodeShape, attention: str, query: Tensor, caches: Caches, seed: int
) -> dict[str, Layer]:
    """All that can be measured here, by name and by how the cache lies; checked."""
    num_blocks = len(caches[0][0])
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
    scattered = _batch(shape, order.view(shape.batch, -1).tolist())
    in_a_row = _batch(shape, torch.arange(num_blocks).view(shape.batch, -1).tolist())
    over_scattered = {attention: _paged(attention, scattered, query, caches)}
    over_blocks_in_a_row = {attention: _paged(attention, in_a_row, query, caches)}
    over_tokens = {"SDPA": _contiguous(shape, query, caches)}
    if not query.is_cuda and backend_name(attention) != "torch":
        over_scattered["torch"] = _paged("torch", scattered, query, caches)
    if is_usable("flashinfer", query):
        over_scattered["FlashInfer"] = flashinfer_attention(scattered, query, caches)
        over_blocks_in_a_row["FlashInfer"] = flashinfer_attention(in_a_row, query, caches)
    if is_usable("flash_attn", query):
        over_tokens["flash-attn"] = flash_attn_attention(in_a_row, query, caches)

    keys, values = (pool[order.to(pool.device)] for pool in caches[0])
    _check(over_scattered, _contiguous(shape, query, [(keys, values)]))
    _check(over_blocks_in_a_row | over_tokens, over_tokens["SDPA"])
    layouts = {
        "scattered blocks": over_scattered,
        "blocks in a row": over_blocks_in_a_row,
        "contiguous": over_tokens,
    }
    return {
        f"{name}, {layout}": run for layout, runs in layouts.items() for name, run in runs.items()
    }


def copy_speed(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes, the best of ten."""
    source = torch.ones(BYTES_IN_ALL[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    fastest = min(seconds_of(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.nbytes / fastest


def _batch(shape: DecodeShape, tables: Sequence[Sequence[int]]) -> PagedBatch:
    ones, contexts = [1] * shape.batch, [shape.context] * shape.batch
    return PagedBatch.from_lists(shape.block_size, ones, contexts, tables)


def _paged(attention: str, batch: PagedBatch, query: Tensor, caches: Caches) -> Layer:
    attend = attention_backend(attention)(batch)
    return lambda layer: attend(query, *caches[layer])


def _contiguous(shape: DecodeShape, query: Tensor, caches: Caches) -> Layer:
    """Over the same memory: the blocks in a row are each sequence's keys, but for the heads."""
    kv_heads, head_dim = shape.kv_heads, shape.head_dim
    grouped = query.view(shape.batch, kv_heads, -1, head_dim)

    def by_head(pool: Tensor) -> Tensor:
        tokens = pool.view(shape.batch, -1, kv_heads, head_dim)[:, : shape.context]
        return tokens.transpose(1, 2).contiguous()

    contiguous = [(by_head(keys), by_head(values)) for keys, values in caches]
    return lambda layer: F.scaled_dot_product_attention(grouped, *contiguous[layer])


@torch.inference_mode()
def _check(systems: dict[str, Layer], oracle: Layer) -> None:
    """Raises ValueError for a system that computes something else: its speed means nothing."""
    wanted = oracle(0).flatten().double()
    for name, run in systems.items():
        difference = (run(0).flatten().double() - wanted).norm() / wanted.norm()
        if not difference < MOST_DIFFERENCE:
            raise ValueError(
                f"{name} is {difference:.3f} away from PyTorch's attention, relative to its norm "
                f"(at most {MOST_DIFFERENCE}), so that it is not measured"
            )


@torch.inference_mode()
def _all_layers(run: Layer, layers: int, device: torch.device) -> Callable[[], object]:
    """All layers in turn; on a GPU as a graph, since Python launches more slowly than it runs."""

    def one_after_the_other() -> None:
        for layer in range(layers):
            run(layer)

    if device.type != "cuda":
        return one_after_the_other
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_after_the_other()
    return graph.replay


@torch.inference_mode()
def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes, on a GPU by events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
