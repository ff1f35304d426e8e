"""Two hundred clients at a time, most of them well-behaved: every answer right, nothing left.

MINIPAGED_SOAK_SECONDS says for how long, such as 1800: then add `-s`, to see the table.
"""

import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import random
import re
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from servers import PATIENCE, RunningServer, check_all_free, post, wait_for

from minipaged import LLM, SamplingParams
from minipaged.engine.builder import EngineOptions, load_engine

SECONDS = float(os.environ.get("MINIPAGED_SOAK_SECONDS", 60 if os.environ.get("CI") else 10))
SEED = random.Random().randrange(10**6)
NUM_CLIENTS = 200
MAX_QUEUED = 80
KEYS = ("right", "also-right")
ENGINE = {
    "dtype": "float64",  # so that the company of others does not change the rounding
    "block_size": 8,
    "num_blocks": 40,
    "max_num_seqs": 16,
    "preemption": "swap",
    "policy": "priority",
    "enable_prefix_caching": True,
}
KEY = f"Authorization: Bearer {KEYS[0]}"
BODY = {"prompt": "ROMEO:", "max_tokens": 4}
MALFORMED = [  # with the status that each has earned
    (post("/v1/completions", b"{", KEY), 400),
    (post("/v1/completions", b'{"prompt": "\xff"}', KEY), 400),
    (post("/v1/completions", {**BODY, "n": 0}, KEY), 400),
    (post("/v1/completions", {**BODY, "prompt": [99999]}, KEY), 400),
    (post("/v1/completions", {**BODY, "prompt": [1] * 380, "max_tokens": 9}, KEY), 400),
    (post("/v1/completions", {**BODY, "prompt": ["a"] * 81}, KEY), 400),
    (post("/v1/completions", {**BODY, "prompt": ["fine", [1]]}, KEY), 400),
    (post("/v1/completions", {**BODY, "model": "gpt-5"}, KEY), 404),
    (post("/v1/completions", BODY, KEY, host="evil.example"), 403),
    (post("/v1/completions", BODY, KEY, "Content-Type: text/plain"), 415),
    (post("/v1/completions", b" " * 70_000, KEY), 413),
    (post("/v1/nothing", BODY, KEY), 404),
    (post("/v1/completions", BODY, "Authorization: Bearer wrong"), 401),
    (post("/v1/completions", BODY), 401),
    (b"nonsense\r\n\r\n", 400),
]


def serve(pipe, log):
    """In a process of its own: a server that tells how it stands when it is asked."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    server = RunningServer(
        load_engine("tiny", EngineOptions(**ENGINE)),
        send_buffer=4096,  # so that a client that reads nothing is soon felt
        **{"api_keys": KEYS, "isolate_keys": True, "max_queued": MAX_QUEUED},
        **{"max_body": 65536, "stalled": 2, "grace": 1},
    )
    pipe.send(server.port)
    while pipe.recv() == "measure":
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        pipe.send(
            {
                "memory in MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
                "threads": threading.active_count(),
                "open files": len(os.listdir("/proc/self/fd")),
                "connections": len(server.server.server_state.connections),
                "tasks": len(server.server.server_state.tasks),
                "requests": server.server.engine.num_unfinished,
            }
        )
    server.check_no_leak()
    server.stop()
    pipe.send("ended")


def questions(rng, number=60):
    """Requests with the outputs of the offline engine: (body, texts, reasons, tokens)."""
    offline = LLM("tiny", **{**ENGINE, "num_blocks": 400})
    kinds = [
        {"temperature": 0},
        {"temperature": 0.9},
        {"temperature": 1.0, "n": 3},
        {"temperature": 1.0, "n": 2, "best_of": 3},
        {"temperature": 0, "use_beam_search": True, "best_of": 3},
        {"temperature": 0.8, "stop": ["e ", "th"]},
        {"temperature": 0.8, "logprobs": 3, "presence_penalty": 0.5},
    ]
    bodies, params = [], []
    for _ in range(number):
        fields = {**rng.choice(kinds), "max_tokens": rng.choice([1, 5, 12, 30])}
        if fields["temperature"]:
            fields["seed"] = rng.randrange(100)
        prompt = rng.choice(["ROMEO:", "KING RICHARD III:\nNow is", "To be"])
        prompt += " and so" * rng.choice([0, 0, 3, 12])
        bodies.append({"prompt": prompt, **fields})
        params.append(SamplingParams(**fields))
    results = offline.generate([body["prompt"] for body in bodies], params)
    return [
        (
            body,
            [output.text for output in result.outputs],
            [output.finish_reason for output in result.outputs],
            sum(len(output.token_ids) for output in result.outputs),
        )
        for body, result in zip(bodies, results, strict=True)
    ]


async def answer(reader):
    """Status, headers and body of the next answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])
    }
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
    return int(head[0].split()[1]), headers, body


