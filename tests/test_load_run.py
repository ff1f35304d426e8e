"""What records amount to: every time from when a request was due, and nobody left out."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.evaluation.load_client import OK, TIMEOUT, Record
from minipaged.evaluation.load_run import MEAN_SHARE, spread, summarise

times = st.floats(0.001, 10)


@st.composite
def records(draw):
    """A request that was sent a little late and answered, given up or refused."""
    due = draw(st.floats(0, 100))
    sent = due + draw(st.floats(0, 1))
    outcome = draw(st.sampled_from([OK, OK, OK, TIMEOUT, "status 429"]))
    asked = draw(st.integers(1, 20))
    gaps = draw(st.lists(times, min_size=1, max_size=asked))
    chunks = (sent + np.cumsum(gaps)).tolist()
    if outcome == "status 429":
        chunks = []
    end = chunks[-1] if chunks else sent + draw(times)
    if outcome == TIMEOUT:
        chunks, end = chunks[:-1], end + 1
    tokens = (10, asked) if outcome == OK else (0, 0)
    return Record(due, asked, sent, chunks, end, *tokens, outcome, "" if outcome == OK else "why")


@given(st.lists(records(), min_size=1, max_size=20))
def test_times_count_from_when_requests_were_due(records):
    run = summarise(3, records)
    ok = [r for r in records if r.outcome == OK]
    counted = [r for r in records if r.outcome in (OK, TIMEOUT)]
    assert run.requests == len(records) == run.completed + sum(run.failures.values())
    assert run.timeouts == len(counted) - len(ok)
    assert set(run.messages) == set(run.failures)
    assert run.seconds == max(r.end for r in records)
    assert run.tokens_per_second * run.seconds == pytest.approx(sum(r.output_tokens for r in ok))
    assert run.lag.largest == pytest.approx(max(r.sent - r.due for r in records))
    if not counted:
        assert run.ttft is run.end_to_end is run.normalized is None
        return
    assert run.end_to_end.largest == pytest.approx(max(r.end - r.due for r in counted))
    first = [(r.chunks[0] if r.chunks else r.end) - r.due for r in counted]
    assert run.ttft.mean == pytest.approx(sum(first) / len(first))
    # No request waits less for its first token than the client made it wait.
    assert run.ttft.largest >= max(r.sent - r.due for r in counted)
    # Those given up have as many tokens as they asked for at most: so much per token at least.
    assert run.latency == pytest.approx(
        sum((r.end - r.due) / r.asked for r in counted) / len(counted)
    )


@given(st.lists(records(), min_size=1, max_size=20))
def test_the_parts_of_an_answer_make_the_whole(records):
    """End to end = first token + (tokens - 1) x time per token, for each that was answered."""
    for record in records:
        run = summarise(1, [record])
        if record.outcome != OK or record.asked == 1:
            assert run.tpot is None
            continue
        whole = run.ttft.mean + (record.asked - 1) * run.tpot.mean
        assert run.end_to_end.mean == pytest.approx(whole)
        gaps = run.between_chunks
        if gaps is not None:
            assert gaps.mean * (len(record.chunks) - 1) == pytest.approx(
                record.end - record.chunks[0]
            )


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_percentiles_are_in_order(values):
    found = spread(values)
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= found.largest == max(values)
    assert np.isclose(found.mean, np.mean(values))
    assert spread([]) is None


def answered(lags, waits):
    """Requests that were sent late by so much, and got their one token so much later."""
    return [
        Record(float(i), 1, i + lag, [i + lag + wait], i + lag + wait, 1, 1)
        for i, (lag, wait) in enumerate(zip(lags, waits, strict=True))
    ]


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=20), st.floats(0, 1))
def test_a_run_is_valid_while_the_client_is_on_time(waits, lag):
    """With a lag that is the same for all, at most a tenth of what they waited in the mean."""
    run = summarise(1, answered([lag] * len(waits), waits))
    if lag < 0.999 * MEAN_SHARE * (min(waits) + lag):
        assert run.valid
    if lag > 1.001 * MEAN_SHARE * (max(waits) + lag):
        assert not run.valid


@pytest.mark.parametrize(("lag", "valid"), [(0.2, True), (0.9, False)])
def test_a_client_that_was_late_now_and_then_spoils_the_tail(lag, valid):
    """3 requests of 100 wait 1 s as all do, and are sent late by 0.9 s: half of their p99."""
    run = summarise(1, answered([0.0] * 97 + [lag] * 3, [1.0] * 100))
    assert run.lag.mean < 0.03 * run.ttft.mean
    assert run.valid == valid


def test_a_run_is_plain_data():
    run = summarise(1, [Record(0.0, 2, 0.001, [0.1, 0.2], 0.2, 3, 2)])
    again = json.loads(json.dumps(dataclasses.asdict(run), allow_nan=False))
    assert again["ttft"]["p99"] == pytest.approx(0.1)
    assert again["valid"] is True
