"""Requests for any rate, and the rates at which to send them.

Every rate gets the same requests in the same order, only closer together, and more of them at a
higher rate, so that all runs are equally long: a queue that grows needs time to show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minipaged.evaluation.arrivals import TimedRequest, poisson_requests
from minipaged.evaluation.load_run import LoadRun
from minipaged.evaluation.traces import at_random, at_rate

FACTOR = 1.5  # from one rate of a sweep to the next
# Of the requests, under way when the last is due: from there on more come than end, whatever
# latency has grown to by then.  In a run that is long enough a stable queue leaves few.
LARGEST_BACKLOG = 1 / 3


@dataclass(frozen=True)
class LoadSource:
    """Where requests come from.

    dataset: whose lengths, as in arrivals.py, where there is no trace.
    trace: recorded requests, taken from the first on again and again.
    poisson: whether they arrive at random, or at the times of the trace.
    longest: tokens of a prompt and its output together.
    """

    dataset: str
    trace: Sequence[TimedRequest]
    poisson: bool
    longest: int
    seed: int

    def own_rate(self, count: int) -> float | None:
        """Requests per second of so many of the trace; None if it has no times."""
        if not self.trace:
            return None
        duration = self._on_time(count)[-1].arrival
        return count / duration if duration else None

    def take(self, count: int, rate: float) -> list[TimedRequest]:
        """So many requests in count / rate seconds; lengths are cut to what is served.

        The last of a Poisson process is made due when it is on average, so that a few requests
        have the rate that was asked for, too: the others are at random before it.
        """
        if not self.trace:
            endless = poisson_requests(self.dataset, rate, math.inf, self.longest, self.seed)
            requests = list(itertools.islice(endless, count))
        elif self.poisson:
            requests = list(at_random(list(self.trace), rate, count, self.seed))
        else:
            requests = self._on_time(count)
            if self.trace[-1].arrival and not requests[-1].arrival:
                # Those that come first come together, and do so at any rate.
                return [self.cut(request) for request in requests]
        return [self.cut(request) for request in at_rate(requests, rate)]

    def _on_time(self, count: int) -> list[TimedRequest]:
        # After the last request of a lap the first of the next comes with a gap of mean length.
        lap = self.trace[-1].arrival * (1 + 1 / len(self.trace))
        laps = (divmod(i, len(self.trace)) for i in range(count))
        return [
            self.trace[i]._replace(arrival=self.trace[i].arrival + before * lap)
            for before, i in laps
        ]

    def cut(self, request: TimedRequest) -> TimedRequest:
        """At most half of what is served for the output, and the rest for the prompt."""
        output = min(request.output, self.longest // 2)
        return request._replace(prompt=min(request.prompt, self.longest - output), output=output)


def run_rates(
    rates: Sequence[float], limit: float | None, run_at: Callable[[float], LoadRun]
) -> list[LoadRun]:
    """Runs at these rates; with a limit, on from the last of them until latency breaks."""
    runs = [run_at(rate) for rate in rates]
    while limit is not None and not has_broken(runs[-1], limit):
        runs.append(run_at(runs[-1].rate * FACTOR))
    return runs


def has_broken(run: LoadRun, limit: float) -> bool:
    """Whether a higher rate would tell nothing more."""
    return run.latency >= limit or bool(run.failures) or not run.valid or _grows(run)


def _grows(run: LoadRun) -> bool:
    return run.backlog > LARGEST_BACKLOG * run.requests


def conclusion(runs: Sequence[LoadRun], limit: float) -> str:
    """Which rate is sustained, and why no higher one: a sentence on a sweep.

    Where the mean normalized latency crosses `limit` between two rates, a straight line between
    them in both logarithms says at which, as in sweep.py.
    """
    before, last = runs[-2] if len(runs) > 1 else None, runs[-1]
    failed = last.requests - last.completed
    if not last.valid:
        why = "the client itself was late"
    elif failed:
        why = f"{failed} of {last.requests} failed"
    elif last.latency >= limit:
        why = f"the mean is {last.latency:.3g} s/token"
        if before is not None:
            part = math.log(limit / before.latency) / math.log(last.latency / before.latency)
            rate = before.rate * (last.rate / before.rate) ** part
            return f"{rate:.3g} requests/s, with less than {limit:g} s/token in the mean"
    else:
        why = (
            f"{last.backlog} of {last.requests} were under way when the last was due, after "
            f"{last.arriving:.0f} s"
        )
    if before is None:
        return f"not known, begin with a lower --rate: at {last.rate:.3g} requests/s {why}"
    return f"at least {before.rate:.3g} requests/s; at {last.rate:.3g} {why}"
