"""Measurements for people, as a table, and for programs, as JSON."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from minipaged.evaluation.cost_check import Machine, StepTime
    from minipaged.evaluation.host_overhead import HostOverhead
    from minipaged.evaluation.kernel import KernelTime
    from minipaged.evaluation.kernel_resources import KernelResources
    from minipaged.evaluation.latency import Latency
    from minipaged.evaluation.memory_policies import PolicyRun
    from minipaged.evaluation.parallel import ParallelRun
    from minipaged.evaluation.perplexity import Loss
    from minipaged.evaluation.prefix_replay import Replay
    from minipaged.evaluation.scheduler_cost import SchedulerCost
    from minipaged.evaluation.sharing import Sharing
    from minipaged.evaluation.throughput import Measurement


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch  # which takes long, and who prints a table has no need of it

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [li for li in cpuinfo.read_text().splitlines() if li.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": name,
        **gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def show_throughput(console: Console, measurements: list[Measurement]) -> None:
    """Tokens per second, the ratio to the best other system, memory, and where the time went."""
    ours, *others = measurements
    table = Table("system", "tokens/s", "seconds of each run", "peak memory, GiB")
    for m in measurements:
        runs = ", ".join(f"{seconds:.1f}" for seconds in m.seconds)
        table.add_row(m.system, f"{m.tokens_per_second:.1f}", runs, f"{m.peak_memory_gib:.2f}")
    console.print(table)
    if others:
        best = max(others, key=lambda m: m.tokens_per_second)
        ratio = ours.tokens_per_second / best.tokens_per_second
        console.print(f"{ratio:.2f} times {best.system}, the better of the others")
        rounds = zip(ours.seconds, *(m.seconds for m in others), strict=True)
        ratios = ", ".join(f"{min(theirs) / mine:.2f}" for mine, *theirs in rounds)
        console.print(f"round by round: {ratios} times the better of the others")
    if ours.shares is not None:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in ours.shares.items())
        console.print(f"time of minipaged: {shares}")
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))


def show_parallel(console: Console, runs: list[ParallelRun]) -> None:
    """Throughput by the number of ranks, and the bytes of an average step of each kind."""
    table = Table("ranks", "tokens/s", "bytes per step", "counted", "formula")
    for run in runs:
        rows = [
            (kind.replace("_", "-"), getattr(run.counted, kind), getattr(run.formula, kind))
            for kind in ("control", "all_reduce", "gather")
        ]
        for number, (kind, counted, formula) in enumerate(rows if run.ranks > 1 else [("", 0, 0)]):
            first = ("", "") if number else (str(run.ranks), f"{run.tokens_per_second:.1f}")
            each = (f"{total / run.steps:,.0f}" for total in (counted, formula))
            table.add_row(*first, kind, *each)
        if run.ranks > 1:
            sent = "unknown" if run.loopback is None else f"{run.loopback / run.steps:,.0f}"
            table.add_row("", "", "on the wire", sent, f"{run.on_the_wire / run.steps:,.0f}")
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))


def show_scheduler(console: Console, costs: list[SchedulerCost]) -> None:
    """The cost of a plan by the number of running sequences."""
    table = Table("running sequences", "median, ms", "largest, ms", "µs per sequence")
    for cost in costs:
        figures = (cost.median_ms, cost.largest_ms, cost.microseconds_per_sequence)
        table.add_row(str(cost.num_seqs), *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))


def show_replays(console: Console, replays: list[Replay]) -> None:
    """The hit rate by the size of the pool."""
    table = Table("pool, blocks", "hits", "of blocks", "hit rate", "evictions", "seconds")
    for r in replays:
        pool = "unbounded" if r.pool_blocks is None else f"{r.pool_blocks:,}"
        figures = (f"{r.hits:,}", f"{r.blocks:,}", f"{r.hit_rate:.1%}", f"{r.evictions:,}")
        table.add_row(pool, *figures, f"{r.seconds:.1f}")
    console.print(table)
    refused = max(r.refused for r in replays)
    if refused:
        console.print(f"up to {refused:,} blocks belong to requests longer than a pool")


def show_sharing(console: Console, runs: list[Sharing]) -> None:
    """Blocks saved by sharing, beside the paper's figures."""
    table = Table("lengths", "decoding", "width", "mean tokens", "saved", "paper, %", "copies/step")
    for run in runs:
        table.add_row(
            run.dataset,
            run.decoding,
            str(run.width),
            f"{run.mean_prompt:.0f} in, {run.mean_output:.0f} out",
            f"{run.saved:.1%}",
            run.paper,
            f"{run.copies_per_step:.1f}",
        )
    console.print(table)


