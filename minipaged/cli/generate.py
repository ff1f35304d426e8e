"""`minipaged generate` and `minipaged chat`: text as it streams, then where its blocks lay."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from minipaged.cli.options import (
    AttentionOption,
    BlockSizeOption,
    BudgetOption,
    DtypeOption,
    LessonsOption,
    MaxTokensOption,
    ModelOption,
    NumBlocksOption,
    PreemptionOption,
    PrefixOption,
    RanksOption,
    SeedOption,
    SeqsOption,
    SwapOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    TraceHtmlOption,
    use_lessons,
)
from minipaged.engine.interrupt import Interrupt
from minipaged.errors import InvalidRequestError
from minipaged.visual.printable import printable

if TYPE_CHECKING:
    from minipaged.engine.engine import Engine

INTERRUPTED = 130


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="served together")] = None,
    model: ModelOption = "tiny",
    prompt_file: Annotated[
        Path | None, typer.Option("--prompts", help="a file with a prompt on every line")
    ] = None,
    trace_html: TraceHtmlOption = None,
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    n: Annotated[int, typer.Option("-n", "--n", help="outputs per prompt")] = 1,
    best_of: Annotated[
        int | None, typer.Option(help="outputs to draw, or beams to keep, for the n returned")
    ] = None,
    beam_search: Annotated[
        bool, typer.Option("--beam-search", help="search; the temperature is 0 then")
    ] = False,
    length_penalty: Annotated[float, typer.Option(help="of a beam search")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends an output")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="never end early")] = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    block_size: BlockSizeOption = 16,
    num_blocks: NumBlocksOption = None,
    max_num_seqs: SeqsOption = 256,
    max_num_batched_tokens: BudgetOption = None,
    preemption: PreemptionOption = "recompute",
    swap_gib: SwapOption = None,
    prefix_cache: PrefixOption = False,
    attention: AttentionOption = "auto",
    tensor_parallel_size: RanksOption = None,
    lessons: LessonsOption = None,
) -> None:
    """Complete one or several prompts and show where their blocks lay."""
    use_lessons(lessons)
    from minipaged.engine.trace import Trace
    from minipaged.request.sampling_params import SamplingParams
    from minipaged.visual.beam_tree import beam_tree
    from minipaged.visual.block_map import run_summary

    texts = [*(prompts or []), *_read_prompts(prompt_file)]
    if not texts:
        raise InvalidRequestError("there is no prompt; give one, or a file of them with --prompts")
    params = SamplingParams(
        temperature=0 if beam_search else temperature,
        top_k=top_k,
        top_p=top_p,
        max_tokens=max_tokens,
        stop=stop or (),
        ignore_eos=ignore_eos,
        n=n,
        best_of=best_of,
        use_beam_search=beam_search,
        length_penalty=length_penalty,
    )
    engine = load(
        model,
        dtype=dtype,
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        preemption=preemption,
        swap_space_gib=swap_gib,
        enable_prefix_caching=prefix_cache,
        attention=attention,
        tensor_parallel_size=tensor_parallel_size,
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
    finished = not names or _serve(engine, console, names, list(names) if params.is_ranked else [])
    if trace.records:
        console.print()
        console.print(run_summary(trace))
        for request_id, name in names.items() if params.width > 1 else ():
            console.print()
            console.print(beam_tree(trace, request_id, name))
    if trace_html is not None and trace.records:
        from minipaged.visual.trace_page import write_trace_html

        write_trace_html(trace, trace_html)
        print(f"{len(trace)} steps to walk through: {trace_html}")
    for sentence in refused:
        complain(sentence)
    if not finished:
        raise typer.Exit(INTERRUPTED)
    if refused:
        raise typer.Exit(2)


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
    prefix_cache: PrefixOption = True,
    attention: AttentionOption = "auto",
    tensor_parallel_size: RanksOption = None,
) -> None:
    """Talk to a model that has a chat template.  An empty line or end of file ends it.

    What was said before is found in the prefix cache at every turn, unless it is switched off.
    """
    from minipaged.request.sampling_params import SamplingParams

    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens
    )
    engine = load(
        model,
        dtype=dtype,
        block_size=block_size,
        num_blocks=num_blocks,
        attention=attention,
        tensor_parallel_size=tensor_parallel_size,
        max_num_seqs=1,
        enable_prefix_caching=prefix_cache,
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


def _answer(engine: Engine, console: Console, messages: list[dict[str, str]], params: Any) -> str:
    """Stream one answer; Ctrl-C ends it and keeps what has come."""
    assert engine.tokenizer is not None
    engine.add_request("chat", engine.tokenizer.apply_chat_template(messages), params)
    text = ""
    with Interrupt() as interrupt:
        while engine.has_unfinished_requests and not interrupt.asked:
            for output in engine.step():
                new = output.outputs[0].text[len(text) :]
                text += new
                console.print(Text(printable(new)), end="", soft_wrap=True)
    engine.abort("chat")
    console.print()
    return text


def _serve(engine: Engine, console: Console, names: dict[str, str], ranked: list[str]) -> bool:
    """Run until all is done; on Ctrl-C show what there is.  Returns whether all is done."""
    from minipaged.visual.live import StreamView

    with StreamView(console, names, ranked) as view, Interrupt() as interrupt:
        engine.observers.append(view)
        while engine.has_unfinished_requests and not interrupt.asked:
            view.show(engine.step())
    return not engine.has_unfinished_requests


def load(model: str, **options: Any) -> Engine:
    """An engine with these EngineOptions; says how large it made the cache."""
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
    line = printable(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def complain(sentence: str) -> None:
    """Say on standard error what is wrong; under torchrun all ranks have one voice, rank 0's."""
    if int(os.environ.get("RANK", 0)) > 0:
        from minipaged.distributed.launch import tell_rank_0

        if tell_rank_0(sentence):
            return
    print(f"minipaged: {sentence}", file=sys.stderr)
