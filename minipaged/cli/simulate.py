"""`minipaged simulate`: requests, a deployment and memory policies; what would they have done?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from minipaged.cli.options import (
    BlockSizeOption,
    JsonOption,
    LessonsOption,
    PlotOption,
    PreemptionOption,
    SeedOption,
    TokenizerOption,
    TraceOption,
    at_least_one,
    recorded_requests,
    use_lessons,
)
from minipaged.errors import ConfigurationError

if TYPE_CHECKING:
    from minipaged.evaluation.cost_model import Deployment

DeploymentOption = Annotated[
    str, typer.Option(help="opt-13b, opt-66b, opt-175b, llama-13b or llama-3-8b")
]
HardwareOption = Annotated[
    Path | None,
    typer.Option(
        help='another deployment, as JSON: {"model": {"num_weights": 8e9, "num_layers": 32, '
        '"hidden": 4096, "kv_hidden": 1024, "context_length": 131072}, "gpu": "A100-80GB", '
        '"num_gpus": 1, "kv_slots": 400000}'
    ),
]
DatasetOption = Annotated[
    str, typer.Option(help="sharegpt, alpaca, translation-1, translation-5 or chat")
]


def _target(deployment: str, hardware: Path | None) -> Deployment:
    """What is simulated: a deployment of this name, or the one that a file describes."""
    from minipaged.evaluation.cost_model import deployment_named, read_deployment

    return read_deployment(hardware) if hardware is not None else deployment_named(deployment)


def _progress(console: Console) -> Progress:
    """A bar with the time gone and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def simulate(
    deployment: DeploymentOption = "opt-13b",
    hardware: HardwareOption = None,
    dataset: DatasetOption = "sharegpt",
    trace: TraceOption = None,
    tokenizer: TokenizerOption = None,
    rate: Annotated[
        float | None, typer.Option(help="requests per second; a trace's own if left out")
    ] = None,
    seconds: Annotated[float, typer.Option(help="in which requests arrive")] = 600,
    requests: Annotated[
        int | None, typer.Option(help="so many, arriving at random, with the trace's lengths")
    ] = None,
    memory_policy: Annotated[
        list[str] | None,
        typer.Option(help="paged, orca-max, orca-pow2, orca-oracle, static; several times"),
    ] = None,
    samples: Annotated[int, typer.Option("--n", help="samples of every request")] = 1,
    prefix_cache: Annotated[bool, typer.Option("--prefix-cache")] = False,
    preemption: PreemptionOption = "recompute",
    policy: Annotated[str, typer.Option(help="order of service: fcfs or shortest")] = "fcfs",
    block_size: BlockSizeOption = 16,
    max_num_seqs: Annotated[int, typer.Option(help="sequences that run at a time")] = 256,
    seed: SeedOption = 0,
    json_file: JsonOption = None,
    lessons: LessonsOption = None,
) -> None:
    """Serve requests with the real scheduler on a computed GPU; nothing here is measured."""
    use_lessons(lessons)
    from typing import get_args

    from minipaged.evaluation import report
    from minipaged.evaluation.arrivals import (
        TimedRequest,
        check_rate,
        check_workload,
        poisson_requests,
    )
    from minipaged.evaluation.outcome import Outcome
    from minipaged.evaluation.simulator import Simulation, System
    from minipaged.evaluation.traces import at_random, at_rate
    from minipaged.scheduling.preemption import PreemptionMode

    if preemption not in get_args(PreemptionMode):
        raise ConfigurationError(
            f"--preemption is {preemption!r}; choose {', '.join(get_args(PreemptionMode))}"
        )
    for name, value in (("--n", samples), ("--requests", requests or 1), ("--seconds", seconds)):
        at_least_one(name, value)
    if rate is not None:
        check_rate(rate)
    if trace is None:
        check_workload(dataset)
    target = _target(deployment, hardware)
    recorded: list[TimedRequest] = []
    if trace is not None:
        recorded = recorded_requests(trace, tokenizer)
        if recorded[-1].arrival == 0 and requests is None:
            requests, rate = len(recorded), rate or 2.0
    elif requests is not None:
        raise ConfigurationError("--requests draws from a trace; name one with --trace")

    def arriving() -> Iterable[TimedRequest]:
        if not recorded:
            length = target.model.context_length
            return poisson_requests(dataset, rate or 2.0, seconds, length, seed)
        if requests is not None:
            own = len(recorded) / recorded[-1].arrival if recorded[-1].arrival else 2.0
            return at_random(recorded, rate or own, requests, seed)
        return at_rate(recorded, rate) if rate is not None else recorded

    expected = requests or len(recorded) or round((rate or 2.0) * seconds)
    console = Console(highlight=False)
    outcomes: dict[str, Outcome] = {}
    with _progress(console) as bar:
        for memory in memory_policy or ["orca-max", "orca-pow2", "orca-oracle", "paged"]:
            paged = memory == "paged"
            system = System(
                memory_policy=memory,
                block_size=block_size,
                policy=policy,
                max_num_seqs=max_num_seqs,
                preemption=preemption if paged else "recompute",  # type: ignore[arg-type]
                prefix_caching=prefix_cache and paged,
                width=samples,
            )
            task = bar.add_task(memory, total=expected)
            outcomes[memory] = Simulation(system, target, seed).run(
                arriving(),
                lambda ended, _, task=task: bar.update(task, completed=ended),  # type: ignore[misc]
            )
            bar.remove_task(task)
    table = Table("memory", "s/token", "p99", "mean batch", "tokens/s", "token states", "preempted")
    for memory, outcome in outcomes.items():
        table.add_row(
            memory,
            f"{outcome.latency:.3f}",
            f"{outcome.p99:.3f}",
            f"{outcome.batch:.2f}",
            f"{outcome.tokens_per_second:.0f}",
            f"{outcome.memory.shares()['states']:.1f} %",
            str(outcome.preemptions),
        )
    console.print(table)
    tokens = sum(outcome.tokens for outcome in outcomes.values())
    real = sum(outcome.real for outcome in outcomes.values())
    first = next(iter(outcomes.values()))
    console.print(
        f"simulated: {first.requests + first.refused} requests for each memory policy, "
        f"{tokens / real:,.0f} tokens per second of this machine"
    )
    for memory, outcome in outcomes.items():
        if outcome.refused:
            console.print(
                f"{memory}: {outcome.refused} refused, which need more than the context, the "
                "memory or --max-num-seqs"
            )
    if prefix_cache and "paged" in outcomes:
        hits = outcomes["paged"].hit_tokens
        console.print(f"{hits:,} tokens of prompts were found in the prefix cache")
    if json_file is not None:
        report.write_json(json_file, list(outcomes.values()), policies=list(outcomes))


