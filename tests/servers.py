"""Real servers on a free port of loopback, what they say of themselves, and raw requests."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from command import ENVIRONMENT, Forked, run_command
from prometheus_client.parser import text_string_to_metric_families

from minipaged.engine.engine import Engine
from minipaged.models.loader import TINY
from minipaged.serving.server import Server, ServerOptions, open_socket

PATIENCE = 60  # seconds, on a machine that is far slower than usual
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def tiny_with_template(directory: Path) -> Path:
    """The shipped model under a chat template of its own."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (directory / name).symlink_to(TINY / name)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


class RunningServer:
    """A server whose event loop runs in a thread of this process.

    send_buffer: bytes that the system takes for a client that does not read; None is megabytes.
    """

    def __init__(self, engine: Engine, send_buffer: int | None = None, **options: Any) -> None:
        self.options = ServerOptions(**{"model": "tiny", "port": 0, **options})
        self.inner = engine
        sock = open_socket(self.options)
        if send_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        started = threading.Event()
        self.server = Server(engine, self.options, started.set)
        self._thread = threading.Thread(target=self.server.run, args=([sock],), daemon=True)
        self._thread.start()
        assert started.wait(PATIENCE)

    def stop(self) -> None:
        """As a signal would."""
        self.server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server does not come to an end"

    def ask(self, question: Callable[[Engine], Any]) -> Any:
        """What a function says of the engine between two steps."""
        engine = self.server.engine
        answer = asyncio.run_coroutine_threadsafe(engine.ask(question), engine._loop)
        return answer.result(PATIENCE)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The engine stands still between two steps; what is asked of it meanwhile has to wait."""
        is_held, go_on = threading.Event(), threading.Event()
        engine = self.server.engine

        def hold(_: Engine) -> None:
            is_held.set()
            go_on.wait(PATIENCE)

        asyncio.run_coroutine_threadsafe(engine.ask(hold), engine._loop)
        assert is_held.wait(PATIENCE)
        try:
            yield
        finally:
            go_on.set()

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Return as soon as the condition holds."""
        wait_for(condition)

    def check_no_leak(self) -> None:
        """T5: nobody is served any more, and every block is free or can be found again."""
        check_all_free(self.url, self.options.api_keys)
        self.ask(Engine.check_integrity)
        wait_for(lambda: self.server.engine.num_queued == 0)


def check_all_free(url: str, keys: Any = ()) -> dict[str, float]:
    """T5 as the metrics tell it, once the server has noticed who has gone; returns them."""
    end = time.monotonic() + PATIENCE
    while True:
        metrics = read_metrics(url, keys)
        taken = [name for name in ALL_FREE if metrics[name]]
        if not taken:
            return metrics
        assert time.monotonic() < end, f"never 0: {taken}"
        time.sleep(0.01)


ALL_FREE = [
    *(f"minipaged_requests_{state}" for state in ("running", "waiting", "swapped")),
    *(f"minipaged_blocks pool=device state={state}" for state in ("exclusive", "shared")),
    "minipaged_blocks pool=host state=used",
]
"""Metrics that are 0 when nobody is served."""


def read_metrics(url: str, keys: Any = ()) -> dict[str, float]:
    """All samples of /metrics by "name label=value ..."; those of buckets are left out."""
    request = urllib.request.Request(f"{url}/metrics")
    if keys:
        request.add_header("Authorization", f"Bearer {keys[0]}")
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        text = answer.read().decode()
    return {
        " ".join([sample.name, *map("=".join, sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def wait_for(condition: Callable[[], Any]) -> None:
    """Return as soon as the condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def connect(port: int) -> socket.socket:
    """A connection of one's own."""
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def post(path: str, body: Any, *headers: str, host: str = "localhost") -> bytes:
    """The bytes of a POST request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(data)}", *headers]
    if not any(line.lower().startswith("content-type") for line in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


class _Received:
    """Of bytes that came, what http.client reads an answer from."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def makefile(self, *_: Any, **__: Any) -> Any:
        return self._stream


def read_answer(stream: Any, method: str = "GET") -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and body of the next answer of a connection's file or of bytes."""
    if isinstance(stream, bytes):
        stream = io.BytesIO(stream)
    answer = http.client.HTTPResponse(_Received(stream), method=method)  # type: ignore[arg-type]
    answer.begin()
    # The file is shared by the answers of the connection, and http.client would close it.
    answer._close_conn = lambda: None  # type: ignore[attr-defined]
    return answer.status, answer.headers, answer.read()


def exchange(port: int, request: bytes, method: str = "POST") -> tuple[int, Any, bytes]:
    """Send bytes and read one answer."""
    with connect(port) as sock:
        sock.sendall(request)
        with sock.makefile("rb") as file:
            return read_answer(file, method)


class ServerProcess:
    """`minipaged serve` as a process of its own, forked from one that has imported torch."""

    def __init__(self, *arguments: Any, **environment: str) -> None:
        self.process = Forked(
            run_command,
            [str(word) for word in ("serve", "--port", 0, *arguments)],
            environment={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", **environment},
        )
        said = self.process.stdout.readline()
        assert " is served at " in said, self.process.communicate()[1]
        self.url = said.split(" is served at ")[1].split()[0]
        self.port = int(self.url.rpartition(":")[2])

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def end(self, *signals: int) -> tuple[int, str]:
        """Send signals; returns the exit code and what was said on standard error."""
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.3)
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said
