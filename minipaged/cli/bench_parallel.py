"""`minipaged bench parallel`: what tensor parallelism gives, and what it costs in bytes."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from minipaged.cli.bench import bench
from minipaged.cli.options import (
    AttentionOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    NumBlocksOption,
    SeedOption,
    ThreadsOption,
    at_least_one,
)
from minipaged.errors import ConfigurationError


@bench.command()
def parallel(
    model: ModelOption = "tiny",
    ranks: Annotated[str, typer.Option(help="numbers of ranks, as in 1,2,4")] = "1,2,4",
    num_requests: Annotated[int, typer.Option(help="served together")] = 16,
    length: Annotated[int, typer.Option(help="tokens of each prompt and of each output")] = 64,
    threads: ThreadsOption = 0,
    json_file: JsonOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
    num_blocks: NumBlocksOption = 1024,
    attention: AttentionOption = "auto",
) -> None:
    """Tokens per second and bytes on the wire of a model divided among ranks of this host."""
    import torch

    from minipaged.engine.builder import EngineOptions
    from minipaged.evaluation import report
    from minipaged.evaluation.parallel import measure_parallel
    from minipaged.evaluation.workload import uniform_workload
    from minipaged.models.loader import vocab_size

    sizes = _numbers(ranks)
    at_least_one("--num-requests", num_requests)
    at_least_one("--length", length)
    if threads:
        torch.set_num_threads(threads)
    workload = uniform_workload(num_requests, length, length, vocab_size(model), seed)
    options = EngineOptions(dtype=dtype, num_blocks=num_blocks, attention=attention, seed=seed)
    runs = measure_parallel(model, workload, options, sizes)
    report.show_parallel(Console(highlight=False), runs)
    if json_file is not None:
        report.write_json(json_file, runs, model=model, dtype=dtype)


def _numbers(text: str) -> list[int]:
    """Several numbers of ranks, separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(
            f"--ranks is {text!r}; give numbers separated by commas, like 1,2,4"
        ) from None
    at_least_one("--ranks", *numbers)
    return numbers