class Client:
    """One of the two hundred."""

    def __init__(self, port, questions, rng, counts, faults):
        self.port, self.questions, self.rng = port, questions, rng
        self.counts, self.faults = counts, faults
        self.reader = self.writer = None

    async def run(self, end):
        actions = [self.asks, self.leaves, self.is_wrong, self.sends_half, self.stalls, self.looks]
        while time.monotonic() < end:
            (action,) = self.rng.choices(actions, [60, 16, 10, 4, 2, 3])
            try:
                await asyncio.wait_for(action(), PATIENCE)
            except Exception as error:
                self.faults.append(f"{action.__name__}: {error!r}")
            if self.rng.random() < 0.2:
                self.close()
            await asyncio.sleep(self.rng.random() * 3)
        self.close()

    async def connect(self, **options):
        if self.writer is None or self.writer.is_closing() or self.reader.at_eof():
            self.close()
            sock = socket.socket()
            for option in options.values():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, option)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
            self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=2**22)
            self.counts["connections made"] += 1

    def close(self):
        if self.writer is not None:
            if self.rng.random() < 0.3:
                self.writer.transport.abort()
            self.writer.close()
        self.reader = self.writer = None

    async def send(self, request):
        """On the connection that there is; on a new one if the server has just closed that."""
        for _ in range(2):
            await self.connect()
            try:
                self.writer.write(request)
                status, headers, body = await answer(self.reader)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                self.close()
                if getattr(error, "partial", b""):
                    raise
                continue
            if headers.get("connection") == "close":
                self.close()
            return status, headers, body
        raise AssertionError("the server closed a new connection without a word")

    async def asks(self):
        """A request whose answer is known."""
        body, texts, reasons, num_tokens = self.rng.choice(self.questions)
        streams = self.rng.random() < 0.5 and not body.get("best_of")
        body = {**body, "stream": streams, "priority": self.rng.randrange(3)}
        status, headers, got = await self.send(post("/v1/completions", body, KEY))
        if status == 429:
            waiting, limit = re.findall(rb"(\d+) requests wait and the queue holds (\d+)", got)[0]
            assert int(waiting) + 1 > int(limit) == MAX_QUEUED
            assert 1 <= int(headers["retry-after"]) <= 60
            self.counts["refused, since the queue was full"] += 1
            await asyncio.sleep(int(headers["retry-after"]) * self.rng.uniform(1, 4))
            return
        assert status == 200, (status, got)
        if streams:
            *events, done = [line[6:] for line in got.split(b"\n") if line]
            assert done == b"[DONE]"
            choices = [choice for event in events for choice in json.loads(event)["choices"]]
        else:
            choices = json.loads(got)["choices"]
        for index, text in enumerate(texts):
            pieces = [choice for choice in choices if choice["index"] == index]
            assert "".join(piece["text"] for piece in pieces) == text, body
            assert pieces[-1]["finish_reason"] == reasons[index]
        self.counts["right answers, streamed" if streams else "right answers, whole"] += 1
        self.counts["tokens of right answers"] += num_tokens

    async def leaves(self):
        """Goes in the middle of an answer, or before it."""
        body = {**self.rng.choice(self.questions)[0], "ignore_eos": True, "max_tokens": 90}
        body["stream"] = not body.get("best_of")
        await self.connect()
        self.writer.write(post("/v1/completions", body, KEY))
        # The server may close a connection that was idle in the very moment in which it is used.
        closed = (ConnectionError, asyncio.IncompleteReadError)
        with contextlib.suppress(asyncio.TimeoutError, *closed):
            size = self.rng.choice([0, 1, 500, 5000])
            await asyncio.wait_for(self.reader.readexactly(size), self.rng.random())
        if self.rng.random() < 0.3 and self.writer.can_write_eof():
            with contextlib.suppress(OSError):
                self.writer.write_eof()
        self.close()
        self.counts["left before the end"] += 1

    async def is_wrong(self):
        """A request that has earned its refusal."""
        request, earned = self.rng.choice(MALFORMED)
        status, _, body = await self.send(request)
        # What only the engine can see is not looked at while the queue is full.
        is_full = earned == 400 and status == 429 and b"requests wait and the queue" in body
        assert status == earned or is_full, (status, earned, body)
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        self.counts["refused, since they were wrong"] += 1

    async def sends_half(self):
        """Headers or a body that never end."""
        request = post("/v1/completions", self.rng.choice(self.questions)[0], KEY)
        await self.connect()
        self.writer.write(request[: self.rng.randrange(1, len(request))])
        await asyncio.sleep(self.rng.random())
        self.close()
        self.counts["sent half a request"] += 1

    async def stalls(self):
        """Reads nothing of a long answer, until it is cut off or loses patience."""
        self.close()
        await self.connect(receive_buffer=4096)
        self.writer.transport.pause_reading()
        body = {"prompt": "ROMEO:", "max_tokens": 250, "logprobs": 20, "ignore_eos": True}
        self.writer.write(post("/v1/completions", {**body, "stream": True}, KEY))
        await asyncio.sleep(self.rng.choice([1, 2, 5]))
        self.close()
        self.counts["read nothing"] += 1

    async def looks(self):
        """At metrics, models and health."""
        path = self.rng.choice(["/metrics", "/v1/models", "/v1/models/tiny", "/health"])
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{KEY}\r\n\r\n"
        status, _, _ = await self.send(request.encode())
        assert status == 200
        self.counts["looked at the server"] += 1


