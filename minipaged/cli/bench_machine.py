"""`minipaged bench` of what lies below the engine: the kernels, the host, the simulator's costs."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.console import Console

from minipaged.cli.bench import bench
from minipaged.cli.options import (
    AttentionOption,
    BlockSizeOption,
    DtypeOption,
    HeadSizeOption,
    JsonOption,
    ModelOption,
    SeedOption,
    ThreadsOption,
    at_least_one,
    named_dtype,
)
from minipaged.errors import ConfigurationError


@bench.command("cost-model")
def cost_model(
    model: ModelOption = "smollm2",
    attention: AttentionOption = "native",
    threads: ThreadsOption = 0,
    json_file: JsonOption = None,
) -> None:
    """The simulator's cost model against measured steps, with this machine for a GPU."""
    import torch

    from minipaged.evaluation import report
    from minipaged.evaluation.cost_check import check_cost_model

    if threads:
        torch.set_num_threads(threads)
    shapes = [(1, 1, 255), (8, 1, 255), (32, 1, 255), (32, 1, 63), (1, 512, 0), (8, 128, 0)]
    measured, times = check_cost_model(model, attention, shapes)
    report.show_step_times(Console(highlight=False), measured, times)
    if json_file is not None:
        report.write_json(json_file, times, model=model, attention=attention)


@bench.command("host-overhead")
def host_overhead(
    model: ModelOption = "smollm2",
    dtype: DtypeOption = "bfloat16",
    batch: Annotated[
        list[int] | None, typer.Option(help="sequences; may be given several times")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """On a GPU: time that a decoding step spends on the host, eager and as a CUDA graph."""
    from minipaged.evaluation import report
    from minipaged.evaluation.host_overhead import measure_host_overhead

    batches = batch or [1, 8, 64]
    at_least_one("--batch", *batches)
    overheads = measure_host_overhead(model, named_dtype(dtype), batches)
    report.show_host_overhead(Console(highlight=False), overheads)
    if json_file is not None:
        report.write_json(json_file, overheads, model=model, dtype=dtype)


@bench.command()
def kernel(
    attention: AttentionOption = "auto",
    batch: Annotated[list[int] | None, typer.Option(help="may be given several times")] = None,
    context: Annotated[list[int] | None, typer.Option(help="tokens of each sequence")] = None,
    heads: Annotated[str, typer.Option(help="query heads / KV heads")] = "32/8",
    head_size: HeadSizeOption = 128,
    block_size: BlockSizeOption = 16,
    dtype: DtypeOption = "bfloat16",
    repeats: Annotated[int, typer.Option(help="runs of each; the median counts")] = 5,
    threads: ThreadsOption = 0,
    json_file: JsonOption = None,
    seed: SeedOption = 0,
) -> None:
    """Decoding attention of one layer: time, bandwidth, and what paging costs (figure 18a)."""
    import torch

    from minipaged.evaluation import report
    from minipaged.evaluation.kernel import DecodeShape, measure_kernels

    chosen = named_dtype(dtype)
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", heads)
    if match is None or int(match[1]) % int(match[2]):
        raise ConfigurationError(
            f"--heads is {heads!r}; give query heads / KV heads, the first a multiple of the "
            "second, like 32/8"
        )
    batches, contexts = batch or [1, 8, 64, 256], context or [128, 1024, 4096]
    at_least_one("--batch", *batches)
    at_least_one("--context", *contexts)
    at_least_one("--repeats", repeats)
    if threads:
        torch.set_num_threads(threads)
    times = []
    for sequences in batches:
        for tokens in contexts:
            shape = DecodeShape(
                sequences, tokens, int(match[1]), int(match[2]), head_size, block_size
            )
            times += measure_kernels(shape, attention, chosen, repeats, seed)
    report.show_kernels(Console(highlight=False), times)
    if json_file is not None:
        report.write_json(json_file, times, attention=attention, dtype=dtype)


@bench.command()
def resources(
    dtype: DtypeOption = "bfloat16",
    head_size: HeadSizeOption = 128,
    float8_cache: Annotated[bool, typer.Option(help="also the kernels for an 8-bit cache")] = False,
    json_file: JsonOption = None,
) -> None:
    """Registers, shared memory and spills of the CUDA kernels; needs nvcc, no GPU."""
    from minipaged.attention.build import head_size_fits
    from minipaged.evaluation import report
    from minipaged.evaluation.kernel_resources import kernel_resources

    chosen = named_dtype(dtype)
    head_size_fits(head_size, chosen)
    found = kernel_resources(chosen, [head_size], float8_cache)
    report.show_resources(Console(highlight=False), found)
    if json_file is not None:
        report.write_json(json_file, found, dtype=dtype, head_size=head_size)
