"""`minipaged bench serve` as a user meets it, on a server that is known and on this project's."""

import json
import re
import subprocess
import sys
import urllib.request

import pytest
from fake_server import FakeServer
from typer.testing import CliRunner

from minipaged.cli import app, main
from minipaged.evaluation import load_run


@pytest.fixture(autouse=True)
def _calm(monkeypatch):
    """A busy machine is no reason to fail: what a late client says is tested on its own."""
    monkeypatch.setattr(load_run, "TIMER", 1e9)
    monkeypatch.setattr(load_run, "MEAN_SHARE", 1e9)
    monkeypatch.delenv("MINIPAGED_API_KEY", raising=False)


def bench(*options, **kwargs):
    words = ["bench", "serve", *map(str, options)]
    return CliRunner().invoke(app, words, env={"COLUMNS": "100"}, **kwargs)


def test_a_sweep_finds_the_rate_of_a_server_that_takes_one_at_a_time(tmp_path):
    """The server takes 20 ms a request or more, so that 50 per second are more than it sustains."""
    out, plot = tmp_path / "out.json", tmp_path / "out.svg"
    about = {"max_model_len": 4, "vocab_size": 50}  # outputs of two tokens at most
    with FakeServer(first_token=0.02, per_token=0, one_at_a_time=True, about=about) as server:
        done = bench(
            *("--base-url", server.url, "--rate", 40, "--num-requests", 30, "--sweep"),
            *("--latency-limit", 0.06, "--json", out, "--plot", plot),
        )
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    runs = written["measurements"]
    assert written["model"] == "fake"
    assert [run["rate"] for run in runs] == pytest.approx([40 * 1.5**n for n in range(len(runs))])
    assert [run["requests"] for run in runs] == [round(30 * 1.5**n) for n in range(len(runs))]
    broken = [
        run["normalized"]["mean"] >= 0.06 or run["backlog"] > run["requests"] / 3 for run in runs
    ]
    assert broken == [False] * (len(runs) - 1) + [True]
    # All that was sent was measured, but for those that warmed the server up.
    assert len(server.served) == 2 + sum(run["requests"] for run in runs)
    assert re.search(r"sustained: .*[\d.]+ requests/s", done.output)
    assert "first token (TTFT)" in done.output
    assert plot.read_text("utf-8").count("requests/s") == 2


