"""The outputs of requests on their way from the engine to whoever waits for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from minipaged.engine.outputs import RequestOutput
from minipaged.errors import MinipagedError
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import RequestId


@dataclass(frozen=True)
class NewRequest:
    """What `Engine.add_request` is given, its prompt in token ids."""

    request_id: RequestId
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: bytes = b""


class Stream:
    """The outputs of requests that were added together.  To be used in their event loop only.

    Every output holds all the text so far, so that one place for the newest of each request is
    enough.  A reader slower than the engine misses states in between and no text, and one that
    has stopped reading costs the memory of one output, however long it grows.

    arrived: when the requests were added, in seconds of `time.monotonic`.
    """

    def __init__(self, requests: Sequence[NewRequest]) -> None:
        self.request_ids = [request.request_id for request in requests]
        self.arrived = time.monotonic()
        self._newest: dict[RequestId, RequestOutput] = {}
        self._error: MinipagedError | None = None
        self._has_news = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """One of the requests stands like this now."""
        raise NotImplementedError("Task 17.1: Stream.put is still to be written")

    def fail(self, error: MinipagedError) -> None:
        """Nothing more will come."""
        raise NotImplementedError("Task 17.1: Stream.fail is still to be written")

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """Ever newer outputs, until all requests are finished.  Raises what `fail` was told."""
        num_unfinished = len(self.request_ids)
        while num_unfinished:
            await self._has_news.wait()
            self._has_news.clear()
            news, self._newest = self._newest, {}
            for output in news.values():
                yield output
                num_unfinished -= output.finished
            if self._error is not None:
                raise self._error

    async def finished(self) -> list[RequestOutput]:
        """The finished outputs, in the order of the requests."""
        done = {o.request_id: o async for o in self.outputs() if o.finished}
        return [done[request_id] for request_id in self.request_ids]
