"""How long requests waited for their tokens of late: percentiles over the last minute.

Counts durations second by second in classes two per cent wide, so that it takes the same small
memory however many there are, and forgets by dropping whole seconds.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import NamedTuple

from minipaged.engine.outputs import RequestOutput
from minipaged.request.sequence import RequestId
from minipaged.serving.stream import Stream

MINUTE = 60  # seconds that are remembered
SHORTEST = 1e-6  # seconds; what is shorter counts as this
WIDTH = math.log(1.02)  # of a class
MOST_MARKS = 512  # requests whose news is kept until it is fetched
PERCENTILES = (0.5, 0.9, 0.99)


class Durations:
    """Durations that ended in the last minute, each known to two per cent."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, Counter[int]]] = deque()

    def add(self, duration: float, when: float) -> None:
        """Count a duration that ended at `when`; both in seconds."""
        if not self._seconds or self._seconds[-1][0] < int(when):
            self._seconds.append((int(when), Counter()))
            self._forget(when)
        self._seconds[-1][1][int(math.log(max(duration, SHORTEST) / SHORTEST) / WIDTH)] += 1

    def percentiles(self, now: float) -> list[float] | None:
        """Half, nine tenths and 99 in 100 took no longer than these; None if there were none."""
        self._forget(now)
        total: Counter[int] = Counter()
        for _, counts in self._seconds:
            total.update(counts)
        if not total:
            return None
        found: list[float] = []
        seen = 0
        for kind in sorted(total):
            seen += total[kind]
            while len(found) < len(PERCENTILES) and seen >= PERCENTILES[len(found)] * total.total():
                found.append(SHORTEST * math.exp(WIDTH * (kind + 0.5)))
        return found

    def _forget(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] <= now - MINUTE:
            self._seconds.popleft()


class Mark(NamedTuple):
    """When a request arrived, got its first token (None if before the watch began), and ended."""

    arrived: float
    first: float | None
    ended: float | None = None
    reason: str | None = None


class Latencies:
    """Observes the outputs of an AsyncEngine, in the event loop; see `AsyncEngine.observers`.

    marks: of requests that began or ended since they were last fetched, the newest of them.
    """

    def __init__(self) -> None:
        self.first_token = Durations()
        self.inter_token = Durations()
        self.marks: dict[RequestId, Mark] = {}
        self._last: dict[RequestId, tuple[float, float | None]] = {}  # token, and first token

    def observe(self, stream: Stream, output: RequestOutput, when: float) -> None:
        """Take note of an output, which ended its step at `when`."""
        request_id = output.request_id
        last, first = self._last.get(request_id, (None, None))
        reason = output.finish_reason
        if reason != "abort":  # an aborted request got no token with it
            if last is not None:
                self.inter_token.add(when - last, when)
            elif all(len(completion.token_ids) <= 1 for completion in output.outputs):
                first = when
                self.first_token.add(when - stream.arrived, when)
        if last is None or output.finished:
            ended = when if output.finished else None
            self.marks[request_id] = Mark(stream.arrived, first, ended, reason)
            if len(self.marks) > MOST_MARKS:
                del self.marks[next(iter(self.marks))]
        self._last[request_id] = when, first
        if output.finished:
            del self._last[request_id]

    def percentiles(self, now: float) -> dict[str, list[float] | None]:
        """Of both durations, over the last minute."""
        return {
            "first_token": self.first_token.percentiles(now),
            "inter_token": self.inter_token.percentiles(now),
        }

    def fetch_marks(self) -> dict[RequestId, Mark]:
        """Those since the last call."""
        marks, self.marks = self.marks, {}
        return marks
