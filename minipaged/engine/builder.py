"""Builds an engine from a model and a few options, and says how large it made the cache.

Owns the defaults and the memory budget.  Every option of the command line and of `LLM`
ends up in EngineOptions.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from minipaged.attention import attention_backend, backend_name, device_of
from minipaged.attention.gathered import GatheredAttention
from minipaged.attention.kernels import KernelAttention
from minipaged.distributed.place import place_of
from minipaged.engine.decode_graphs import DecodeGraphs
from minipaged.engine.engine import Engine
from minipaged.engine.model_runner import ModelRunner
from minipaged.errors import ConfigurationError
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.buddy_allocator import run_length
from minipaged.memory.kv_cache import KVCache, KVCacheShape
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.memory.reservation import ReservationManager
from minipaged.models.config import ModelConfig
from minipaged.models.decoder import Decoder
from minipaged.models.loader import load_decoder
from minipaged.models.tokenizer import Tokenizer
from minipaged.scheduling.policy import policy_named
from minipaged.scheduling.preemption import Preemption, PreemptionCosts, PreemptionMode
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.step_plan import default_budget

logger = logging.getLogger("minipaged")

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


# Operations per second of a large matrix product, and bytes per second to host memory and back:
# orders of magnitude, of a few CPU cores and of a GPU behind PCIe 4.
DEVICE_SPEEDS = {"cpu": (2e11, 1e10), "cuda": (1e14, 2.5e10)}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to run a model.

    dtype: of weights and cache; "auto" is the checkpoint's.
    block_size: tokens per KV block.
    num_blocks: blocks of the pool; None takes as many as `kv_cache_gib` holds.
    kv_cache_gib: memory budget of the pool in GiB, of each rank; None is a tenth of the machine's
        memory, divided among its ranks, or nine tenths of what is free on the GPU.
        Either way the pool never outgrows what max_num_seqs full contexts can use.
    max_num_seqs: sequences that run at a time.
    max_num_batched_tokens: tokens computed per step; None is 2048, or max_num_seqs if larger.
    policy: order of service: "fcfs", "priority" for requests with a priority, or "shortest" for
        those with small max_tokens first, within bounds.
    preemption: of a group that has to make room: "recompute", "swap", or "auto", whichever is
        estimated to be cheaper.
    swap_space_gib: memory for swapped blocks in GiB, of each rank; None is as much as the pool
        has, and more than that is never taken.
    memory_policy: "paged", or a contiguous reservation for every request, to compare with:
        "orca-max", "orca-pow2" or "orca-oracle", which reserve the model's context, the output
        rounded up to a power of two, or just enough; "static" is "orca-max" in static batches.
    enable_prefix_caching: share full blocks with earlier requests that began with the same
        tokens.
    prefix_cache_seed: of the hash that finds them; None draws a secret one.
    attention: name of an attention: "torch", "native", "cuda", "emulated" or "reference"; "auto"
        is "cuda" where there is a GPU. The model runs on the GPU with "cuda", else on the CPU.
    enforce_eager: on a GPU, launch every operator of a decoding step from Python instead of
        replaying the step as a CUDA graph.
    tensor_parallel_size: ranks among which the model is divided; None is as many as torchrun
        started, or 1.  The others than rank 0 are started here where there is no torchrun.
    debug: fill freed blocks with NaN, and check the block tables that the kernels are given;
        `Engine.check_integrity` asserts the other invariants.
    """

    dtype: str | torch.dtype = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_gib: float | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    seed: int = 0
    policy: str = "fcfs"
    preemption: PreemptionMode = "recompute"
    swap_space_gib: float | None = None
    memory_policy: str = "paged"
    enable_prefix_caching: bool = False
    prefix_cache_seed: int | None = None
    attention: str = "auto"
    enforce_eager: bool = False
    tensor_parallel_size: int | None = None
    debug: bool = False


