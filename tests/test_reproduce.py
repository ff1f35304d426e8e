"""Figures are run, kept, resumed and drawn; the stored ones are those that would be run today."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minipaged.cli import app
from minipaged.errors import ConfigurationError
from minipaged.evaluation import reproduce, sweep
from minipaged.evaluation.cost_model import DEPLOYMENTS
from minipaged.evaluation.figures import FIGURES
from minipaged.evaluation.figures.common import Figure, Row, Task, bars_of

STORED = Path(__file__).parents[1] / "book" / "results"


def costs(*sizes):
    """A small figure of real tasks."""

    def tasks(quick):
        return {
            str(size): Task(
                sweep.preemption_costs,
                {"deployment": "opt-13b", "block_size": size, "tokens": 512},
            )
            for size in sizes
        }

    def table(results):
        return [Row(key, None, result["recompute"]) for key, result in results.items()]

    return Figure("Costs", tasks, table, bars_of(table, "seconds"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(*sizes):
        monkeypatch.setitem(FIGURES, "costs", costs(*sizes))
        seen = []
        rows = reproduce.reproduce("costs", tmp_path, True, 1, lambda *done: seen.append(done))
        return rows, seen

    return run


def test_a_run_goes_on_where_it_stopped(run, tmp_path):
    rows, seen = run(8, 16)
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert [row.what for row in rows] == ["8", "16"]
    stored = json.loads((tmp_path / "costs.json").read_text())
    assert stored["commit"]
    assert stored["command"].startswith("minipaged")
    assert (tmp_path / "costs.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "costs.svg").read_text()
    # One task more: the two that are there are not done again.
    assert run(8, 16, 32)[1] == [(2, 3), (3, 3)]
    # Interrupted in the middle: what was finished is there.
    del stored["tasks"]["16"]
    (tmp_path / "costs.json").write_text(json.dumps(stored))
    assert run(8, 16)[1] == [(1, 2), (2, 2)]


def test_results_of_other_arguments_or_another_source_are_not_used(run, tmp_path):
    run(8)
    path = tmp_path / "costs.json"
    stored = json.loads(path.read_text())
    for change in (
        {"source": "older"},
        {"tasks": {"8": {"task": {"tokens": 1}, "result": {"recompute": 1}}}},
    ):
        path.write_text(json.dumps({**stored, **change}))
        assert run(8)[1] == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    "name",
    [
        "evaluation/simulator.py",
        "evaluation/sharing.py",
        "evaluation/kernel.py",
        "attention/native.py",
        "decoding/beam_search.py",
        "engine/engine.py",
    ],
)
def test_what_a_figure_measures_is_part_of_its_source(name, tmp_path, monkeypatch):
    """Else results of an engine that has changed since would be kept as today's."""
    copy = tmp_path / "minipaged"
    shutil.copytree(reproduce.PACKAGE, copy, ignore=lambda *_: ["tiny", "__pycache__"])
    monkeypatch.setattr(reproduce, "PACKAGE", copy)
    before = reproduce.source_digest.__wrapped__()  # not the one that is kept for this process
    assert reproduce.source_digest.__wrapped__() == before
    (copy / name).write_text((copy / name).read_text("utf-8") + "# changed\n", "utf-8")
    assert reproduce.source_digest.__wrapped__() != before