def show_policies(console: Console, runs: list[PolicyRun]) -> None:
    """Throughput by memory policy, and how many times each of the others the first is as fast."""
    table = Table("memory", "tokens/s", "mean batch", "s/token", "preempted", "seconds", "ratio")
    first = runs[0]
    for run in runs:
        table.add_row(
            run.policy,
            f"{run.tokens_per_second:.0f}",
            f"{run.batch:.1f}",
            f"{run.latency:.3f}",
            str(run.preemptions),
            ", ".join(f"{seconds:.1f}" for seconds in run.seconds),
            f"{first.tokens_per_second / run.tokens_per_second:.2f}",
        )
    console.print(table)
    console.print(f"ratio: {first.policy} over this one")
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))


def show_losses(console: Console, losses: list[Loss]) -> None:
    """Loss and perplexity of each system and type, and how far it is from the first of its type."""
    table = Table("type", "system", "nats/token", "perplexity", "difference, nats")
    first = {loss.dtype: loss for loss in reversed(losses)}
    for loss in losses:
        difference = loss.nats - first[loss.dtype].nats
        figures = (f"{loss.nats:.6f}", f"{loss.perplexity:.4f}", f"{difference:+.1e}")
        table.add_row(loss.dtype, loss.system, *figures)
    console.print(table)
    console.print(f"{losses[0].tokens:,} tokens predicted")


def show_step_times(console: Console, measured: Machine, times: list[StepTime]) -> None:
    """What the cost model says of each step, and what the engine took."""
    console.print(
        f"this machine reads {measured.read_bandwidth / 1e9:.1f} GB/s and multiplies at "
        f"{measured.operations / 1e9:.0f} GFLOP/s in bfloat16"
    )
    table = Table(
        "sequences", "tokens of each", "context", "predicted, ms", "measured, ms", "error"
    )
    for step in times:
        shape = (str(step.sequences), str(step.tokens), str(step.context))
        figures = (f"{step.predicted_ms:.1f}", f"{step.measured_ms:.1f}", f"{step.error:+.0%}")
        table.add_row(*shape, *figures)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))


def show_host_overhead(console: Console, overheads: list[HostOverhead]) -> None:
    """Milliseconds of a decoding step, of the GPU's work in it, and of the rest."""
    table = Table("sequences", "steps", "step, ms", "GPU, ms", "host, ms")
    for each in overheads:
        figures = (f"{ms:.3f}" for ms in (each.step_ms, each.gpu_ms, each.host_ms))
        table.add_row(str(each.sequences), each.mode, *figures)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))


def show_latency(console: Console, latencies: list[Latency]) -> None:
    """Time between two tokens while a long prompt is computed."""
    first = latencies[0]
    console.print(
        f"{first.decoding} requests decode while a prompt of {first.long_prompt} tokens arrives"
    )
    table = Table(
        "token budget",
        "between tokens: median, ms",
        "99 %, ms",
        "largest, ms",
        "first token of the long one, ms",
    )
    for latency in latencies:
        figures = (latency.median_ms, latency.p99_ms, latency.largest_ms, latency.first_token_ms)
        table.add_row(str(latency.budget), *(f"{figure:.0f}" for figure in figures))
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))


def show_kernels(console: Console, times: list[KernelTime]) -> None:
    """Time and bandwidth of one layer's attention, by batch and context."""
    table = Table("batch", "context", "heads", "attention", "µs", "GB/s", "of a copy")
    for t in times:
        shape = (str(t.batch), str(t.context), f"{t.heads}/{t.kv_heads}", t.name)
        figures = (f"{t.microseconds:.0f}", f"{t.gigabytes_per_second:.1f}", f"{t.of_copy:.0%}")
        table.add_row(*shape, *figures, end_section=t.name.startswith("SDPA"))
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))


def show_resources(console: Console, resources: list[KernelResources]) -> None:
    """Registers, shared memory and spills of every kernel."""
    table = Table("kernel", "architecture", "registers", "static shared memory, B", "spilled, B")
    for r in resources:
        figures = (str(r.registers), str(r.shared_bytes), str(r.spill_bytes))
        table.add_row(r.kernel, r.architecture, *figures)
    console.print(table)


def write_json(path: Path, measurements: Sequence[Any], **about: Any) -> None:
    """The same figures, with the command that made them."""
    result = {
        "command": shlex.join(["minipaged", *sys.argv[1:]]),
        **about,
        "machine": machine(),
        "measurements": [dataclasses.asdict(m) for m in measurements],
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
