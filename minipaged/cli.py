"""The command line.  Every command is a thin layer over the Python interface.

Errors that are the input's fault are one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from minipaged.errors import ConfigurationError, InvalidRequestError, MinipagedError

if TYPE_CHECKING:
    from minipaged.engine.engine import Engine

app = typer.Typer(
    help="PagedAttention, readable: generate text and watch the block map.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure.", no_args_is_help=True)
app.add_typer(bench, name="bench")

INTERRUPTED = 130

ModelOption = Annotated[
    str, typer.Option("--model", help="tiny, smollm2, a directory, a GGUF file or a hub id")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64")]
BlockSizeOption = Annotated[int, typer.Option(help="tokens per KV block")]
NumBlocksOption = Annotated[
    int | None, typer.Option(help="blocks of the pool; sized from the memory if left out")
]
SeqsOption = Annotated[int, typer.Option(help="sequences that run at a time")]
BudgetOption = Annotated[int | None, typer.Option(help="tokens computed per step")]
AttentionOption = Annotated[str, typer.Option(help="attention backend")]
SeedOption = Annotated[int, typer.Option(help="of the random streams")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="write the figures to a file")]
MaxTokensOption = Annotated[int, typer.Option(help="output tokens per prompt")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy")]
TopKOption = Annotated[int, typer.Option(help="draw among the k likeliest; 0 for all")]
TopPOption = Annotated[float, typer.Option(help="draw among the likeliest that reach this mass")]


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="served together")] = None,
    model: ModelOption = "tiny",
    prompt_file: Annotated[
        Path | None, typer.Option("--prompts", help="a file with a prompt on every line")
    ] = None,
    trace_html: Annotated[
        Path | None, typer.Option(help="write a page to step through the iterations")
    ] = None,
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends an output")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="never end early")] = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    block_size: BlockSizeOption = 16,
    num_blocks: NumBlocksOption = None,
    max_num_seqs: SeqsOption = 256,
    max_num_batched_tokens: BudgetOption = None,
    attention: AttentionOption = "torch",
) -> None:
    """Complete one or several prompts and show where their blocks lay."""
    from minipaged.engine.trace import Trace
    from minipaged.request.sampling_params import SamplingParams
    from minipaged.visual.block_map import run_summary

    texts = [*(prompts or []), *_read_prompts(prompt_file)]
    if not texts:
        raise InvalidRequestError("there is no prompt; give one, or a file of them with --prompts")
    if trace_html is not None and not trace_html.resolve().parent.is_dir():
        raise InvalidRequestError(
            f"--trace-html {trace_html} lies in a directory that does not exist; make it first"
        )
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_tokens=max_tokens,
        stop=stop or (),
        ignore_eos=ignore_eos,
    )
    engine = _load(
        model,
        dtype=dtype,
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        attention=attention,
        seed=seed,
    )
    trace = Trace()
    engine.observers.append(trace)
    names, refused = {}, []
    for number, text in enumerate(texts):
        try:
            engine.add_request(str(number), text, params)
            names[str(number)] = f"[{number}] {_shorten(text)}"
        except InvalidRequestError as error:
            refused.append(f"prompt {number} ({_shorten(text)}): {error}")
    console = Console(highlight=False)
    finished = _serve(engine, console, names)
    if trace.records:
        console.print()
        console.print(run_summary(trace))
    if trace_html is not None:
        from minipaged.visual.trace_page import write_trace_html

        write_trace_html(trace, trace_html)
        console.print(f"{len(trace)} steps to walk through: {trace_html}")
    for sentence in refused:
        _complain(sentence)
    if not finished:
        raise typer.Exit(INTERRUPTED)
    if refused:
        raise typer.Exit(2)


@app.command()
def chat(
    model: ModelOption = "smollm2",
    system: Annotated[str | None, typer.Option(help="instructions that come first")] = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    block_size: BlockSizeOption = 16,
    num_blocks: NumBlocksOption = None,
    attention: AttentionOption = "torch",
) -> None:
    """Talk to a model that has a chat template.  An empty line or end of file ends it."""
    from minipaged.request.sampling_params import SamplingParams

    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens
    )
    engine = _load(
        model,
        dtype=dtype,
        block_size=block_size,
        num_blocks=num_blocks,
        attention=attention,
        max_num_seqs=1,
        seed=seed,
    )
    if engine.tokenizer is None or engine.tokenizer.chat_template is None:
        raise InvalidRequestError(
            f"{model} has no chat template; use minipaged generate, or --model smollm2"
        )
    console = Console(highlight=False)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = console.input("[bold]you[/bold]> ") if sys.stdin.isatty() else input()
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        answer = _answer(engine, console, messages, params)
        messages.append({"role": "assistant", "content": answer})


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
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice")] = 0,
    json_file: JsonOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    block_size: BlockSizeOption = 16,
    num_blocks: NumBlocksOption = None,
    max_num_seqs: SeqsOption = 256,
    max_num_batched_tokens: BudgetOption = None,
    attention: AttentionOption = "torch",
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
    for name, value in (("--steps", steps), *(("--num-seqs", size) for size in sizes)):
        if value < 1:
            raise ConfigurationError(f"{name} is {value}; it must be at least 1")
    costs = [measure_scheduler(size, steps) for size in sizes]
    report.show_scheduler(Console(highlight=False), costs)
    if json_file is not None:
        report.write_json(json_file, costs, steps=steps)


def _answer(engine: Engine, console: Console, messages: list[dict[str, str]], params: Any) -> str:
    """Stream one answer; Ctrl-C ends it and keeps what has come."""
    assert engine.tokenizer is not None
    engine.add_request("chat", engine.tokenizer.apply_chat_template(messages), params)
    text = ""
    try:
        while engine.has_unfinished_requests:
            for output in engine.step():
                new = output.outputs[0].text[len(text) :]
                text += new
                console.print(Text(new), end="", soft_wrap=True)
    except KeyboardInterrupt:
        engine.abort("chat")
    console.print()
    return text


def _serve(engine: Engine, console: Console, names: dict[str, str]) -> bool:
    """Run until all is done; on Ctrl-C show what there is.  Returns whether all is done."""
    from minipaged.visual.live import StreamView

    with StreamView(console, names) as view:
        engine.observers.append(view)
        try:
            while engine.has_unfinished_requests:
                engine.step()
        except KeyboardInterrupt:
            for request_id in names:
                engine.abort(request_id)
            return False
    return True


def _load(model: str, **options: Any) -> Engine:
    from minipaged.engine.builder import EngineOptions, load_engine
    from minipaged.engine.llm import show_messages

    show_messages()
    return load_engine(model, EngineOptions(**options))


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"--prompts {path} cannot be read: {error}") from error
    return [line for line in lines if line.strip()]


def _shorten(text: str, width: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _complain(sentence: str) -> None:
    print(f"minipaged: {sentence}", file=sys.stderr)


def main() -> None:
    """Entry point of the command."""
    try:
        app()
    except MinipagedError as error:
        _complain(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
