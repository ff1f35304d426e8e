"""What a run of the load client comes to.

Every request that was due counts, the first as much as those that ended long after the last was
due: nothing is cut off at either end, for those that wait longest are at the end.  The run lasts
until all have ended, so that the requests and tokens per second of a short one are less than the
server could go on with.  Warm-up requests are not part of it.

A request that was given up counts with the time after which it was: its latency is at least
that.  Other failures have no latency, and are counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minipaged.evaluation.load_client import OK, TIMEOUT, TIMER, Record

# Of the time to the first token, the part that may be the client's lag: in the mean, and of the
# p99 of both, which is that of a request or two in most runs.
MEAN_SHARE, TAIL_SHARE = 0.1, 0.25


@dataclass(frozen=True)
class Spread:
    """Mean, percentiles and the largest of some times, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    largest: float


@dataclass(frozen=True)
class LoadRun:
    """One run at one rate; all times in seconds, and from when a request was due.

    rate: requests per second that were to be sent.  arriving: until the last was due.
    backlog: requests that were still under way then.
    failures: their number by outcome; messages: what was first said of each.
    timeouts: those of the failures that count with the time after which they were given up.
    seconds: until the last one ended.
    prompt_tokens, output_tokens: of the requests that were answered; asked_tokens: the output
        that these asked for.
    ttft: time to the first token.
    tpot: time per output token after the first, one for each request of at least two.
    between_chunks: time between two parts of a text, which are of one token or more.
    end_to_end: to the last token.  normalized: that per output token (section 6.1).
    lag: how late the client sent.  valid: whether that is negligible.
    """

    rate: float
    requests: int
    arriving: float
    backlog: int
    completed: int
    failures: dict[str, int]
    messages: dict[str, str]
    timeouts: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    asked_tokens: int
    requests_per_second: float
    tokens_per_second: float
    ttft: Spread | None
    tpot: Spread | None
    between_chunks: Spread | None
    end_to_end: Spread | None
    normalized: Spread | None
    lag: Spread
    valid: bool

    @property
    def latency(self) -> float:
        """Mean normalized latency in seconds per token; infinite if no request has one."""
        return self.normalized.mean if self.normalized else math.inf


def summarise(rate: float, records: Sequence[Record]) -> LoadRun:
    """The records of a run, at least one, all of which have ended."""
    good = [record for record in records if record.outcome == OK]
    given_up = [record for record in records if record.outcome == TIMEOUT]
    failed = [record for record in records if record.outcome != OK]
    seconds = max(_end(record) for record in records)
    arriving = max(record.due for record in records)
    output_tokens = sum(record.output_tokens for record in good)
    first = [(record.chunks or [_end(record)])[0] - record.due for record in good + given_up]
    whole = [_end(record) - record.due for record in good + given_up]
    # How many tokens one that was given up would have had, nobody knows: at most those asked for.
    tokens = [r.output_tokens if r.outcome == OK else r.asked for r in good + given_up]
    ttft = spread(first)
    lag = spread([_sent(record) - record.due for record in records])
    assert lag is not None
    return LoadRun(
        rate=rate,
        requests=len(records),
        arriving=arriving,
        backlog=sum(record.due < arriving < _end(record) for record in records),
        completed=len(good),
        failures=dict(Counter(record.outcome for record in failed)),
        messages={record.outcome: record.message for record in reversed(failed)},
        timeouts=len(given_up),
        seconds=seconds,
        prompt_tokens=sum(record.prompt_tokens for record in good),
        output_tokens=output_tokens,
        asked_tokens=sum(record.asked for record in good),
        requests_per_second=len(good) / seconds,
        tokens_per_second=output_tokens / seconds,
        ttft=ttft,
        tpot=spread(
            [
                (_end(record) - record.chunks[0]) / (record.output_tokens - 1)
                for record in good
                if record.output_tokens > 1
            ]
        ),
        between_chunks=spread(
            [
                after - before
                for record in good
                for before, after in zip(record.chunks, record.chunks[1:], strict=False)
            ]
        ),
        end_to_end=spread(whole),
        normalized=spread([time / count for time, count in zip(whole, tokens, strict=True)]),
        lag=lag,
        valid=_is_negligible(lag, ttft),
    )


def spread(times: Sequence[float]) -> Spread | None:
    """None if there are no times."""
    if not times:
        return None
    percentiles = (float(p) for p in np.percentile(times, (50, 90, 99, 100)))
    return Spread(float(np.mean(times)), *percentiles)


def _is_negligible(lag: Spread, ttft: Spread | None) -> bool:
    """Whether the waiting for a first token is the server's, in the mean and in the tail.

    Times count from when a request was due, so that a lag is part of them.
    """
    return ttft is None or (
        lag.mean <= MEAN_SHARE * ttft.mean and lag.p99 <= max(TIMER, TAIL_SHARE * ttft.p99)
    )


def _end(record: Record) -> float:
    assert record.end is not None, "a request is still under way"
    return record.end


def _sent(record: Record) -> float:
    assert record.sent is not None, "a request is still under way"
    return record.sent
