"""Runs of the load client as tables, and as a plot over the rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from minipaged.evaluation.load_run import LoadRun


def show_run(console: Console, run: LoadRun) -> None:
    """Percentiles of one run, and all that has to be known to read them."""
    console.print(
        f"{run.rate:.3g} requests/s: {run.completed} of {run.requests} completed in "
        f"{run.seconds:.1f} s, {run.requests_per_second:.2f} requests/s, "
        f"{run.tokens_per_second:.1f} tokens/s"
    )
    if run.completed:
        tokens = (run.prompt_tokens / run.completed, run.output_tokens / run.completed)
        console.print(f"{tokens[0]:.0f} tokens in and {tokens[1]:.0f} out, in the mean")
    table = Table("milliseconds", "mean", "p50", "p90", "p99", "largest")
    times = {
        "first token (TTFT)": run.ttft,
        "token after it (TPOT)": run.tpot,
        "between two chunks": run.between_chunks,
        "end to end": run.end_to_end,
        "normalized, per token": run.normalized,
        "lag of the client": run.lag,
    }
    for name, spread in times.items():
        if spread is not None:
            figures = (spread.mean, spread.p50, spread.p90, spread.p99, spread.largest)
            table.add_row(name, *(f"{1000 * figure:,.1f}" for figure in figures))
    console.print(table)
    for outcome, count in run.failures.items():
        console.print(f"{count} failed, {outcome}: {run.messages[outcome]}", markup=False)
    if run.backlog:
        console.print(f"{run.backlog} were under way when the last was due")
    if run.timeouts:
        console.print("those not finished in time count with the time they were given: at least")
    if run.output_tokens != run.asked_tokens:
        console.print(f"{run.output_tokens:,} output tokens came of {run.asked_tokens:,} asked for")


def show_rates(console: Console, runs: Sequence[LoadRun]) -> None:
    """One line for each rate; all times but the normalized latency in milliseconds."""
    columns = ("rate", "failed", "tokens/s", "s/token", "TTFT p50, p99", "TPOT p50, p99")
    table = Table(*columns, "lag p99")
    for run in runs:
        times = [
            f"{1000 * spread.p50:.0f}, {1000 * spread.p99:.0f}" if spread else "-"
            for spread in (run.ttft, run.tpot)
        ]
        table.add_row(
            f"{run.rate:.3g}",
            str(run.requests - run.completed),
            f"{run.tokens_per_second:.0f}",
            f"{run.latency:.4f}",
            *times,
            f"{1000 * run.lag.p99:.1f}" + ("" if run.valid else "!"),
        )
    console.print(table)
    console.print("rate: requests/s; s/token: mean normalized latency; the others in ms")


def plot_rates(path: Path, runs: Sequence[LoadRun], limit: float | None) -> None:
    """Normalized latency and time to the first token over the rate, as PNG or SVG."""
    shown = [run for run in runs if run.valid and run.normalized and run.ttft]
    rates = [run.rate for run in shown]
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "minipaged"}
    with mpl.rc_context(style):
        canvas = Figure(figsize=(8, 3.5), layout="constrained")
        left, right = canvas.subplots(1, 2)
        left.plot(rates, [run.latency for run in shown], marker=".", label="mean")
        if limit is not None:
            left.axhline(limit, linestyle=":", label="limit")
        left.set_ylabel("normalized latency, s/token")
        for name in ("p50", "p99"):
            times = [getattr(run.ttft, name) for run in shown]
            right.plot(rates, times, marker=".", label=name)
        right.set_ylabel("time to the first token, s")
        for ax in (left, right):
            ax.set_xlabel("requests/s")
            ax.set_ylim(bottom=0)
            ax.legend()
        if limit is not None:  # how high latency gets once it has broken is of no interest
            left.set_ylim(top=1.2 * limit)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        canvas.savefig(path, metadata=metadata)
