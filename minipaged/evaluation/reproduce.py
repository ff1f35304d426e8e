"""Runs the tasks of a figure, keeps every result as soon as it is there, and draws the figure.

A task that was done before, with the same arguments and the same source, is not done again: so
a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from minipaged.errors import ConfigurationError
from minipaged.evaluation.figures import FIGURES
from minipaged.evaluation.figures.common import Figure, Results, Row, Task

PACKAGE = Path(__file__).parents[1]
SIMULATOR = ("arrivals", "cost_model", "memory_use", "outcome", "simulator", "sweep")
MEASUREMENTS = ("kernel", "kernel_peers", "sharing")


def figure_names(wanted: Sequence[str]) -> list[str]:
    """The figures that are meant; ConfigurationError for one that there is not."""
    for name in wanted:
        if name != "all" and name not in FIGURES:
            raise ConfigurationError(
                f"there is no figure {name!r}; choose all, or some of {', '.join(FIGURES)}"
            )
    return list(FIGURES) if "all" in wanted else list(dict.fromkeys(wanted))


def reproduce(
    name: str,
    folder: Path,
    quick: bool,
    processes: int,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Row]:
    """Run what is left of a figure, and write NAME.json, NAME.png and NAME.svg; returns its table.

    on_progress: told how many of how many tasks are done.
    """
    figure = FIGURES[name]
    tasks = figure.tasks(quick)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    results = _stored(path, tasks)
    on_progress(len(results), len(tasks))
    left = {key: task for key, task in tasks.items() if key not in results}
    # The largest last tasks of a list would leave the other processes without work.
    # Whoever asks may have threads, such as torch's, and a fork of them can wait for ever.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(task.function, **task.arguments): key
            for key, task in reversed(left.items())
        }
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                _store(path, figure, tasks, results, quick)
                on_progress(len(results), len(tasks))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    ordered = {key: results[key] for key in tasks}
    draw(figure, ordered, folder / name)
    return figure.table(ordered)


def draw(figure: Figure, results: Results, path: Path) -> None:
    """The plot as PNG and as SVG."""
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "minipaged"}
    with mpl.rc_context(style):
        canvas = Canvas(layout="constrained")
        figure.plot(canvas, results)
        canvas.suptitle(figure.title)
        canvas.savefig(path.with_suffix(".png"), dpi=150)
        canvas.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def arguments(task: Task) -> dict[str, Any]:
    """By which a result is recognised: the function and what it was given."""
    return {"function": task.function.__name__, **task.arguments}


def _stored(path: Path, tasks: dict[str, Task]) -> dict[str, Any]:
    """Results of the same tasks of the same source."""
    try:
        stored = json.loads(path.read_text("utf-8"))
        if stored["source"] != source_digest():
            return {}
        return {
            key: entry["result"]
            for key, entry in stored["tasks"].items()
            if key in tasks and entry["task"] == arguments(tasks[key])
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as results of a figure ({error}); remove it or name another "
            "folder with --output"
        ) from error


def _store(
    path: Path, figure: Figure, tasks: dict[str, Task], results: dict[str, Any], quick: bool
) -> None:
    content = {
        "title": figure.title,
        "command": shlex.join(["minipaged", *sys.argv[1:]]),
        "commit": commit(),
        "source": source_digest(),
        "quick": quick,
        "tasks": {
            key: {"task": arguments(tasks[key]), "result": results[key]}
            for key in tasks
            if key in results
        },
    }
    scratch = path.with_suffix(".json.new")
    scratch.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    os.replace(scratch, path)  # whole or not at all, if this process is stopped


@functools.cache
def commit() -> str:
    """The commit of the source, and whether it was changed since."""
    git = ["git", "-C", str(PACKAGE)]
    try:
        name = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "."], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name} and changes" if changed else name


@functools.cache
def source_digest() -> str:
    """Of the files that the results depend on.

    Scheduler, block manager and simulator; and since figures 15 and 18 measure what is there,
    also their measurements, and what these run: engine, decoding, models and attention.
    """
    digest = hashlib.blake2b(digest_size=8)
    names = ("memory", "request", "scheduling", "attention", "decoding", "engine", "models")
    rooms = [PACKAGE / name for name in names]
    files = [path for room in rooms for path in sorted(room.glob("*.py"))]
    files += [path for path in sorted((PACKAGE.parent / "cuda").glob("*")) if path.is_file()]
    files += [PACKAGE / "evaluation" / f"{name}.py" for name in (*SIMULATOR, *MEASUREMENTS)]
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()