def test_a_trace_at_its_own_times(tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [(0, 5, 3), (200, 60, 50), (300, 5, 2)]
    trace.write_text(
        "".join(
            json.dumps({"timestamp": t, "input_length": i, "output_length": o, "hash_ids": [1]})
            + "\n"
            for t, i, o in lines
        )
    )
    with FakeServer() as server:
        done = bench("--base-url", server.url, "--trace", trace, "--num-requests", 3)
    assert done.exit_code == 0, done.output
    assert "10 requests/s: 3 of 3 completed" in done.output
    assert "1 of 3 requests of the trace are cut" in done.output
    assert "14 tokens in and 12 out" in done.output
    *_, short, cut, last = sorted(server.served, key=lambda served: served.arrived)
    assert [served.body["max_tokens"] for served in (short, cut, last)] == [3, 32, 2]
    assert [len(served.body["prompt"]) for served in (short, cut, last)] == [5, 32, 5]
    assert short.body["prompt"] == cut.body["prompt"][:5]
    assert last.arrived - short.arrived > 0.2


def test_failures_are_told(tmp_path):
    with FakeServer(first_token=0.5, most=1, about={"max_model_len": 32}) as server:
        done = bench("--base-url", server.url, "--rates", "50,100", "--num-requests", 6)
        refused = sum(served.refused for served in server.served)
    assert done.exit_code == 0, done.output
    assert refused > 0
    told = [int(n) for n in re.findall(r"(\d+) failed, status 429: come back later", done.output)]
    assert sum(told) == refused
    assert "it does not tell its vocabulary" in done.output


def test_a_client_that_was_late_ends_with_exit_code_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(load_run, "TIMER", 0.0)
    monkeypatch.setattr(load_run, "MEAN_SHARE", 0.0)
    out = tmp_path / "out.json"
    with FakeServer() as server:
        options = ["--base-url", server.url, "--rate", "20", "--num-requests", "3"]
        words = ["minipaged", "bench", "serve", *options, "--json", str(out)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "minipaged: at 20 requests/s the client was late by up to" in said[0]
    assert json.loads(out.read_text())["measurements"][0]["valid"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base-url", "http://127.0.0.1:9"], "nothing answers at http://127.0.0.1:9/v1/models"),
        (["--base-url", "http://a..b"], "nothing answers at http://a..b/v1/models"),
        (["--rate", 0], "the rate is 0 requests per second"),
        (["--rates", "1,x"], "--rates is '1,x'"),
        (["--rates", "1,-2"], "the rate is -2 requests per second"),
        (["--rate", 1, "--rates", "1"], "leave one of them out"),
        (["--rates", "1,2", "--sweep"], "--rates names them all"),
        (["--num-requests", 0], "--num-requests is 0"),
        (["--timeout", 0], "--timeout is 0"),
        (["--latency-limit", "nan"], "--latency-limit is nan"),
        (["--arrivals", "bursts"], "--arrivals is 'bursts'"),
        (["--arrivals", "trace"], "name a file with --trace"),
        (["--trace", "no-such-file"], "no-such-file cannot be read"),
        (
            ["--json", "no-such-dir/x.json"],
            "--json no-such-dir/x.json lies in a folder that does not",
        ),
        (["--plot", "x.txt"], "--plot is x.txt"),
        (["--model", "gone"], "there is no model 'gone'"),
        (["--api-key", "guess"], "refuses the key"),
        (["--dataset", "pile"], "no dataset 'pile'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_mistakes_are_one_sentence_and_exit_code_2(options, message, monkeypatch, capsys):
    with FakeServer(key="secret") as server:
        words = ["minipaged", "bench", "serve"]
        if "--base-url" not in options:
            words += ["--base-url", server.url]
        if "--api-key" not in options:
            monkeypatch.setenv("MINIPAGED_API_KEY", "secret")
        monkeypatch.setattr(sys, "argv", [*words, *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message in said[0]


def test_this_projects_own_server(tmp_path):
    """Client and server agree on every count, and the server's own times are no longer."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "minipaged", "serve", "--model", "tiny", "--port", "0"]
    with subprocess.Popen(
        [*command, "--num-blocks", "200"], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            url = re.search(r"http://\S+", server.stdout.readline())[0]
            options = ("--dataset", "alpaca", "--max-context", 60)
            done = bench(
                *("--base-url", url, "--rate", 20, "--num-requests", 12, "--json", out, *options)
            )
            assert done.exit_code == 0, done.output
            page = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
        finally:
            server.terminate()
            server.communicate(timeout=60)
    assert server.returncode == 0
    (run,) = json.loads(out.read_text())["measurements"]
    assert run["completed"] == 12
    assert run["output_tokens"] == run["asked_tokens"] > 100
    told = dict(re.findall(r"^(minipaged_\S+?)(?:\{.*\})? ([\d.e+-]+)$", page, re.MULTILINE))
    assert float(told["minipaged_generation_tokens_total"]) > run["output_tokens"]  # and warming up
    assert float(told["minipaged_request_latency_seconds_count"]) == 12 + 2


def test_without_its_parts_it_says_how_to_get_them():
    code = (
        "import sys; sys.modules['httpx'] = None; from minipaged.cli import main; "
        "sys.argv = ['minipaged', 'bench', 'serve']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "bench serve needs httpx, which is not installed" in done.stderr
    assert "pip install 'minipaged[serving]'" in done.stderr
