"""Figures 2, 13, 18 and 19: what the memory holds, how many it serves, blocks and swapping."""

from __future__ import annotations

import itertools

from matplotlib.figure import Figure as Canvas

from minipaged.evaluation import sweep
from minipaged.evaluation.figures.common import (
    SYSTEMS,
    Results,
    Row,
    Task,
    serve_task,
    stacked_bars,
)

# Figure 2: what the memory holds.

SPLIT = {  # states, reserved, internal, external; read off, but for the first column
    "orca-max": (20.4, 13.3, 57.3, 8.9),
    "orca-pow2": (26.8, 17.9, 13.6, 41.6),
    "orca-oracle": (38.2, 25.2, None, 36.6),
    "paged": (96.3, None, None, None),
}
CATEGORIES = ("states", "reserved", "internal", "external")


def fig2_tasks(quick: bool) -> dict[str, Task]:
    """ShareGPT at a rate that no system sustains, so that all memory is wanted."""
    return {
        name: serve_task("sharegpt", 6.0, 120 if quick else 900, memory_policy=name)
        for name in SPLIT
    }


def fig2_table(results: Results) -> list[Row]:
    """Percent of the memory, by category."""
    return [
        Row(f"{SYSTEMS[name]}: {category}, %", paper, results[name]["shares"][category])
        for name, papers in SPLIT.items()
        for category, paper in zip(CATEGORIES, papers, strict=True)
    ]


def fig2_plot(canvas: Canvas, results: Results) -> None:
    """One bar for each system."""
    stacked_bars(canvas, {SYSTEMS[name]: results[name]["shares"] for name in SPLIT}, "KV cache, %")


# Figure 13: requests that run at a time.

BATCHES = {
    ("sharegpt", 2.0): {"orca-max": 7.00, "orca-pow2": 9.81, "orca-oracle": 13.62, "paged": 30.42},
    ("alpaca", 30.0): {"orca-max": 7.0, "orca-pow2": 43.24, "orca-oracle": 72.75, "paged": 132.44},
}


def fig13_tasks(quick: bool) -> dict[str, Task]:
    """OPT-13B at the paper's two rates, and at three times them, where every system is full."""
    seconds = 60 if quick else 1200
    tasks = {}
    for (dataset, rate), systems in BATCHES.items():
        for factor in (1, 3):
            for name in systems:
                key = f"{dataset} {factor * rate:g} {name}"
                tasks[key] = serve_task(dataset, factor * rate, seconds, memory_policy=name)
        tasks[f"{dataset} apart"] = serve_task(dataset, rate, seconds, prompts_apart=True)
    return tasks


def fig13_table(results: Results) -> list[Row]:
    """Mean batches; the paper's belong to its rates."""
    rows = []
    for (dataset, rate), systems in BATCHES.items():
        for factor in (1, 3):
            for name, paper in systems.items():
                batch = results[f"{dataset} {factor * rate:g} {name}"]["batch"]
                where = f"{dataset} at {factor * rate:g}/s: {SYSTEMS[name]}"
                rows.append(Row(where, paper if factor == 1 else None, batch))
        apart = results[f"{dataset} apart"]["batch"]
        where = f"{dataset} at {rate:g}/s: vLLM, prompts apart"
        rows.append(Row(where, systems["paged"], apart))
    return rows


# Figures 18 and 19: what paging costs, the size of a block, swapping and recomputation.

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
KERNEL_BATCHES = (8, 32)
KERNEL_CONTEXTS = (64, 128, 256)


def fig18_tasks(quick: bool) -> dict[str, Task]:
    """The attention by itself; both datasets at a rate that blocks of 16 hardly sustain."""
    kernels = {
        f"kernel {batch} {context}": Task(
            sweep.paging_cost,
            {"batch": batch, "context": context, "repeats": 3 if quick else 25},
        )
        for batch in KERNEL_BATCHES
        for context in KERNEL_CONTEXTS
    }
    return kernels | {
        f"{dataset} {block_size}": serve_task(
            dataset, rate, 120 if quick else seconds, block_size=block_size
        )
        for dataset, rate, seconds in (("sharegpt", 3.4, 1200), ("alpaca", 65.0, 600))
        for block_size in BLOCK_SIZES
    }