async def soak(port, known, seconds, counts, faults):
    end = time.monotonic() + seconds
    clients = [
        Client(port, known, random.Random(f"{SEED} {i}"), counts, faults)
        for i in range(NUM_CLIENTS)
    ]
    await asyncio.gather(*(client.run(end) for client in clients))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.timeout(SECONDS + 300)
def test_two_hundred_clients(tmp_path):
    print(f"\nMINIPAGED_SOAK_SECONDS={SECONDS:g}, seed {SEED}")
    known = questions(random.Random(SEED))
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    log = tmp_path / "log"
    process = context.Process(target=serve, args=(other, str(log)))
    process.start()
    other.close()
    try:
        assert pipe.poll(PATIENCE * 2)
        port = pipe.recv()
        counts, faults = Counter(), []
        figures = []

        def measure():
            pipe.send("measure")
            figures.append(pipe.recv())
            return figures[-1]

        for share in (0.3, 0.7):  # the first part warms the server up
            asyncio.run(soak(port, known, share * SECONDS, counts, faults))
            wait_for(lambda: measure()["connections"] == 0)
            assert measure()["tasks"] == measure()["requests"] == 0
        metrics = check_all_free(f"http://127.0.0.1:{port}", KEYS)
        pipe.send("stop")
        assert pipe.recv() == "ended"
    finally:
        process.join(PATIENCE)
        process.kill()
    warm = next(each for each in figures if each["connections"] == 0)
    table = {
        **counts,
        "tokens generated": metrics["minipaged_generation_tokens_total"],
        "requests aborted": metrics["minipaged_requests_total outcome=abort"],
        "preempted by swapping": metrics["minipaged_preemptions_total mode=swap"],
        "steps": metrics["minipaged_steps_total"],
        **{f"{name}, warm": value for name, value in warm.items()},
        **{f"{name}, at the end": value for name, value in figures[-1].items()},
    }
    print("\n".join(f"{name:40} {value:12,.0f}" for name, value in table.items()))
    assert not faults, "\n".join(faults[:20])
    cached, free = (metrics[f"minipaged_blocks pool=device state={s}"] for s in ("cached", "free"))
    assert cached + free == ENGINE["num_blocks"]
    assert figures[-1]["memory in MiB"] <= 1.1 * warm["memory in MiB"] + 48
    for name in ("threads", "open files"):
        assert figures[-1][name] <= warm[name] + 8
    for what in (
        *("right answers, streamed", "right answers, whole", "left before the end"),
        *("refused, since they were wrong", "sent half a request", "read nothing"),
        *("refused, since the queue was full", "preempted by swapping", "requests aborted"),
    ):
        assert table[what] > 0, f"too few of: {what}"
    said = log.read_text()
    assert all(line.startswith("minipaged: KV cache") for line in said.splitlines()), said
    assert process.exitcode == 0