def parse_dtype(name: str | torch.dtype) -> torch.dtype | str:
    """The torch type of this name; "auto" stays itself."""
    if isinstance(name, torch.dtype) or name == "auto":
        return name
    if name not in DTYPES:
        raise ConfigurationError(f"there is no dtype {name!r}; choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_engine(model: str | Path, options: EngineOptions | None = None) -> Engine:
    """An engine for a model by name, path or hub id."""
    options = options or EngineOptions()
    if is_parallel(options):
        from minipaged.distributed.launch import load_parallel_engine

        return load_parallel_engine(model, options)
    decoder, tokenizer = load_decoder(
        model, dtype=parse_dtype(options.dtype), device=device_of(options.attention)
    )
    return build_engine(decoder, tokenizer, options)


def is_parallel(options: EngineOptions) -> bool:
    """Whether the model is divided among ranks: if it is asked for, or torchrun started some."""
    size, place = options.tensor_parallel_size, place_of(os.environ)
    if size is not None and size < 1:
        raise ConfigurationError(f"tensor_parallel_size is {size}; it must be at least 1")
    return (size or 1) > 1 or (place is not None and place.shard.size > 1)


def build_engine(decoder: Decoder, tokenizer: Tokenizer | None, options: EngineOptions) -> Engine:
    """An engine around a decoder that is in memory already."""
    if options.seed < 0:
        raise ConfigurationError(f"seed is {options.seed}; it must be at least 0")
    config, weight = decoder.config, decoder.embed_tokens.weight
    dtype, attention = weight.dtype, backend_name(options.attention, weight.device.type)
    options = dataclasses.replace(options, attention=attention)
    num_blocks = options.num_blocks
    if num_blocks is None:
        num_blocks = blocks_within_budget(config, dtype, options)
    preemption = Preemption(options.preemption, preemption_costs(decoder, options.block_size))
    manager = block_manager(config, dtype, num_blocks, options)
    runner = build_runner(decoder, num_blocks, options)
    if isinstance(runner.prepare_attention, GatheredAttention):
        attention = "torch"  # also where nothing could be compiled
    if options.debug:
        manager.device.on_free = runner.cache.poison
    budget = options.max_num_batched_tokens
    static = options.memory_policy == "static"
    if budget is None:
        slots = num_blocks * options.block_size if static else 0
        budget = default_budget(options.max_num_seqs, options.block_size, slots)
    logger.info(
        "KV cache: %d blocks of %d tokens, %.1f MiB in %s%s%s; attention: %s",
        num_blocks,
        options.block_size,
        runner.cache.num_bytes / 2**20,
        str(dtype).removeprefix("torch."),
        " (chosen from the memory budget)" if options.num_blocks is None else "",
        f", {manager.host.num_blocks} more to swap to" if manager.host.num_blocks else "",
        attention,
    )
    return Engine(
        runner,
        Scheduler(
            manager,
            options.max_num_seqs,
            budget,
            policy_named(options.policy),
            preemption,
            static_batches=static,
        ),
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        tokenizer=tokenizer,
        eos_token_ids=config.eos_token_ids,
        seed=options.seed,
    )


def build_runner(decoder: Decoder, num_blocks: int, options: EngineOptions) -> ModelRunner:
    """What computes a step: the decoder with a cache of its own, and an attention to read it."""
    config, weight = decoder.config, decoder.embed_tokens.weight
    shape = dataclasses.replace(
        cache_shape(config, num_blocks, options.block_size),
        num_host_blocks=host_blocks(config, weight.dtype, num_blocks, options),
    )
    name = backend_name(options.attention, weight.device.type)
    if device_of(name) != weight.device.type:
        raise ConfigurationError(
            f"attention {name!r} reads memory of device {device_of(name)!r}, and the model is on "
            f'{weight.device.type!r}; load it there, or choose attention "auto"'
        )
    attention = attention_backend(name, options.debug)
    operations = graphs = None
    if isinstance(attention, KernelAttention):
        operations = attention.cache_operations(weight.dtype, config.head_dim)
    cache = KVCache(shape, weight.dtype, weight.device, options.debug, operations)
    # What the ranks say to each other is not recorded in graphs.
    replays = weight.is_cuda and not options.enforce_eager and decoder.shard.size == 1
    if isinstance(attention, KernelAttention) and replays:
        graphs = DecodeGraphs(decoder, cache, attention, options.max_num_seqs)
    return ModelRunner(decoder, cache, attention, graphs)


def block_manager(
    config: ModelConfig, dtype: torch.dtype, num_blocks: int, options: EngineOptions
) -> BlockManager:
    """Who gives out the memory: blocks when they are needed, or contiguous runs in advance."""
    if options.memory_policy == "paged":
        prefix_cache = None
        if options.enable_prefix_caching:
            prefix_cache = PrefixCache(options.block_size, options.prefix_cache_seed)
        return BlockManager(
            options.block_size,
            num_blocks,
            host_blocks(config, dtype, num_blocks, options),
            sliding_window=config.sliding_window,
            prefix_cache=prefix_cache,
        )
    for name, value, usual in (
        ("enable_prefix_caching", options.enable_prefix_caching, False),
        ("preemption", options.preemption, "recompute"),
    ):
        if value != usual:
            raise ConfigurationError(
                f"{name} is {value!r} and memory_policy {options.memory_policy!r}: contiguous "
                f'memory is neither shared nor taken back; choose "paged" or leave {name} {usual!r}'
            )
    return ReservationManager(
        options.block_size, num_blocks, options.memory_policy, config.context_length
    )


def cache_shape(config: ModelConfig, num_blocks: int, block_size: int) -> KVCacheShape:
    """Sizes of the cache for this model."""
    if block_size < 1:
        raise ConfigurationError(f"block_size is {block_size}; it must be at least 1")
    return KVCacheShape(
        config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim
    )


def host_blocks(
    config: ModelConfig, dtype: torch.dtype, num_blocks: int, options: EngineOptions
) -> int:
    """Blocks to swap to; the pool on the device never has more to swap than it is large."""
    if options.preemption == "recompute":
        return 0
    if options.swap_space_gib is None:
        return num_blocks
    bytes_per_block = cache_shape(config, 1, options.block_size).bytes_per_block(dtype)
    affordable = options.swap_space_gib * 2**30 // bytes_per_block
    if not affordable >= 1:
        raise ConfigurationError(
            f"swap_space_gib is {options.swap_space_gib}, below one block of "
            f"{bytes_per_block / 2**20:.2f} MiB, so that nothing can be swapped; raise it, or set "
            'preemption to "recompute"'
        )
    return int(min(affordable, num_blocks))


def preemption_costs(decoder: Decoder, block_size: int) -> PreemptionCosts:
    """Seconds to move a block and to compute a token, from round figures for this device.

    A token costs two operations per parameter, a block the bytes of its keys and values.
    """
    weight = decoder.embed_tokens.weight
    operations, bandwidth = DEVICE_SPEEDS[weight.device.type if weight.is_cuda else "cpu"]
    block = cache_shape(decoder.config, 1, block_size).bytes_per_block(weight.dtype)
    return PreemptionCosts(
        move_block=block / bandwidth, compute_token=2 * decoder.config.num_weights / operations
    )


def blocks_within_budget(
    config: ModelConfig, dtype: torch.dtype, options: EngineOptions, ranks_here: int = 1
) -> int:
    """Blocks that the memory budget holds, but no more than could ever be used.

    ranks_here: ranks that share this machine's memory.
    """
    if options.max_num_seqs < 1:
        raise ConfigurationError(f"max_num_seqs is {options.max_num_seqs}; it must be at least 1")
    budget = default_cache_memory(options.attention, ranks_here)
    if options.kv_cache_gib is not None:
        budget = options.kv_cache_gib * 2**30
    bytes_per_block = cache_shape(config, 1, options.block_size).bytes_per_block(dtype)
    affordable = budget // bytes_per_block
    if not affordable >= 1:
        raise ConfigurationError(
            f"the KV cache budget of {budget / 2**30:g} GiB is below one block of "
            f"{bytes_per_block / 2**20:.2f} MiB; raise kv_cache_gib or lower block_size"
        )
    blocks_per_context = -(-config.context_length // options.block_size)
    if options.memory_policy != "paged":
        blocks_per_context = run_length(blocks_per_context)
    return int(min(affordable, options.max_num_seqs * blocks_per_context))


def default_cache_memory(attention: str, ranks_here: int = 1) -> float:
    """Bytes of the pool if nothing else is said."""
    if device_of(attention) == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return 0.9 * free
    return physical_memory() / 10 / ranks_here


def physical_memory() -> int:
    """Bytes of memory this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