def fig18_table(results: Results) -> list[Row]:
    """The attention over that of contiguous memory; latencies over that of the best block size.

    The paper calls blocks of 16 to 32 best.
    """
    rows = []
    for batch, context in itertools.product(KERNEL_BATCHES, KERNEL_CONTEXTS):
        what = f"attention, {batch} of {context} tokens"
        times = results[f"kernel {batch} {context}"]
        paged = times["scattered blocks"]
        rows.append(
            Row(f"{what}: paged / in a row", "1.20 to 1.26", paged / times["blocks in a row"])
        )
        rows.append(Row(f"{what}: paged / PyTorch's", None, paged / times["SDPA, contiguous"]))
    for dataset in ("sharegpt", "alpaca"):
        latencies = {size: results[f"{dataset} {size}"]["latency"] for size in BLOCK_SIZES}
        best = min(latencies.values())
        rows += [Row(f"{dataset}, blocks of {n}", None, s / best) for n, s in latencies.items()]
    return rows


def fig18_plot(canvas: Canvas, results: Results) -> None:
    """Time over the context, paged and not; latency over the block size."""
    canvas.set_size_inches(9, 4)
    left, ax = canvas.subplots(1, 2)
    for batch in KERNEL_BATCHES:
        times = [results[f"kernel {batch} {context}"] for context in KERNEL_CONTEXTS]
        for name, style in (("scattered blocks", "-"), ("blocks in a row", ":")):
            values = [time[name] / 1e3 for time in times]
            left.plot(
                KERNEL_CONTEXTS, values, style, marker=".", label=f"{batch} sequences, {name}"
            )
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("tokens of each sequence")
    left.set_ylabel("attention of one layer, ms")
    left.set_ylim(bottom=0.1)
    left.legend(loc="lower right")
    for dataset in ("sharegpt", "alpaca"):
        latencies = [results[f"{dataset} {size}"]["latency"] for size in BLOCK_SIZES]
        ax.plot(BLOCK_SIZES, latencies, marker=".", label=dataset)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("tokens per block")
    ax.set_ylabel("s/token")
    ax.legend()


def fig19_tasks(quick: bool) -> dict[str, Task]:
    """The cost of each way by itself, and both in a pool that is too small."""
    tasks = {
        f"cost {size}": Task(
            sweep.preemption_costs,
            {"deployment": "opt-13b", "block_size": size, "tokens": 512},
        )
        for size in BLOCK_SIZES
    }
    for size in BLOCK_SIZES[2:]:
        for mode in ("recompute", "swap"):
            seconds = 120 if quick else 600
            task = serve_task("sharegpt", 6.0, seconds, block_size=size, preemption=mode)
            tasks[f"{mode} {size}"] = task
    return tasks


def fig19_table(results: Results) -> list[Row]:
    """Recomputation over swapping: the time of one preemption, and the latency of a workload."""
    rows = []
    for size in BLOCK_SIZES:
        cost = results[f"cost {size}"]
        ratio = cost["recompute"] / cost["swap in and out"]
        rows.append(Row(f"cost, blocks of {size}: recompute / swap", None, ratio))
    for size in BLOCK_SIZES[2:]:
        ratio = results[f"recompute {size}"]["latency"] / results[f"swap {size}"]["latency"]
        said = "about 1" if 16 <= size <= 64 else None
        rows.append(Row(f"full system, blocks of {size}: recompute / swap", said, ratio))
    return rows


def fig19_plot(canvas: Canvas, results: Results) -> None:
    """Milliseconds of one preemption over the block size."""
    ax = canvas.subplots()
    for way in ("swap in and out", "recompute"):
        milliseconds = [1000 * results[f"cost {size}"][way] for size in BLOCK_SIZES]
        ax.plot(BLOCK_SIZES, milliseconds, marker=".", label=way)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("tokens per block")
    ax.set_ylabel("ms for 512 tokens")
    ax.legend()
