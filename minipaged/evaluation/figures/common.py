"""What a figure is, and what several of them draw alike.

A figure is a list of tasks (functions of sweep.py with their arguments), and functions that make
a table and a plot of their results.  Running, storing and resuming is reproduce.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.figure import Figure as Canvas

from minipaged.evaluation import sweep

SYSTEMS = {
    "static": "FasterTransformer",
    "orca-max": "Orca (Max)",
    "orca-pow2": "Orca (Pow2)",
    "orca-oracle": "Orca (Oracle)",
    "paged": "vLLM",
}
ORCAS = ("orca-max", "orca-pow2", "orca-oracle")
Results = Mapping[str, Any]


class Task(NamedTuple):
    """A function of sweep.py, and its arguments."""

    function: Callable[..., Any]
    arguments: dict[str, Any]


class Row(NamedTuple):
    """One line of a table.  paper: as text, where it is a range or was read off a plot."""

    what: str
    paper: float | str | None
    ours: float


@dataclass(frozen=True)
class Figure:
    """One figure of the paper.

    tasks: by name, given whether there is little time.
    note: what to know when reading the table.
    """

    title: str
    tasks: Callable[[bool], dict[str, Task]]
    table: Callable[[Results], list[Row]]
    plot: Callable[[Canvas, Results], None]
    note: str = ""


def sweep_task(
    deployment: str, workload: str, start: float, seconds: float, quick: bool, **system: Any
) -> Task:
    """A sweep over rates, for so long each.

    A queue grows slowly when the rate is a little too high: in a short run it is looked for at
    a lower latency, and found later.
    """
    arguments = {"deployment": deployment, "workload": workload, "start": start, "system": system}
    return Task(sweep.sweep, arguments | {"seconds": seconds, "limit": 0.2 if quick else 0.5})


def serve_task(workload: str, rate: float, seconds: float, **system: Any) -> Task:
    """One run of OPT-13B at one rate."""
    arguments = {"deployment": "opt-13b", "workload": workload, "system": system}
    return Task(sweep.run_at, arguments | {"rate": rate, "seconds": seconds})


def ratios(results: Results, paper: Mapping[str, float | str | None]) -> list[Row]:
    """Rates that paging sustains over those of the oracle."""
    return [
        Row(
            f"{kind}: vLLM / Orca (Oracle)",
            said,
            results[f"{kind} paged"]["sustained"] / results[f"{kind} orca-oracle"]["sustained"],
        )
        for kind, said in paper.items()
    ]


def latency_plot(ax: Any, results: Results, names: Mapping[str, str]) -> None:
    """Curves of latency over rate; `names` maps tasks to labels."""
    for key, label in names.items():
        points = [p for p in results[key]["points"] if p[1] < 2]
        ax.plot([p[0] for p in points], [p[1] for p in points], marker=".", label=label)
    ax.set_ylim(0, 1)
    ax.set_xlabel("requests/s")
    ax.set_ylabel("s/token")


def bars(canvas: Canvas, rows: list[Row], label: str) -> None:
    """Horizontal bars with the paper's value as a mark, where it is a number."""
    canvas.set_size_inches(8, 0.8 + 0.3 * len(rows))
    ax = canvas.subplots()
    places = range(len(rows))
    ax.barh(places, [row.ours for row in rows], label="ours")
    marks = [(place, row.paper) for place, row in enumerate(rows) if isinstance(row.paper, float)]
    if marks:
        ax.plot([p for _, p in marks], [place for place, _ in marks], "k|", ms=12, label="paper")
    ax.set_yticks(places, [row.what for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel(label)
    ax.legend()


def stacked_bars(canvas: Canvas, parts: Mapping[str, Mapping[str, float]], label: str) -> None:
    """One bar for each system, of parts on top of each other."""
    ax = canvas.subplots()
    bottom = dict.fromkeys(parts, 0.0)
    for part in next(iter(parts.values())):
        heights = [parts[name][part] for name in parts]
        ax.bar(list(parts), heights, bottom=list(bottom.values()), label=part)
        bottom = {name: bottom[name] + parts[name][part] for name in parts}
    ax.set_ylabel(label)
    canvas.legend(loc="outside right upper")


def bars_of(table: Callable[[Results], list[Row]], label: str) -> Callable[..., None]:
    """A plot that shows a figure's table."""
    return lambda canvas, results: bars(canvas, table(results), label)
