"""An open-loop client: sends every request when it is due, whatever became of the others.

A client that waits for an answer before it sends the next request slows down with the server,
and never measures the requests that it would have sent meanwhile: the omission is coordinated
with the very delays that were to be measured.  It is avoided in three ways.  Requests are due at
times that were drawn before the run and that no answer moves; there is no limit on how many are
under way, each on a connection of its own; and every latency counts from when the request was
*due*, so that a client which is late adds to the latency and hides nothing.

How late the client was is recorded too: a request's lag is the time from when it was due to when
the first byte could leave.  Since times of a Poisson process see averages over time, the lag is
also a fair sample of how late the client was to notice what came in.

Owns sending and the times of what comes back.  What they amount to is load_run.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from minipaged.errors import ConfigurationError
from minipaged.evaluation.endpoint import DueRequest, Endpoint

OK, TIMEOUT = "ok", "timeout"
TIMER = 0.002  # seconds that a timer of the event loop is late at times; from then on it is polled
Clock = Callable[[], float]  # seconds since the beginning of the run


@dataclass
class Record:
    """What became of a request; all times in seconds since the beginning of the run.

    due: when it should be sent.  sent: when the client began to, or gave up.
    asked: output tokens that it asked for.
    chunks: when each part of the text came, of one token or more; the first is the first token.
    end: when its last part came, or the waiting for it ended.
    prompt_tokens, output_tokens: as the server counted them (usage).
    outcome: ok, timeout, "status 429", "connection error", "broken answer".
    message: what was said of a failure.
    """

    due: float
    asked: int
    sent: float | None = None
    chunks: list[float] = field(default_factory=list)
    end: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    outcome: str = OK
    message: str = ""


class BrokenAnswerError(Exception):
    """A stream is not what the API says."""


async def send_all(
    endpoint: Endpoint,
    requests: Sequence[DueRequest],
    timeout: float,
    on_end: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Send requests, in the order in which they are due; returns when all have ended.

    timeout: seconds after it was due, at which a request that is under way is given up.
    on_end: told of each when it ends.
    """
    _allow_open_files()
    # To look through all that was imported takes a tenth of a second, in which nothing is noticed.
    gc.freeze()
    # No connection is used twice: users share none, and one that the server closes for being idle
    # just when it is used again would be a failure of nobody's.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        headers=endpoint.headers, limits=limits, timeout=None, trust_env=False
    ) as client:
        url = f"{endpoint.base_url}/v1/completions"
        # Nothing is left to prepare when a request is due.
        prepared = [
            (Record(each.due, each.output), client.build_request("POST", url, content=each.body))
            for each in requests
        ]
        start = time.perf_counter()
        clock: Clock = lambda: time.perf_counter() - start  # noqa: E731
        under_way = []
        for record, request in prepared:
            while (left := record.due - clock()) > 0:
                await asyncio.sleep(left - TIMER if left > TIMER else 0)
            sending = _send(client, request, record, clock, record.due + timeout, on_end)
            under_way.append(asyncio.create_task(sending))
        await asyncio.gather(*under_way)
    return [record for record, _ in prepared]


def _allow_open_files() -> None:
    """As many as the system lets us have: each request under way is a connection, and so a file."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # which Windows has not

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def warm_up(endpoint: Endpoint, requests: Sequence[DueRequest], timeout: float) -> None:
    """Send requests one after the other and count none of them.

    Raises ConfigurationError where one fails: then others of its kind would.
    """
    for request in requests:
        (record,) = await send_all(endpoint, [request._replace(due=0.0)], timeout)
        if record.outcome != OK:
            raise ConfigurationError(
                f"{endpoint.base_url} does not serve a first request of {request.prompt} tokens "
                f"for {request.output} more ({record.outcome}: {record.message}); try "
                "--no-ignore-eos if it is ignore_eos that it refuses, else --max-context"
            )


async def _send(
    client: httpx.AsyncClient,
    request: httpx.Request,
    record: Record,
    clock: Clock,
    deadline: float,
    on_end: Callable[[Record], None],
) -> None:
    """Send one request, and record what becomes of it."""

    async def traced(event: str, info: dict[str, Any]) -> None:
        # The first event is the beginning of the connection.
        if record.sent is None:
            record.sent = clock()

    request.extensions["trace"] = traced
    try:
        await asyncio.wait_for(_receive(client, request, record, clock), deadline - clock())
    except asyncio.TimeoutError:
        record.outcome, record.message = TIMEOUT, "not finished in time"
    except httpx.HTTPError as error:
        record.outcome = "connection error"
        record.message = str(error) or type(error).__name__
    except BrokenAnswerError as error:
        record.outcome, record.message = "broken answer", str(error)
    if record.outcome != OK or record.end is None:
        record.end = clock()
    if record.sent is None:
        record.sent = record.end
    on_end(record)


async def _receive(
    client: httpx.AsyncClient, request: httpx.Request, record: Record, clock: Clock
) -> None:
    """Read the stream of an answer to its end."""
    response = await client.send(request, stream=True)
    try:
        if response.status_code != 200:
            record.outcome = f"status {response.status_code}"
            record.message = _message(await response.aread())
            return
        async for line in _lines(response):
            now = clock()
            if line.startswith("data:"):
                _note(record, line[5:].strip(), now)
    finally:
        await response.aclose()
    if record.end is None:
        raise BrokenAnswerError("a stream without any text")
    if record.output_tokens < 1:
        raise BrokenAnswerError("a stream without a usage of at least one token at its end")
    if not record.chunks:  # all its tokens were such as have no text
        record.chunks.append(record.end)


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Lines of a stream.  Those of httpx also end within JSON: at U+2028, which it may hold."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", errors="replace")
    yield rest.decode("utf-8", errors="replace")


def _note(record: Record, data: str, now: float) -> None:
    """Take down one event of the stream."""
    if data == "[DONE]":
        return
    try:
        event = json.loads(data)
        if event.get("error"):
            raise BrokenAnswerError(f"an error in the stream: {event['error']}")
        if event.get("usage"):
            record.prompt_tokens = int(event["usage"]["prompt_tokens"])
            record.output_tokens = int(event["usage"]["completion_tokens"])
        if event.get("choices"):
            record.end = now
            if event["choices"][0].get("text"):
                record.chunks.append(now)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BrokenAnswerError(f"{data[:60]!r} in the stream ({error})") from error


def _message(body: bytes) -> str:
    """What an error's body says, in a line."""
    try:
        said = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = body.decode("utf-8", errors="replace")
    return " ".join(str(said).split())[:200]