def reproduce(
    figures: Annotated[
        list[str],
        typer.Argument(help="fig2, fig12 ... fig19, policies, pressure, components; or all"),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="short runs, for a first look")] = False,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="folder for tables, results and plots")
    ] = Path("results"),
    processes: Annotated[int, typer.Option(help="tasks that run at a time")] = 2,
) -> None:
    """The paper's figures from this engine: each a plot, and a table beside the paper's values."""
    from minipaged.evaluation import reproduce as runner
    from minipaged.evaluation.figures import FIGURES

    at_least_one("--processes", processes)
    names = runner.figure_names(figures)
    console = Console(highlight=False)
    for name in names:
        with _progress(console) as bar:
            task = bar.add_task(name)
            try:
                rows = runner.reproduce(
                    name,
                    output,
                    quick,
                    processes,
                    lambda done, of: bar.update(task, completed=done, total=of),  # noqa: B023
                )
            except KeyboardInterrupt:
                console.print(f"interrupted; the next run goes on from what is in {output}")
                raise
        figure = FIGURES[name]
        table = Table("", "paper", "ours", "ratio", title=f"{name}: {figure.title}")
        for row in rows:
            said = "" if row.paper is None else str(row.paper)
            ratio = f"{row.ours / row.paper:.2f}" if isinstance(row.paper, float) else ""
            table.add_row(row.what, said, f"{row.ours:.2f}", ratio)
        console.print(table)
        if figure.note:
            console.print(figure.note)


def tune_block_size(
    rate: Annotated[float, typer.Option(help="requests per second: more than can be sustained")],
    deployment: DeploymentOption = "opt-13b",
    hardware: HardwareOption = None,
    dataset: DatasetOption = "sharegpt",
    seconds: Annotated[float, typer.Option(help="in which requests arrive")] = 300,
    plot: PlotOption = None,
) -> None:
    """Choose the block size for a model and a workload; simulated."""
    from minipaged.evaluation.arrivals import check_rate, check_workload
    from minipaged.evaluation.sweep import tune_block_size as tune

    check_rate(rate)
    check_workload(dataset)
    at_least_one("--seconds", seconds)
    target = _target(deployment, hardware)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if 4 * size <= target.kv_slots]
    chosen, outcomes = tune(target, dataset, rate, seconds, sizes)
    table = Table("block size", "tokens/s", "mean batch", "token states", "last blocks' waste")
    for size, outcome in outcomes.items():
        shares = outcome.memory.shares()
        figures = (f"{outcome.tokens_per_second:.0f}", f"{outcome.batch:.1f}")
        waste = (f"{shares['states']:.1f} %", f"{shares['internal']:.1f} %")
        table.add_row(str(size), *figures, *waste, style="bold" if size == chosen else None)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{chosen}: the largest within 1 % of the best throughput")
    if plot is not None:
        from matplotlib.figure import Figure

        canvas = Figure(layout="constrained")
        ax = canvas.subplots()
        ax.plot(list(outcomes), [o.tokens_per_second for o in outcomes.values()], marker=".")
        ax.axvline(chosen, linestyle=":")
        ax.set_xscale("log", base=2)
        ax.set_xlabel("tokens per block")
        ax.set_ylabel("tokens/s")
        canvas.savefig(plot)
