"""`minipaged serve` as a process: from a port that can be had to the last request's end."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from command import minipaged
from servers import (
    PATIENCE,
    RunningServer,
    ServerProcess,
    connect,
    exchange,
    post,
    read_answer,
    wait_for,
)
from strategies import Workload

from minipaged.engine.builder import EngineOptions, load_engine
from minipaged.errors import ConfigurationError
from minipaged.serving.server import ServerOptions, open_socket, url_of

SMALL = ("--num-blocks", 70, "--dtype", "float32")
LONG = {"prompt": "ROMEO:", "max_tokens": 250, "ignore_eos": True, "temperature": 0}


def streaming(server, *headers):
    """A connection on which the answer to a long request comes; its first event was read."""
    sock = connect(server.port)
    sock.sendall(post("/v1/completions", {**LONG, "stream": True}, *headers))
    file = sock.makefile("rb")
    while not file.readline().startswith(b"data: "):
        pass
    return sock, file


def events(file):
    """What is left of a stream."""
    lines = [line for line in file.read().splitlines() if line.startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]


@pytest.mark.parametrize(
    ("number", "grace", "reason", "arguments"),
    [
        (signal.SIGTERM, 100, "length", ("--host", "0.0.0.0")),
        (signal.SIGINT, 0.2, "abort", ()),
    ],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_ends_what_was_begun_and_then_the_server(number, grace, reason, arguments):
    with ServerProcess(*SMALL, "--grace", grace, *arguments) as server:
        sock, file = streaming(server)
        idle = connect(server.port)
        assert exchange(server.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
        start = time.monotonic()
        server.process.send_signal(number)

        def is_refused():
            try:
                status, _, _ = exchange(server.port, post("/v1/completions", LONG))
            except OSError:
                return True
            return status == 503

        wait_for(is_refused)
        got = events(file)
        assert got[-1]["choices"][0]["finish_reason"] == reason
        assert idle.recv(1) == b""
        _, errors = server.process.communicate(timeout=PATIENCE)
        assert server.process.returncode == 0
        assert time.monotonic() - start < 60
        warning = "minipaged: anybody who reaches it may use it; set --api-key"
        assert (warning in errors) == bool(arguments), "it says so where others can reach it"
        assert all(line.startswith("minipaged: ") for line in errors.splitlines()), errors
        sock.close()
        idle.close()


def test_a_second_signal_ends_it_at_once():
    key = {"MINIPAGED_API_KEY": "secret"}
    with ServerProcess(*SMALL, "--grace", 1000, **key) as server:
        assert exchange(server.port, post("/v1/completions", LONG))[0] == 401
        sock, _ = streaming(server, "Authorization: Bearer secret")
        start = time.monotonic()
        code, errors = server.end(signal.SIGTERM, signal.SIGTERM)
        assert time.monotonic() - start < 20
        assert code == 0
        assert "Traceback" not in errors
        sock.close()


def test_an_engine_that_fails_ends_the_server(caplog):
    """Whoever waits is told so, in an event or an answer, and the server ends."""
    engine = Workload((), 4, 64, 4, 64).engine()
    server = RunningServer(engine, grace=1)
    execute, go_on = engine.runner.execute, threading.Event()

    def fail(plan):
        if len(plan.scheduled) < 2:
            return execute(plan)
        assert go_on.wait(PATIENCE)
        raise RuntimeError("a defect")

    engine.runner.execute = fail
    whole = {"prompt": [1, 2], "max_tokens": 50, "ignore_eos": True}
    with connect(server.port) as first, connect(server.port) as second:
        first.sendall(post("/v1/completions", {**whole, "prompt": [[1], [2]], "stream": True}))
        second.sendall(post("/v1/completions", whole))
        wait_for(lambda: server.server.engine.num_unfinished == 3)
        go_on.set()
        with first.makefile("rb") as file:
            status, headers, body = read_answer(file)
            assert status == 200
            last, done = body.split(b"\n\n")[-3:-1]
            assert done == b"data: [DONE]"
            error = json.loads(last.removeprefix(b"data: "))["error"]
            assert error["message"].startswith("the engine failed")
        with second.makefile("rb") as file:
            status, headers, body = read_answer(file)
            assert status == 503
            assert headers["Retry-After"]
            assert json.loads(body)["error"]["type"] == "server_error"
    server._thread.join(PATIENCE)
    assert not server._thread.is_alive()
    assert server.server.has_failed
    assert "a defect" in caplog.text


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = minipaged("serve", "--port", port)
    assert done.returncode == 2
    assert done.stderr == (
        f"minipaged: port {port} of '127.0.0.1' cannot be opened (Address already in use); "
        "another program has it, so choose another port, or 0 for a free one\n"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "no.such.host.invalid"}, "choose another host"),
        ({"host": "a" * 70}, "choose another host"),
        ({"host": "192.0.2.1"}, "choose another host"),
        ({"port": 70_000}, "port is 70000; it must be at least 0 and at most 65535"),
        ({"port": -1}, "port is -1"),
        ({"max_queued": 0}, "max_queued is 0; it must be at least 1"),
        ({"max_body": 0}, "max_body is 0; it must be at least 1"),
        ({"grace": -1}, "grace is -1; it must be at least 0"),
        ({"grace": float("nan")}, "grace is nan"),
        ({"grace": float("inf")}, "grace is inf; it must be at least 0 and at most 86400"),
        ({"api_keys": ("",)}, "API key number 1 of 1 is empty"),
        ({"isolate_keys": True}, "give some with --api-key"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_told_in_one_sentence(options, words):
    with pytest.raises(ConfigurationError, match=words) as error:
        open_socket(ServerOptions(**{"model": "tiny", "port": 0, **options})).close()
    assert "\n" not in str(error.value)


def test_a_port_is_taken_from_the_moment_it_is_opened():
    """Although nobody answers before the model is loaded, no other server gets it."""
    with open_socket(ServerOptions(model="tiny", port=0)) as sock:
        options = ServerOptions(model="tiny", port=sock.getsockname()[1])
        with pytest.raises(ConfigurationError, match="another program has it"):
            open_socket(options)
        assert url_of(sock) == f"http://127.0.0.1:{options.port}"


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_the_other_loopback():
    try:
        sock = open_socket(ServerOptions(model="tiny", host="::1", port=0))
    except ConfigurationError:
        pytest.skip("this machine has no IPv6")
    with sock:
        assert url_of(sock) == f"http://[::1]:{sock.getsockname()[1]}"


def test_without_the_parts_for_serving_it_says_how_to_get_them():
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("uvicorn", "fastapi", "prometheus_client"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = ["minipaged", "serve"]
from minipaged.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2
    assert "which is not installed" in done.stderr
    assert "pip install 'minipaged[serving]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_client_that_reads_nothing_does_not_keep_the_server_up(capfd):
    engine = load_engine("tiny", EngineOptions(num_blocks=170, dtype="float32"))
    server = RunningServer(engine, send_buffer=4096, grace=0)
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", server.port))
        body = {**LONG, "stream": True, "logprobs": 20, "n": 4, "temperature": 1, "max_tokens": 120}
        stalled.sendall(post("/v1/completions", body))
        wait_for(lambda: server.server.engine.num_unfinished == 1)
        wait_for(lambda: server.server.engine.num_unfinished == 0)
        assert server.server.server_state.tasks, "the answer was sent although nobody reads it"
        server.stop()
    assert "Traceback" not in capfd.readouterr().err
