"""The dashboard: one page at `/`, and the stream of events that moves it.

The page is put together from the files in page/, once, and loads nothing: its policy lets it run
the one script and the one style that are in it, and talk to this server.  It is the same for
everybody and shows nothing by itself; the events need the API key, and carry ids, counts and
times, but no text.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from functools import cache, partial
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from minipaged.engine.engine import Engine
from minipaged.errors import MinipagedError
from minipaged.memory.block_allocator import BlockId
from minipaged.serving.async_engine import AsyncEngine, ShuttingDownError
from minipaged.serving.failures import APIError
from minipaged.serving.latencies import Latencies, Mark
from minipaged.serving.protocol import ModelCard
from minipaged.serving.service import Service
from minipaged.serving.watch import Frame, News, Watch

TICK = 0.1  # seconds between two events at least
QUIET = 1.0  # seconds between two events at most, while nothing happens
SHARE = 20  # one part in so many of the time may go into making events
MOST_WATCHERS = 16
LAST_WORDS = 1.0  # seconds for a stream to end when the server does
MOST_QUEUED = 200  # requests that are told one by one
SCRIPTS = ("names", "map", "panels", "history", "playground", "stream")  # in this order


def add_routes(app: FastAPI) -> None:
    """Serve the page and its events.  Neither is part of the API, nor of its schema."""
    watchers: set[Events] = set()

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """The page."""
        text, policy = page_and_policy()
        headers = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        return HTMLResponse(text, headers=headers)

    @app.get("/dashboard/events", include_in_schema=False)
    async def events() -> Events:
        """What happens, as server-sent events."""
        if len(watchers) >= MOST_WATCHERS:
            raise APIError(
                429,
                f"{MOST_WATCHERS} dashboards are open, and no more are served; close one of them",
                "too_many_dashboards",
                headers={"Retry-After": "10"},
            )
        service: Service = app.state.service
        engine = service.engine
        if not isinstance(engine, AsyncEngine):
            raise APIError(501, "the dashboard shows one engine, and this server has several")
        if not engine.is_serving:
            raise ShuttingDownError
        return Events(engine, watchers, await engine.ask(partial(_about, service.card)))


@cache
def page_and_policy() -> tuple[str, str]:
    """The page, and the policy that allows it its own script and style and nothing else."""
    folder = resources.files("minipaged.serving") / "page"

    def read(name: str) -> str:
        return folder.joinpath(name).read_text("utf-8")

    style = read("style.css")
    script = '"use strict";\n' + "\n".join(read(f"{name}.js") for name in SCRIPTS)
    text = read("page.html").replace("__STYLE__", style).replace("__SCRIPT__", script)
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text, policy


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class Events(StreamingResponse):
    """What one dashboard is sent, from its first state until it goes or the server does.

    A client that reads slowly is sent less and misses steps; nothing is kept for it meanwhile
    but the newest ones.

    about: what does not change; told with the first event.
    """

    def __init__(self, engine: AsyncEngine, watchers: set[Events], about: dict[str, Any]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(), headers=headers, media_type="text/event-stream")
        self._engine = engine
        self._watchers = watchers
        self._about = about
        self._watch = Watch()
        self._latencies = Latencies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._watchers.add(self)
        self._engine.observers.append(self._latencies.observe)
        sending = asyncio.ensure_future(super().__call__(scope, receive, send))
        try:
            while not sending.done() and self._engine.is_serving:
                await asyncio.wait((sending,), timeout=TICK)
            # It ends by itself, unless the client takes nothing.
            await asyncio.wait((sending,), timeout=LAST_WORDS)
            if sending.done():
                sending.result()
        finally:
            sending.cancel()
            self._engine.observers.remove(self._latencies.observe)
            self._watchers.discard(self)
            await asyncio.shield(self._detach())

    async def _detach(self) -> None:
        with suppress(MinipagedError):
            await self._engine.ask(self._watch.detach)

    async def _events(self) -> AsyncIterator[str]:
        with suppress(MinipagedError):  # the engine has gone
            await self._engine.ask(self._watch.attach)
            content: dict[str, Any] = {"about": self._about}
            told = counted = -math.inf
            while self._engine.is_serving:
                began = time.monotonic()
                news = await self._engine.ask(self._watch.fetch)
                marks = self._latencies.fetch_marks()
                fetched, pause = time.monotonic(), TICK
                if news.frames or marks or began - told >= QUIET:
                    if began - counted >= QUIET:
                        counted = began
                        content["percentiles"] = self._latencies.percentiles(began)
                    # Beside the event loop: of a large pool it is much.
                    text = await asyncio.to_thread(_text, content, news, marks, began)
                    pause = max(TICK, SHARE * (time.monotonic() - fetched))
                    yield f"data: {text}\n\n"
                    content, told = {}, began
                await asyncio.sleep(pause)


def _about(card: ModelCard, engine: Engine) -> dict[str, Any]:
    manager = engine.scheduler.manager
    return {
        "model": card.id,
        "created": card.created,
        "context": card.max_model_len,
        "block_size": manager.block_size,
        "num_blocks": manager.device.num_blocks,
        "num_host_blocks": manager.host.num_blocks,
    }


def _text(content: dict[str, Any], news: News, marks: dict[str, Mark], at: float) -> str:
    return json.dumps(content | event(news, marks, at), separators=(",", ":"))


def event(news: News, marks: dict[str, Mark], at: float) -> dict[str, Any]:
    """One event as JSON has it.  Requests are numbered, and named once, in `requests`."""
    numbers: dict[str, int] = {}

    def number(request_id: str) -> int:
        return numbers.setdefault(request_id, len(numbers))

    cached: tuple[BlockId, ...] | None = None
    frames = []
    for frame in news.frames:
        content = _frame(frame, number)
        if frame.cached is not cached:  # left out where it is that of the frame before
            cached = frame.cached
            content["cached"] = ranges(cached)
        frames.append(content)
    queue = [[number(q[0]), q.status[0], q[2], q[3]] for q in news.queue[:MOST_QUEUED]]
    status = [q.status for q in news.queue]
    told = [[number(request_id), *mark] for request_id, mark in marks.items()]
    return {
        "at": at,
        "frames": frames,
        "skipped": news.num_skipped,
        "queue": queue,
        "queued": {name: status.count(name) for name in ("running", "waiting", "swapped")},
        "counts": news.counts,
        "marks": told,
        "requests": list(numbers),
    }


def _frame(frame: Frame, number: Any) -> dict[str, Any]:
    """A frame, without what is empty.

    A table is [sequence, request, tokens, blocks dropped, 1 if on the host, blocks ...].
    """
    lists = {
        name: list(getattr(frame, name))
        for name in ("forks", "copies", "swap_out", "swap_in", "ended")
    }
    lists |= {name: list(map(number, getattr(frame, name))) for name in ("preempted", "swapped")}
    lists["finished"] = [[number(request), reason] for request, reason in frame.finished]
    tables = [
        [t.seq_id, number(t.request_id), t.num_tokens, t.num_dropped, int(t.on_host), *t.blocks]
        for t in frame.tables
    ]
    content = {"at": frame.at, "step": frame.step, "tables": tables}
    return content | {name: value for name, value in lists.items() if value}


def ranges(blocks: Iterable[BlockId]) -> list[int]:
    """Block numbers as [first, count, first, count, ...]."""
    found: list[int] = []
    for block in sorted(blocks):
        if found and found[-2] + found[-1] == block:
            found[-1] += 1
        else:
            found += (block, 1)
    return found
