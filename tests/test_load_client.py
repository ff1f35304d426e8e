"""The load client against a server that knows what it did: open loop, times from when due."""

import asyncio
import itertools
import json
import os
import time

import httpx
import numpy as np
import pytest
from fake_server import FakeServer
from hypothesis import given
from hypothesis import strategies as st

from minipaged.errors import ConfigurationError
from minipaged.evaluation.arrivals import TimedRequest
from minipaged.evaluation.endpoint import find_endpoint
from minipaged.evaluation.load_client import _lines, send_all, warm_up
from minipaged.evaluation.load_run import summarise

TEXTS = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]))


def ready(server, arrivals, output=3):
    """An endpoint, and requests for it that are due at these times."""
    endpoint = find_endpoint(server.url, None, None, None)
    timed = [TimedRequest(arrival, 4, output) for arrival in arrivals]
    return endpoint, endpoint.requests(timed, np.random.default_rng(0), ignore_eos=True)


def sent_to(server, arrivals, output=3, timeout=60):
    return asyncio.run(send_all(*ready(server, arrivals, output), timeout))


def arrivals_at(rate, count, seed=0):
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()


def test_latency_is_that_of_the_queue():
    """Lindley's recursion over the times at which requests were due gives every latency.

    A server that takes one request at a time gets them half again as fast as it serves them.
    Request n waits W(n) = max(0, W(n-1) + S(n-1) - A(n)), with A(n) the time since the last was
    due and S the service times, which the server tells.  A client that waits for answers, or
    counts from when it got round to sending, finds S, and little more.
    """
    arrivals = arrivals_at(rate=75, count=50)
    with FakeServer(first_token=0.016, per_token=0.002, one_at_a_time=True) as server:
        endpoint, requests = ready(server, arrivals)
        records = asyncio.run(send_all(endpoint, requests, timeout=60))
        # Two that were due at almost the same time may have changed places: as they were served.
        in_order = sorted(server.served, key=lambda served: served.started)
    number = {json.loads(request.body)["seed"]: n for n, request in enumerate(requests)}
    order = [number[served.body["seed"]] for served in in_order]
    service = [served.ended - served.started for served in in_order]
    due = [arrivals[n] for n in order]
    wait = [0.0]
    for n in range(1, len(order)):
        wait.append(max(0.0, wait[-1] + service[n - 1] - (due[n] - due[n - 1])))
    latency = np.add(wait, service)
    assert latency.mean() > 3 * np.mean(service)  # there is a queue to be seen
    measured = np.array([records[n].end - records[n].due for n in order])
    excess = measured - latency  # the way there and back, and the client's own lag
    assert excess.min() > 0
    assert np.median(excess) < max(0.05, 0.5 * latency.mean())
    run = summarise(75, records)
    assert run.end_to_end.mean == pytest.approx(measured.mean())
    assert run.completed == len(arrivals)


def test_no_answer_is_waited_for():
    arrivals = [0.01 * i for i in range(20)]
    with FakeServer(first_token=2) as server:
        records = sent_to(server, arrivals, timeout=6)
        assert server.peak == 20
    assert max(record.sent for record in records) < min(record.end for record in records)
    assert all(record.sent >= record.due for record in records)


def test_a_late_client_hides_nothing_and_says_so():
    """Held up for 0.4 s, the client sends late; that counts as latency, and spoils the run."""
    arrivals = [0.05 * i for i in range(10)]
    held, until = 0.1, 0.5

    with FakeServer(first_token=0.01) as server:
        endpoint, requests = ready(server, arrivals)

        async def hold_up():
            loop = asyncio.get_running_loop()
            sending = loop.create_task(send_all(endpoint, requests, timeout=60))
            while not server.served:
                await asyncio.sleep(0.001)
            loop.call_later(held, time.sleep, until - held)
            return await sending

        records = asyncio.run(hold_up())
    run = summarise(20, records)
    assert run.completed == 10
    late = [record for record in records if record.sent - record.due > 0.15]
    assert late
    for record in late:
        assert record.chunks[0] - record.due >= record.sent - record.due + 0.01
    assert run.lag.largest > 0.15
    assert run.ttft.largest > run.lag.largest
    assert not run.valid


def test_times_per_token_are_the_servers():
    """The wait for the first token is not spread over the others, nor one of them left out."""
    with FakeServer(first_token=0.4, per_token=0.01) as server:
        (record,) = sent_to(server, [0.0], output=21)
        (served,) = server.served
    run = summarise(1, [record])
    per_token = (served.tokens[-1] - served.tokens[0]) / 20
    first = served.tokens[0] - served.arrived
    assert run.tpot.mean == pytest.approx(per_token, rel=0.3)
    assert first <= run.ttft.mean < first + 0.3
    assert len(record.chunks) == 21
    assert run.normalized.mean == pytest.approx((record.end - record.due) / 21)


