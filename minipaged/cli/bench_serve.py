"""`minipaged bench serve`: how long an endpoint lets its users wait, at which rate of requests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from minipaged.cli.bench import bench
from minipaged.cli.generate import complain
from minipaged.cli.options import (
    JsonOption,
    PlotOption,
    SeedOption,
    TokenizerOption,
    TraceOption,
    at_least_one,
    needs_extra,
    recorded_requests,
)
from minipaged.errors import ConfigurationError

if TYPE_CHECKING:
    from minipaged.evaluation.load_run import LoadRun

WARM_UP = 2  # requests before the first run; they do not count


@bench.command()
def serve(
    base_url: Annotated[str, typer.Option(help="of an OpenAI-compatible endpoint")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[
        str | None, typer.Option(help="the endpoint's name of it; its first if left out")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MINIPAGED_API_KEY", help="sent as a bearer token")
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="whose lengths: sharegpt, alpaca, translation-1, chat, ...")
    ] = "sharegpt",
    trace: TraceOption = None,
    tokenizer: TokenizerOption = None,
    arrivals: Annotated[
        str | None, typer.Option(help="poisson, or trace: at its own times, scaled to the rate")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="requests per second; a trace's own, or 1, if left out")
    ] = None,
    rates: Annotated[
        str | None, typer.Option(help="several, one run each, as in 1,2,4", show_default=False)
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", help="raise the rate by half until latency breaks, or more come than end"
        ),
    ] = False,
    latency_limit: Annotated[
        float, typer.Option(help="mean normalized latency at which it breaks, in s/token")
    ] = 0.5,
    num_requests: Annotated[
        int, typer.Option(help="at the first rate; at others, as many in the same time")
    ] = 100,
    max_context: Annotated[
        int | None, typer.Option(help="tokens of prompt and output; the model's if left out")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option(help="have all tokens that are asked for; not every server can")
    ] = True,
    timeout: Annotated[float, typer.Option(help="seconds from when a request was due")] = 300,
    json_file: JsonOption = None,
    plot: PlotOption = None,
    seed: SeedOption = 0,
) -> None:
    """Send requests at their time to an endpoint, and measure from that time on.

    Requests are sent when they are due, whatever became of the others, and their latency counts
    from then (no coordinated omission).  Where the client itself was late, so that the figures
    are not the server's, it says so and ends with exit code 1.
    """
    import numpy as np

    from minipaged.evaluation import report
    from minipaged.evaluation.arrivals import check_rate, check_workload

    with needs_extra("bench serve", "serving"):
        from minipaged.evaluation import load_report
        from minipaged.evaluation.endpoint import find_endpoint
        from minipaged.evaluation.load_client import Record, send_all, warm_up
        from minipaged.evaluation.load_run import summarise
        from minipaged.evaluation.load_sweep import LoadSource, conclusion, run_rates

    at_least_one("--num-requests", num_requests)
    for name, seconds in (("--timeout", timeout), ("--latency-limit", latency_limit)):
        if not seconds > 0:
            raise ConfigurationError(f"{name} is {seconds:g}; it must be above 0")
    check_workload(dataset)
    poisson = _is_poisson(arrivals, trace)
    if rates is not None and sweep:
        raise ConfigurationError("--rates names them all; leave it out, or --sweep")
    wanted = _parse_rates(rate, rates)
    for each in wanted:
        check_rate(each)
    recorded = [] if trace is None else recorded_requests(trace, tokenizer)
    endpoint = find_endpoint(base_url, model, api_key, max_context)
    source = LoadSource(dataset, recorded, poisson, endpoint.longest, seed)
    if not wanted:
        wanted = [source.own_rate(num_requests) or 1.0]
    rng = np.random.default_rng(seed)
    console = Console(highlight=False)
    console.print(f"{endpoint.model} at {endpoint.base_url}, up to {endpoint.longest} tokens")
    cut = sum(request != source.cut(request) for request in recorded)
    if cut:
        console.print(f"{cut:,} of {len(recorded):,} requests of the trace are cut to that")
    if endpoint.vocab_size is None:
        console.print("it does not tell its vocabulary: prompts are words, of about these lengths")
    first = source.take(num_requests, wanted[0])[:WARM_UP]
    asyncio.run(warm_up(endpoint, endpoint.requests(first, rng, ignore_eos), timeout))
    runs: list[LoadRun] = []

    def run_at(rate: float) -> LoadRun:
        timed = source.take(max(1, round(num_requests * rate / wanted[0])), rate)
        due = endpoint.requests(timed, rng, ignore_eos)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        # Seldom drawn, for the client sends nothing meanwhile.
        with Progress(*columns, console=console, transient=True, refresh_per_second=1) as bar:
            task = bar.add_task(f"{rate:.3g} requests/s", total=len(due))

            def ended(_: Record) -> None:
                bar.advance(task)

            run = summarise(rate, asyncio.run(send_all(endpoint, due, timeout, ended)))
        runs.append(run)
        load_report.show_run(console, run)
        if json_file is not None:  # after every rate, so that an interrupt loses none of them
            workload = {"dataset": dataset} if trace is None else {"trace": trace.name}
            report.write_json(json_file, runs, model=endpoint.model, **workload, seed=seed)
        return run

    run_rates(wanted, latency_limit if sweep else None, run_at)
    if len(runs) > 1:
        load_report.show_rates(console, runs)
    if sweep:
        console.print(f"sustained: {conclusion(runs, latency_limit)}")
    if plot is not None:
        load_report.plot_rates(plot, runs, latency_limit if sweep else None)
    late = [run for run in runs if not run.valid]
    if late:
        complain(
            f"at {', '.join(f'{run.rate:.3g}' for run in late)} requests/s the client was late by "
            f"up to {1000 * max(run.lag.largest for run in late):.0f} ms, too much of the time to "
            "the first token for that to be the server's; send less, or from another machine"
        )
        raise typer.Exit(1)


def _is_poisson(arrivals: str | None, trace: Path | None) -> bool:
    """Whether requests arrive at random: unless said, where there is no trace."""
    if arrivals not in (None, "poisson", "trace"):
        raise ConfigurationError(f"--arrivals is {arrivals!r}; choose poisson or trace")
    if arrivals == "trace" and trace is None:
        raise ConfigurationError("--arrivals trace needs times; name a file with --trace")
    return arrivals == "poisson" or trace is None


def _parse_rates(rate: float | None, rates: str | None) -> list[float]:
    """The rates that were asked for; none if neither option was given."""
    if rates is None:
        return [] if rate is None else [rate]
    if rate is not None:
        raise ConfigurationError("--rate and --rates were both given; leave one of them out")
    try:
        return [float(each) for each in rates.split(",")]
    except ValueError as error:
        raise ConfigurationError(
            f"--rates is {rates!r}; give requests per second with commas between, as in 1,2,4"
        ) from error
