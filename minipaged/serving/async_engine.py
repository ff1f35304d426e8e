"""The engine in a thread of its own, for callers who live in an event loop.

One thread runs step after step, and nobody else touches the engine: the others leave calls
for it to make between two steps, such as to add a request or to abort one, and read no more
than how many requests wait.  What a step produced goes back to the event loop, into the streams
of those who wait for it.  Owns that traffic, the limit on waiting requests and the way to an
end; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from minipaged.engine.engine import Engine
from minipaged.engine.outputs import RequestOutput
from minipaged.errors import InvalidRequestError, MinipagedError
from minipaged.request.sequence import RequestId
from minipaged.serving.state import EngineState, engine_state
from minipaged.serving.stream import NewRequest, Stream

logger = logging.getLogger("minipaged")

Answer = TypeVar("Answer")
Observer = Callable[[Stream, RequestOutput, float], None]
LONGEST_RETRY_AFTER = 60  # seconds
RANKS_CHECKED_EVERY = 1.0  # seconds


class QueueFullError(MinipagedError):
    """Too many requests wait already; `retry_after` is how many seconds to stay away."""

    def __init__(self, num_queued: int, limit: int, retry_after: int) -> None:
        super().__init__(
            f"{num_queued} requests wait and the queue holds {limit}; try again in {retry_after} s"
        )
        self.retry_after = retry_after


class ShuttingDownError(MinipagedError):
    """No more requests are taken."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down and takes no more requests; ask another one")


class EngineDiedError(MinipagedError):
    """A step failed, so that nothing can be said of the requests that were running."""

    def __init__(self) -> None:
        super().__init__(
            "the engine failed, as the server's log says; the server must be restarted"
        )