def test_tokens_are_counted_by_the_usage():
    with FakeServer(per_chunk=4) as server:
        records = sent_to(server, [0.0, 0.01], output=10)
    assert [record.output_tokens for record in records] == [10, 10]
    assert [record.prompt_tokens for record in records] == [4, 4]
    assert [len(record.chunks) for record in records] == [3, 3]


def test_a_text_may_be_empty():
    with FakeServer(fault="no text") as server:
        (record,) = sent_to(server, [0.0])
    assert record.outcome == "ok"
    assert record.chunks == [record.end]


@pytest.mark.parametrize("text", ["\u2028", "\u2029", "\x85", "é", "\N{GRINNING FACE}"])
def test_a_text_is_whatever_json_allows(text):
    """Some of it ends a line elsewhere, but not in a stream of events."""
    with FakeServer(text=text) as server:
        (record,) = sent_to(server, [0.0], output=5)
    assert (record.outcome, record.message) == ("ok", "")
    assert len(record.chunks) == record.output_tokens == 5


@given(st.lists(TEXTS), st.data())
def test_lines_do_not_depend_on_how_they_come(lines, data):
    """The parts in which the network brings them may end anywhere, also in a character."""
    whole = "\n".join(lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=9)))
    ends = [0, *cuts, len(whole)]

    async def read():
        async def parts():
            for start, end in itertools.pairwise(ends):
                yield whole[start:end]

        return [line async for line in _lines(httpx.Response(200, content=parts()))]

    assert asyncio.run(read()) == (lines or [""])


@pytest.fixture
def few_files():
    """A limit that leaves room for some twenty more files, which the process itself may raise."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(1)  # the lowest number that is free
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_files")
def test_as_many_are_under_way_as_the_system_allows():
    """Each has a file, here and in the server: those that a shell usually allows are too few."""
    with FakeServer(first_token=1) as server:
        records = sent_to(server, [0.0] * 40)
        assert server.peak == 40
    assert [record.outcome for record in records] == ["ok"] * 40


def test_refusals_are_counted_and_not_tried_again():
    with FakeServer(first_token=1, most=3) as server:
        records = sent_to(server, [0.01 * i for i in range(10)])
        refused = sum(served.refused for served in server.served)
        assert len(server.served) == 10
    run = summarise(100, records)
    assert refused >= 1
    assert run.failures == {"status 429": refused}
    assert run.messages == {"status 429": "come back later"}
    assert run.completed == 10 - refused
    assert run.timeouts == 0


def test_one_that_does_not_end_counts_with_the_time_it_was_given():
    with FakeServer(fault="silent", every=2) as server:
        records = sent_to(server, [0.0, 0.05, 0.1, 0.15], timeout=2)
        for _ in range(400):  # the server is told: it need not go on
            if server.under_way == 0:
                break
            time.sleep(0.05)
        assert server.under_way == 0
    run = summarise(20, records)
    assert (run.completed, run.failures, run.timeouts) == (2, {"timeout": 2}, 2)
    assert run.end_to_end.largest >= 2
    assert run.ttft.largest >= 2
    assert run.normalized.largest >= 2 / 3


@pytest.mark.parametrize(
    ("fault", "outcome", "message"),
    [
        ("cut", "connection error", ""),
        ("no usage", "broken answer", "without a usage"),
        ("error", "broken answer", "the engine failed"),
        ("garbage", "broken answer", "{what"),
    ],
)
def test_half_an_answer_is_a_failure(fault, outcome, message):
    with FakeServer(fault=fault, every=3) as server:
        records = sent_to(server, [0.0, 0.1, 0.2])
        failed = [record for record in records if record.outcome != "ok"]
        assert [record.outcome for record in failed] == [outcome]
        assert message in failed[0].message
        run = summarise(10, records)
        assert run.timeouts == 0
        assert run.end_to_end.largest == max(r.end - r.due for r in records if r.outcome == "ok")


def test_nobody_is_there_any_more():
    with FakeServer() as server:
        endpoint, requests = ready(server, [0.0, 0.05])
    records = asyncio.run(send_all(endpoint, requests, timeout=10))
    assert [record.outcome for record in records] == ["connection error"] * 2
    run = summarise(1, records)
    assert run.normalized is None
    assert run.latency == float("inf")


def test_warming_up_tells_what_the_server_refuses():
    with FakeServer(most=0) as server:
        endpoint, requests = ready(server, [0.0])
        with pytest.raises(ConfigurationError, match="status 429: come back later"):
            asyncio.run(warm_up(endpoint, requests, timeout=10))


def test_whoever_waits_is_told_of_every_end():
    ended = []
    with FakeServer() as server:
        endpoint, requests = ready(server, [0.0, 0.02, 0.04])
        records = asyncio.run(send_all(endpoint, requests, 60, ended.append))
    assert sorted(record.due for record in ended) == [record.due for record in records]
