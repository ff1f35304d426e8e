"""Figures 12 and 14 to 17: rates of requests that each system sustains, and what sharing saves."""

from __future__ import annotations

from matplotlib.figure import Figure as Canvas

from minipaged.evaluation import sweep
from minipaged.evaluation.figures.common import (
    ORCAS,
    SYSTEMS,
    Results,
    Row,
    Task,
    latency_plot,
    ratios,
    sweep_task,
)
from minipaged.evaluation.sharing import PAPER as SHARED

# Figure 12: latency over the rate of requests.

KNEES = {  # of vLLM, requests/s, read off
    ("opt-13b", "sharegpt"): 1.9,
    ("opt-66b", "sharegpt"): 0.95,
    ("opt-175b", "sharegpt"): 2.4,
    ("opt-13b", "alpaca"): 28.0,
    ("opt-66b", "alpaca"): 18.0,
    ("opt-175b", "alpaca"): 20.0,
}
GAINS = {"orca-oracle": "1.7 to 2.7", "orca-max": "2.7 to 8", "static": "up to 22"}


def fig12_tasks(quick: bool) -> dict[str, Task]:
    """Five systems on three deployments and two datasets, for an hour each, as in the paper."""
    tasks = {}
    for (deployment, dataset), knee in KNEES.items():
        seconds = 900 if deployment == "opt-175b" else 3600
        if quick:
            seconds = 300 if dataset == "sharegpt" else 100
        for name in SYSTEMS:
            task = sweep_task(deployment, dataset, knee / 8, seconds, quick, memory_policy=name)
            tasks[f"{deployment} {dataset} {name}"] = task
    return tasks


def fig12_table(results: Results) -> list[Row]:
    """Rates that are sustained, and how many times each baseline's paging sustains."""
    rows = []
    for (deployment, dataset), knee in KNEES.items():
        rates = {n: results[f"{deployment} {dataset} {n}"]["sustained"] for n in SYSTEMS}
        where = f"{deployment} {dataset}"
        rows.append(Row(f"{where}: vLLM, requests/s", knee, rates["paged"]))
        for name, paper in GAINS.items():
            said = paper if dataset == "sharegpt" else None
            ratio = rates["paged"] / rates[name]
            rows.append(Row(f"{where}: vLLM / {SYSTEMS[name]}", said, ratio))
    return rows


def fig12_plot(canvas: Canvas, results: Results) -> None:
    """One panel for each deployment and dataset."""
    canvas.set_size_inches(11, 6)
    for ax, (deployment, dataset) in zip(canvas.subplots(2, 3).flat, KNEES, strict=True):
        names = {f"{deployment} {dataset} {name}": label for name, label in SYSTEMS.items()}
        latency_plot(ax, results, names)
        ax.set_title(f"{deployment}, {dataset}")
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=len(SYSTEMS))


# Figures 14 to 17: other ways of decoding.


def fig14_tasks(quick: bool) -> dict[str, Task]:
    """Alpaca on OPT-13B with several outputs per request."""
    kinds = [(1, False), (2, False), (4, False), (6, False), (2, True), (4, True), (6, True)]
    return {
        f"{'beam' if beam else 'parallel'} {width} {name}": sweep_task(
            "opt-13b",
            "alpaca",
            10.0 / width,
            60 if quick else 400,
            quick,
            memory_policy=name,
            width=width,
            beam_search=beam,
        )
        for width, beam in kinds
        for name in ("orca-oracle", "paged")
    }


def fig14_table(results: Results) -> list[Row]:
    """The paper gives the first and the last figure alone."""
    kinds = [key.removesuffix(" paged") for key in results if key.endswith(" paged")]
    return ratios(results, {**dict.fromkeys(kinds), "parallel 1": 1.3, "beam 6": 2.3})


def fig15_tasks(quick: bool) -> dict[str, Task]:
    """The shipped model and the engine, for real."""
    return {
        f"{dataset} {decoding} {width}": Task(
            sweep.sharing,
            {
                "dataset": dataset,
                "decoding": decoding,
                "width": width,
                "num_requests": 8 if quick else 48,
            },
        )
        for dataset, decoding in SHARED
        for width in (2, 4, 6)
    }


def fig15_table(results: Results) -> list[Row]:
    """Percent of the blocks."""
    rows = []
    for key, result in results.items():
        paper = SHARED[result["dataset"], result["decoding"]][result["width"]]
        said: float | str = float(paper) if paper.replace(".", "").isdigit() else paper
        rows.append(Row(f"{key}, %", said, 100 * result["saved"]))
    return rows


def fig16_tasks(quick: bool) -> dict[str, Task]:
    """Translation on LLaMA-13B; paging finds the examples in its prefix cache."""
    return {
        f"{workload} {name}": sweep_task(
            "llama-13b",
            workload,
            8.0,
            30 if quick else 300,
            quick,
            memory_policy=name,
            prefix_caching=name == "paged",
        )
        for workload in ("translation-1", "translation-5")
        for name in ("orca-oracle", "paged")
    }


def fig17_tasks(quick: bool) -> dict[str, Task]:
    """Chats on OPT-13B."""
    return {
        f"chat {name}": sweep_task(
            "opt-13b", "chat", 0.3, 300 if quick else 1800, quick, memory_policy=name
        )
        for name in (*ORCAS, "paged")
    }


def fig17_plot(canvas: Canvas, results: Results) -> None:
    """Latency over the rate."""
    ax = canvas.subplots()
    latency_plot(ax, results, {f"chat {name}": SYSTEMS[name] for name in (*ORCAS, "paged")})
    ax.legend()


def fig16_table(results: Results) -> list[Row]:
    """One and five examples."""
    return ratios(results, {"translation-1": 1.67, "translation-5": 3.58})


def fig17_table(results: Results) -> list[Row]:
    """Over each of the baselines."""
    paged = results["chat paged"]["sustained"]
    return [
        Row(f"chat: vLLM / {SYSTEMS[name]}", 2.0, paged / results[f"chat {name}"]["sustained"])
        for name in ORCAS
    ]