class AsyncEngine:
    """Serves requests to an event loop, in which it is made, used and stopped.

    max_queued: requests that may wait to run; what goes beyond is refused.
    is_admitting: whether new requests are taken.
    died: set when a step has failed.
    observers: called in the event loop with a stream, every output that it gets, and the time
        (`time.monotonic`) at which the output's step ended.
    """

    def __init__(self, engine: Engine, max_queued: int = 256) -> None:
        self.max_queued = max_queued
        self.is_admitting = True
        self.died = asyncio.Event()
        self.observers: list[Observer] = []
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._streams: dict[RequestId, Stream] = {}
        self._num_left = 0  # requests left for the engine so far, written in the event loop
        self._num_seen = 0  # those of them that it has taken or refused, written in its thread
        self._ends: deque[float] = deque(maxlen=64)  # when the last requests ended
        self._calls: deque[Callable[[], None]] = deque()
        self._has_work = threading.Condition()  # guards _calls and _is_stopping
        self._is_stopping = False
        self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._ranks = getattr(engine.runner, "ranks", None)  # of a model on several
        if self._ranks is not None:
            self._look_after_ranks()

    @property
    def is_serving(self) -> bool:
        """Whether new requests are taken."""
        return self.is_admitting and not self._has_failed

    @property
    def num_queued(self) -> int:
        """Requests that wait to run: in the scheduler, or left for it and not yet seen."""
        num_arriving = self._num_left - self._num_seen
        return num_arriving + len(self._engine.scheduler.waiting)

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._streams)

    async def add(self, requests: Sequence[NewRequest]) -> Stream:
        """Queue requests, all or none; returns when the engine has accepted them.

        Raises QueueFullError, ShuttingDownError, EngineDiedError, or the InvalidRequestError of
        the first one that can never be served.  If the caller is cancelled, so are they.
        """
        self._check_admission(len(requests))
        stream = Stream(requests)
        self._streams.update((request_id, stream) for request_id in stream.request_ids)
        self._num_left += len(requests)
        accepted = self._question(lambda engine: self._accept(engine, requests))
        try:
            # The engine hears of them in any case, so that it can hear of their end after that.
            await asyncio.shield(asyncio.wrap_future(accepted))
        except asyncio.CancelledError:
            self.abort(stream)
            raise
        except Exception:
            self._forget(stream.request_ids)
            raise
        return stream

    def abort(self, stream: Stream) -> None:
        """End the requests of a stream and free their blocks; those that ended are left alone."""
        for request_id in stream.request_ids:
            if request_id in self._streams:
                self._leave(partial(self._end, request_id))

    def abort_all(self) -> None:
        """End every request where it stands; its stream gets what there is."""
        for stream in dict.fromkeys(self._streams.values()):
            self.abort(stream)

    async def ask(self, question: Callable[[Engine], Answer]) -> Answer:
        """What a function says of the engine, called between two steps."""
        return await asyncio.wrap_future(self._question(question))

    async def state(self) -> EngineState:
        """How the engine stands now."""
        return await self.ask(engine_state)

    def stop_admitting(self) -> None:
        """Refuse new requests; those that were accepted go on."""
        self.is_admitting = False

    async def stop(self) -> None:
        """End all requests, and the thread."""
        self.stop_admitting()
        self.abort_all()
        with self._has_work:
            self._is_stopping = True
            self._has_work.notify()
        await asyncio.to_thread(self._thread.join)

    def _check_admission(self, num_new: int) -> None:
        if self._has_failed:
            raise EngineDiedError
        if not self.is_admitting:
            raise ShuttingDownError
        if num_new > self.max_queued:
            raise InvalidRequestError(
                f"{num_new} prompts were sent at once and the queue holds {self.max_queued}; "
                "send fewer at a time"
            )
        if self.num_queued + num_new > self.max_queued:
            raise QueueFullError(self.num_queued, self.max_queued, self._retry_after())

    def _retry_after(self) -> int:
        """Seconds until a place should be free, by the pace at which requests ended of late."""
        if not self._ends:
            return 1
        pace = (time.monotonic() - self._ends[0]) / len(self._ends)
        return max(1, min(LONGEST_RETRY_AFTER, math.ceil(pace)))

    def _question(self, question: Callable[[Engine], Answer]) -> Future[Answer]:
        """Leave a question for the thread; the future will hold what it answers."""
        answer: Future[Answer] = Future()

        def call() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # whoever asked has gone
            try:
                if self._has_failed:
                    raise EngineDiedError
                answer.set_result(question(self._engine))
            except Exception as error:
                answer.set_exception(error)

        if not self._leave(call):
            answer.set_exception(EngineDiedError() if self._has_failed else ShuttingDownError())
        return answer

    def _forget(self, request_ids: Sequence[RequestId]) -> None:
        """Nothing comes for these."""
        for request_id in request_ids:
            self._streams.pop(request_id, None)

    def _deliver(self, outputs: list[RequestOutput], when: float) -> None:
        """Hand what a step produced to those who wait for it."""
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            stream.put(output)
            for observer in self.observers:
                observer(stream, output, when)
            if output.finished:
                del self._streams[output.request_id]
                self._ends.append(when)

    def _fail(self) -> None:
        """Tell everybody that nothing more will come."""
        self.died.set()
        for stream in self._streams.values():
            stream.fail(EngineDiedError())
        self._streams.clear()

    def _leave(self, call: Callable[[], None]) -> bool:
        """Let the thread make a call between two steps; False if it makes none any more."""
        with self._has_work:
            if self._is_stopping:
                return False
            self._calls.append(call)
            self._has_work.notify()
        return True

    def _look_after_ranks(self) -> None:
        """From now on see that all ranks live: an engine with nothing to do would not notice."""
        if self._leave(self._check_ranks):
            self._loop.call_later(RANKS_CHECKED_EVERY, self._look_after_ranks)

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while self._make_calls():
                self._send(self._engine.step())
        except Exception as error:
            if isinstance(error, MinipagedError):
                logger.error("the engine failed: %s", error)
            else:
                logger.exception("the engine failed")
            self._has_failed = True
            self._loop.call_soon_threadsafe(self._fail)
            with self._has_work:
                self._is_stopping = True
            self._make_calls()  # nobody shall wait for an answer that does not come

    def _make_calls(self) -> bool:
        """Make the calls that were left, or wait for one; False when it is time to end."""
        with self._has_work:
            while not (self._calls or self._is_stopping or self._engine.has_unfinished_requests):
                self._has_work.wait()
            num_calls, goes_on = len(self._calls), not self._is_stopping
        for _ in range(num_calls):
            self._calls.popleft()()
        return goes_on

    def _send(self, outputs: list[RequestOutput]) -> None:
        """Let the event loop deliver these outputs."""
        self._loop.call_soon_threadsafe(self._deliver, outputs, time.monotonic())

    def _accept(self, engine: Engine, requests: Sequence[NewRequest]) -> None:
        """Queue all of them, or none."""
        added = []
        try:
            for new in requests:
                engine.add_request(
                    new.request_id, new.prompt, new.params, new.priority, new.cache_salt
                )
                added.append(new.request_id)
        except Exception:
            for request_id in added:
                engine.abort(request_id)
            raise
        finally:
            self._num_seen += len(requests)

    def _end(self, request_id: RequestId) -> None:
        output = None if self._has_failed else self._engine.abort(request_id)
        if output is not None:
            self._send([output])
        else:  # it has ended before, or was never accepted
            self._loop.call_soon_threadsafe(self._forget, [request_id])

    def _check_ranks(self) -> None:
        """Fail as a step does, if a rank is gone."""
        if self._ranks is not None and not self._has_failed:
            self._ranks.check()
