"""Beyond the paper: the order of service, a cache that is too small, all of the GPU's memory."""

from __future__ import annotations

from matplotlib.figure import Figure as Canvas

from minipaged.evaluation import sweep
from minipaged.evaluation.cost_model import BYTES, DEPLOYMENTS
from minipaged.evaluation.figures.common import (
    SYSTEMS,
    Results,
    Row,
    Task,
    serve_task,
    stacked_bars,
)
from minipaged.evaluation.figures.memory import CATEGORIES, SPLIT, fig2_tasks

POLICY_RATES = {"sharegpt": (3.0, 3.5, 4.0, 5.0), "alpaca": (60.0, 65.0, 70.0, 80.0)}


def policies_tasks(quick: bool) -> dict[str, Task]:
    """Two orders of service, around the rates that are sustained."""
    seconds = 60 if quick else 600
    return {
        f"{dataset} {rate:g} {policy}": serve_task(dataset, rate, seconds, policy=policy)
        for dataset, rates in POLICY_RATES.items()
        for rate in rates
        for policy in ("fcfs", "shortest")
    }


def policies_table(results: Results) -> list[Row]:
    """Latency of the shortest first, over that of the first come."""
    return [
        Row(
            f"{dataset} at {rate:g}/s, {name}: shortest first / first come",
            None,
            results[f"{dataset} {rate:g} shortest"][key] / results[f"{dataset} {rate:g} fcfs"][key],
        )
        for dataset, rates in POLICY_RATES.items()
        for rate in rates
        for name, key in (("mean", "latency"), ("99 %", "p99"))
    ]


def policies_plot(canvas: Canvas, results: Results) -> None:
    """Mean latency over the rate."""
    canvas.set_size_inches(9, 4)
    for ax, (dataset, rates) in zip(canvas.subplots(1, 2), POLICY_RATES.items(), strict=True):
        for policy, style in (("fcfs", "-"), ("shortest", "--")):
            for key, marker in (("latency", "o"), ("p99", "^")):
                values = [results[f"{dataset} {rate:g} {policy}"][key] for rate in rates]
                label = f"{policy}, {'mean' if key == 'latency' else '99 %'}"
                ax.plot(rates, values, style, marker=marker, label=label)
        ax.set_yscale("log")
        ax.set_title(dataset)
        ax.set_xlabel("requests/s")
        ax.set_ylabel("s/token")
    canvas.axes[0].legend()


POOLS = (1100, 1500, 2048, 4096, 8192, 16384, 32768, 65536)
MODES = ("recompute", "swap", "auto")


def pressure_tasks(quick: bool) -> dict[str, Task]:
    """From a pool that holds one sequence and a little more to one that holds half of all."""
    return {
        f"{slots} {mode}": Task(
            sweep.under_pressure,
            {
                "kv_slots": slots,
                "prompt": 512,
                "output": 512,
                "count": 16 if quick else 128,
                "system": {"preemption": mode},
            },
        )
        for slots in POOLS
        for mode in MODES
    }


def pressure_table(results: Results) -> list[Row]:
    """Throughput by size and way of preemption, and how often it happened."""
    rows = []
    for slots in POOLS:
        for mode in MODES:
            result = results[f"{slots} {mode}"]
            what = f"{slots:,} slots, {mode}: tokens/s ({result['preemptions']} preemptions)"
            rows.append(Row(what, None, result["tokens_per_second"]))
    return rows


def pressure_plot(canvas: Canvas, results: Results) -> None:
    """Throughput over the size of the cache."""
    ax = canvas.subplots()
    for mode in MODES:
        values = [results[f"{slots} {mode}"]["tokens_per_second"] for slots in POOLS]
        ax.plot(POOLS, values, marker=".", label=mode)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("slots of the cache")
    ax.set_ylabel("tokens/s")
    ax.legend()


components_tasks = fig2_tasks


def _components(results: Results, name: str) -> dict[str, float]:
    """GB by component; the cache's by what it holds."""
    deployment = DEPLOYMENTS["opt-13b"]
    model = deployment.model
    weights = model.num_weights * BYTES / 1e9
    cache = deployment.kv_slots * model.kv_bytes_per_token / 1e9
    parts = {"weights": weights}
    for category in CATEGORIES:
        parts[f"cache: {category}"] = cache * results[name]["shares"][category] / 100
    parts["other"] = deployment.gpu.memory / 1e9 - weights - cache
    return parts


def components_table(results: Results) -> list[Row]:
    """GB of each component under each system."""
    return [
        Row(f"{SYSTEMS[name]}: {component}, GB", None, gigabytes)
        for name in SPLIT
        for component, gigabytes in _components(results, name).items()
    ]


def components_plot(canvas: Canvas, results: Results) -> None:
    """One bar for each system."""
    parts = {SYSTEMS[name]: _components(results, name) for name in SPLIT}
    stacked_bars(canvas, parts, "GB of the GPU's 40")