def test_a_damaged_file_is_named(run, tmp_path):
    (tmp_path / "costs.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"costs.json cannot be read as results"):
        run(8)


def test_an_unknown_figure():
    with pytest.raises(ConfigurationError, match="no figure 'fig1'; choose all, or some of fig2"):
        reproduce.figure_names(["fig2", "fig1"])
    assert reproduce.figure_names(["fig13", "all"]) == list(FIGURES)


def test_a_sweep_finds_where_a_system_is_saturated():
    found = sweep.sweep("opt-13b", "alpaca", 4.0, 20, {"memory_policy": "orca-max"}, 0.2)
    rates = [point[0] for point in found["points"]]
    latencies = {rate: latency for rate, latency, _ in found["points"]}
    assert rates == sorted(rates)
    below = max(rate for rate in rates if latencies[rate] < 0.2)
    above = min(rate for rate in rates if latencies[rate] >= 0.2)
    assert below < found["sustained"] <= above <= 1.07 * below


@pytest.mark.parametrize("name", FIGURES)
def test_the_stored_results_are_those_of_the_figure(name, tmp_path):
    """Table and plot can be made of them, and they come from today's tasks."""
    stored = json.loads((STORED / f"{name}.json").read_text("utf-8"))
    figure = FIGURES[name]
    tasks = figure.tasks(False)
    assert {key: entry["task"] for key, entry in stored["tasks"].items()} == json.loads(
        json.dumps({key: reproduce.arguments(task) for key, task in tasks.items()})
    )
    assert not stored["quick"]
    results = {key: stored["tasks"][key]["result"] for key in tasks}
    assert len(figure.table(results)) >= 2
    reproduce.draw(figure, results, tmp_path / name)
    assert (tmp_path / f"{name}.svg").exists()
    assert (STORED / f"{name}.svg").exists()


def test_simulate_from_the_command_line(tmp_path):
    runner = CliRunner()
    file = tmp_path / "figures.json"
    policies = ["--memory-policy", "paged", "--memory-policy", "orca-max"]
    options = ["--seconds", "20", "--dataset", "alpaca", "--rate", "5", "--json", str(file)]
    result = runner.invoke(app, ["simulate", *policies, *options])
    assert result.exit_code == 0, result.output
    assert "tokens per second of this machine" in " ".join(result.output.split())
    stored = json.loads(file.read_text())
    assert stored["policies"] == ["paged", "orca-max"]
    assert stored["measurements"][0]["requests"] == stored["measurements"][1]["requests"] > 50


def test_a_trace_can_serve_for_more_requests(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.0,100,20\n2023-11-16 18:15:47.0,50,10\n"
    )
    options = ["--requests", "300", "--memory-policy", "paged", "--rate", "20"]
    result = CliRunner().invoke(app, ["simulate", "--trace", str(path), *options])
    assert result.exit_code == 0, result.output
    assert "300 requests" in result.output


def test_prefix_hashes_of_a_trace_drive_the_prefix_cache(tmp_path):
    path = tmp_path / "trace.jsonl"
    request = {"input_length": 1500, "output_length": 5, "hash_ids": [7, 8, 9]}
    lines = [json.dumps({"timestamp": 1000 * i, **request}) for i in range(3)]
    path.write_text("\n".join(lines))
    options = ["--trace", str(path), "--prefix-cache", "--memory-policy", "paged"]
    result = CliRunner().invoke(app, ["simulate", *options])
    assert result.exit_code == 0, result.output
    # 1,500 tokens are 93 full blocks of 16 each, found by the second request and the third.
    assert f"{2 * 93 * 16:,} tokens of prompts were found" in result.output


def test_the_block_size_is_chosen_from_the_trade_off(tmp_path):
    plot = tmp_path / "sizes.svg"
    options = ["--rate", "90", "--dataset", "alpaca", "--seconds", "1", "--plot", str(plot)]
    result = CliRunner().invoke(app, ["tune-block-size", *options])
    assert result.exit_code == 0, result.output
    assert "<svg" in plot.read_text()
    chosen, outcomes = sweep.tune_block_size(
        DEPLOYMENTS["opt-13b"], "alpaca", 90.0, 10, [16, 64, 256]
    )
    speeds = {size: outcome.tokens_per_second for size, outcome in outcomes.items()}
    assert speeds[256] < 0.9 * speeds[16], "short sequences waste most of a large block"
    assert chosen == max(s for s in speeds if speeds[s] >= 0.99 * max(speeds.values()))


def test_who_refuses_is_said_for_each_policy():
    result = CliRunner().invoke(app, ["simulate", "--n", "8", "--seconds", "20"])
    assert result.exit_code == 0, result.output
    assert "orca-max: 35 refused" in result.output
    assert "paged: " not in result.output
