"""`minipaged bench`: every command prints a table, and writes the same figures with --json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from minipaged.cli.options import (
    AttentionOption,
    BlockSizeOption,
    BudgetOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    NumBlocksOption,
    SeedOption,
    SeqsOption,
    ThreadsOption,
    at_least_one,
    named_dtype,
)
from minipaged.errors import ConfigurationError

bench = typer.Typer(help="Measure.", no_args_is_help=True)


@bench.command()
def throughput(
    model: ModelOption = "tiny",
    requests: Annotated[
        Path | None,
        typer.Option(help='lines of {"prompt_length": 10, "output_length": 20}'),
    ] = None,
    num_requests: Annotated[int, typer.Option(help="made up if there is no file")] = 32,
    shortest: Annotated[int, typer.Option(help="prompt and output, in tokens")] = 16,
    longest: Annotated[int, typer.Option(help="prompt and output, in tokens")] = 256,
    against: Annotated[str | None, typer.Option(help="transformers")] = None,
    repeats: Annotated[int, typer.Option(help="runs of each; the best counts")] = 2,
    threads: ThreadsOption = 0,
    json_file: JsonOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    block_size: BlockSizeOption = 16,
    num_blocks: NumBlocksOption = None,
    max_num_seqs: SeqsOption = 256,
    max_num_batched_tokens: BudgetOption = None,
    attention: AttentionOption = "auto",
) -> None:
    """Generated tokens per second of one workload, here and in transformers."""
    import torch

    from minipaged.engine.builder import EngineOptions
    from minipaged.evaluation import report
    from minipaged.evaluation.throughput import measure
    from minipaged.evaluation.workload import read_workload, uniform_workload
    from minipaged.models.loader import vocab_size

    if against not in (None, "transformers"):
        raise ConfigurationError(f"--against {against} is unknown; it can be transformers")
    if repeats < 1:
        raise ConfigurationError(f"--repeats is {repeats}; at least 1 run is needed")
    if threads:
        torch.set_num_threads(threads)
    if requests is not None:
        workload = read_workload(requests, vocab_size(model), seed)
    else:
        workload = uniform_workload(num_requests, shortest, longest, vocab_size(model), seed)
    options = EngineOptions(
        dtype=dtype,
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        attention=attention,
        seed=seed,
    )
    measurements = measure(model, workload, options, against is not None, repeats)
    report.show_throughput(Console(highlight=False), measurements)
    if json_file is not None:
        report.write_json(json_file, measurements, model=model, dtype=dtype)


@bench.command()
def scheduler(
    num_seqs: Annotated[
        list[int] | None, typer.Option(help="running sequences; may be given several times")
    ] = None,
    steps: Annotated[int, typer.Option(help="decoding steps to measure")] = 200,
    json_file: JsonOption = None,
) -> None:
    """Milliseconds that one step's plan takes, by the number of running sequences."""
    from minipaged.evaluation import report
    from minipaged.evaluation.scheduler_cost import measure_scheduler

    sizes = num_seqs or [10, 100, 1000, 4000]
    at_least_one("--steps", steps)
    at_least_one("--num-seqs", *sizes)
    costs = [measure_scheduler(size, steps) for size in sizes]
    report.show_scheduler(Console(highlight=False), costs)
    if json_file is not None:
        report.write_json(json_file, costs, steps=steps)


@bench.command()
def memory(
    model: ModelOption = "tiny",
    memory_policy: Annotated[
        list[str] | None, typer.Option(help="paged, orca-max, ...; several times")
    ] = None,
    num_requests: Annotated[int, typer.Option(help="with ShareGPT's lengths, scaled")] = 64,
    repeats: Annotated[int, typer.Option(help="runs of each; the best counts")] = 3,
    threads: ThreadsOption = 0,
    json_file: JsonOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    block_size: BlockSizeOption = 16,
    attention: AttentionOption = "auto",
) -> None:
    """What paging gains over contiguous reservations in the same memory, for real."""
    import torch

    from minipaged.engine.builder import EngineOptions
    from minipaged.evaluation import report
    from minipaged.evaluation.memory_policies import measure_policies
    from minipaged.memory.reservation import RESERVATIONS

    at_least_one("--num-requests", num_requests)
    at_least_one("--repeats", repeats)
    if threads:
        torch.set_num_threads(threads)
    options = EngineOptions(dtype=dtype, block_size=block_size, attention=attention, seed=seed)
    policies = memory_policy or ["paged", *RESERVATIONS]
    runs = measure_policies(model, policies, num_requests, repeats, options)
    report.show_policies(Console(highlight=False), runs)
    if json_file is not None:
        report.write_json(json_file, runs, model=model, dtype=dtype, block_size=block_size)


