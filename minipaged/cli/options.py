"""The options that several commands share, what they mean, and how they are checked."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minipaged.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

    from minipaged.evaluation.arrivals import TimedRequest


def no_less_than(low: int) -> Callable[[typer.CallbackParam, int], int]:
    """Refuses a smaller number, by the name of its option."""

    def check(parameter: typer.CallbackParam, value: int) -> int:
        if value < low:
            raise ConfigurationError(f"{parameter.opts[0]} is {value}; it must be at least {low}")
        return value

    return check


def _writable(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse, before anything is run, a file that could not be written in the end."""
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        what = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise ConfigurationError(
            f"{parameter.opts[0]} {path} {what}; name a file, in a folder that exists"
        )
    return path


def _drawable(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    if path is not None and path.suffix not in (".svg", ".png"):
        raise ConfigurationError(f"{parameter.opts[0]} is {path}; it must end in .svg or .png")
    return _writable(parameter, path)


ModelOption = Annotated[
    str, typer.Option("--model", help="tiny, smollm2, a directory, a GGUF file or a hub id")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64")]
BlockSizeOption = Annotated[int, typer.Option(callback=no_less_than(1), help="tokens per KV block")]
NumBlocksOption = Annotated[
    int | None, typer.Option(help="blocks of the pool; sized from the memory if left out")
]
SeqsOption = Annotated[int, typer.Option(help="sequences that run at a time")]
BudgetOption = Annotated[int | None, typer.Option(help="tokens computed per step")]
PrefixOption = Annotated[
    bool, typer.Option("--prefix-cache/--no-prefix-cache", help="share blocks of equal prefixes")
]
PreemptionOption = Annotated[str, typer.Option(help="recompute, swap or auto")]
SwapOption = Annotated[
    float | None, typer.Option("--swap-gib", help="memory to swap to; the pool's size if left out")
]
AttentionOption = Annotated[
    str,
    typer.Option(
        help="auto, torch, native (compiled), cuda (the default with a GPU), emulated, reference"
    ),
]
RanksOption = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel-size",
        help="ranks that divide the model among them; torchrun's if left out, else 1",
    ),
]
SeedOption = Annotated[int, typer.Option(callback=no_less_than(0), help="of the random streams")]
HeadSizeOption = Annotated[int, typer.Option(callback=no_less_than(1), help="elements of a head")]
ThreadsOption = Annotated[
    int,
    typer.Option(
        callback=no_less_than(0), help="CPU threads, of all ranks together; 0 leaves torch's choice"
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", callback=_writable, help="write the figures to a file")
]
PlotOption = Annotated[Path | None, typer.Option(callback=_drawable, help="draw it: PNG or SVG")]
TraceHtmlOption = Annotated[
    Path | None,
    typer.Option(callback=_writable, help="write a page to step through the iterations"),
]
CsvOption = Annotated[
    Path | None, typer.Option(callback=_writable, help="write the points to this file")
]
MaxTokensOption = Annotated[int, typer.Option(help="output tokens per prompt")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy")]
TopKOption = Annotated[int, typer.Option(help="draw among the k likeliest; 0 for all")]
TopPOption = Annotated[float, typer.Option(help="draw among the likeliest that reach this mass")]

TraceOption = Annotated[
    Path | None, typer.Option(help="requests of Azure, BurstGPT, Mooncake or ShareGPT")
]
TokenizerOption = Annotated[
    str | None, typer.Option(help="model whose tokenizer counts the tokens of ShareGPT")
]
LessonsOption = Annotated[
    str | None, typer.Option(help="run on your own modules of these lessons, as in 3,4,8")
]


def named_dtype(name: str) -> torch.dtype:
    """A type where there is no model to say which."""
    import torch

    from minipaged.engine.builder import parse_dtype

    dtype = parse_dtype(name)
    if not isinstance(dtype, torch.dtype):
        raise ConfigurationError("--dtype auto has no meaning without a model; name a type")
    return dtype


def recorded_requests(trace: Path, tokenizer: str | None) -> list[TimedRequest]:
    """The requests of a trace; those of conversations are counted by a model's tokenizer."""
    from minipaged.evaluation.traces import read_trace

    if tokenizer is None:
        return read_trace(trace)
    from minipaged.models.loader import load_tokenizer

    encode = load_tokenizer(tokenizer).encode
    return read_trace(trace, lambda text: len(encode(text)))


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Imports of parts that are installed only when they are asked for."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{what} needs {error.name}, which is not installed; "
            f"get it with: pip install 'minipaged[{extra}]'"
        ) from error


def at_least_one(name: str, *values: float) -> None:
    """Refuse what is less than 1, or no number, by the name of its option."""
    for value in values:
        if not 1 <= value < math.inf:
            raise ConfigurationError(f"{name} is {value:g}; it must be a number of at least 1")


def use_lessons(numbers: str | None) -> None:
    """Put the learner's modules in place before anything that they replace is imported."""
    if numbers is None:
        return
    from minipaged.course.lesson import find_lesson, parse_numbers
    from minipaged.course.substitution import own_files, substitute

    files = own_files([find_lesson(number) for number in parse_numbers(numbers)])
    substitute(files)
    for file, path in files.items():
        print(f"minipaged: {file} is yours, {path.parent.name}/{path.name}", file=sys.stderr)