@bench.command()
def perplexity(
    text: Annotated[Path, typer.Option(help="text file to predict")],
    model: ModelOption = "tiny",
    last: Annotated[float, typer.Option(help="share of the text, from its end")] = 0.1,
    window: Annotated[int, typer.Option(help="tokens that are predicted from each other")] = 512,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 ...; several times")
    ] = None,
    against: Annotated[str | None, typer.Option(help="transformers")] = None,
    attention: AttentionOption = "torch",
    json_file: JsonOption = None,
) -> None:
    """Loss of a model on a text: paged, with an 8-bit cache, and in transformers."""
    from minipaged.evaluation import report
    from minipaged.evaluation.perplexity import measure_losses, read_text

    if against not in (None, "transformers"):
        raise ConfigurationError(f"--against {against} is unknown; it can be transformers")
    dtypes = [named_dtype(name) for name in dtype or ["float32", "bfloat16"]]
    part = read_text(text, last)
    losses = measure_losses(model, part, dtypes, window, attention, against is not None)
    report.show_losses(Console(highlight=False), losses)
    if json_file is not None:
        report.write_json(json_file, losses, model=model, window=window, attention=attention)


@bench.command("prefix-cache")
def prefix_cache(
    trace: Annotated[Path, typer.Option(help="JSON lines with the hash_ids of a prompt's blocks")],
    pool_blocks: Annotated[
        list[int] | None, typer.Option(help="size of the pool; may be given several times")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Replay a trace through the prefix cache: hits by the size of the pool."""
    from minipaged.evaluation import report
    from minipaged.evaluation.prefix_replay import read_block_trace, replay

    sizes = pool_blocks or [1_000, 3_000, 10_000, 30_000, 50_000, 100_000]
    at_least_one("--pool-blocks", *sizes)
    requests = read_block_trace(trace)
    replays = [replay(requests, size) for size in (*sizes, None)]
    report.show_replays(Console(highlight=False), replays)
    if json_file is not None:
        report.write_json(json_file, replays, trace=trace.name)


@bench.command()
def sharing(
    model: ModelOption = "tiny",
    dataset: Annotated[
        list[str] | None, typer.Option(help="alpaca or sharegpt: whose lengths")
    ] = None,
    width: Annotated[list[int] | None, typer.Option(help="samples or beams of a request")] = None,
    num_requests: Annotated[int, typer.Option(help="of each run")] = 32,
    json_file: JsonOption = None,
    seed: SeedOption = 0,
    block_size: BlockSizeOption = 16,
) -> None:
    """Memory saved by sharing, for parallel sampling and beam search (figure 15)."""
    from minipaged.engine.builder import EngineOptions, load_engine
    from minipaged.evaluation import report
    from minipaged.evaluation.sharing import measure_sharing

    widths = width or [2, 4, 6]
    at_least_one("--num-requests", num_requests)
    at_least_one("--width", *widths)
    seqs = num_requests * max(widths)
    engine = load_engine(model, EngineOptions(block_size=block_size, max_num_seqs=seqs))
    runs = [
        measure_sharing(engine, name, decoding, w, num_requests, seed)
        for name in dataset or ["alpaca", "sharegpt"]
        for decoding in ("parallel", "beam")
        for w in widths
    ]
    report.show_sharing(Console(highlight=False), runs)
    if json_file is not None:
        report.write_json(json_file, runs, model=model, block_size=block_size)


@bench.command()
def latency(
    model: ModelOption = "smollm2",
    budget: Annotated[
        list[int] | None,
        typer.Option(help="tokens computed per step; may be given several times"),
    ] = None,
    long_prompt: Annotated[int, typer.Option(help="tokens of the prompt that arrives")] = 1500,
    num_decoding: Annotated[int, typer.Option(help="requests that decode")] = 8,
    tokens: Annotated[int, typer.Option(help="that each of them decodes from then on")] = 40,
    threads: ThreadsOption = 0,
    json_file: JsonOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
) -> None:
    """Time between tokens while a long prompt is computed, with and without cutting it up."""
    import torch

    from minipaged.engine.builder import EngineOptions, load_engine
    from minipaged.evaluation import report
    from minipaged.evaluation.latency import measure_latency

    at_least_one("--num-decoding", num_decoding)
    at_least_one("--tokens", tokens)
    if threads:
        torch.set_num_threads(threads)
    latencies = []
    for tokens_per_step in budget or [4096, 512, 128, 64]:
        options = EngineOptions(
            dtype=dtype, max_num_seqs=num_decoding + 1, max_num_batched_tokens=tokens_per_step
        )
        engine = load_engine(model, options)
        latencies.append(measure_latency(engine, long_prompt, num_decoding, tokens, seed))
    report.show_latency(Console(highlight=False), latencies)
    if json_file is not None:
        report.write_json(json_file, latencies, model=model, dtype=dtype)
