"""Rates that rise until latency breaks, and the requests that are sent at each."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.evaluation.arrivals import TimedRequest
from minipaged.evaluation.load_client import OK, Record
from minipaged.evaluation.load_run import summarise
from minipaged.evaluation.load_sweep import FACTOR, LoadSource, conclusion, run_rates

sources = st.builds(
    LoadSource,
    st.sampled_from(["sharegpt", "alpaca", "translation-1"]),
    st.lists(
        st.builds(TimedRequest, st.floats(0, 9), st.integers(1, 900), st.integers(1, 900)),
        max_size=8,
    ).map(sorted),
    st.booleans(),
    st.integers(200, 800),
    st.integers(0, 99),
).filter(lambda source: source.poisson or len({r.arrival for r in source.trace}) > 1)


@given(sources, st.integers(2, 30), st.sampled_from([0.5, 3.0, 40.0]))
def test_every_rate_gets_the_same_requests_only_closer(source, count, rate):
    if not source.poisson and source.own_rate(count) is None:
        return  # the first ones come together
    slow, fast = source.take(count, rate), source.take(count, 4 * rate)
    assert [(r.prompt, r.output) for r in slow] == [(r.prompt, r.output) for r in fast]
    assert [r.arrival for r in slow] == pytest.approx([4 * r.arrival for r in fast])
    assert slow == sorted(slow, key=lambda r: r.arrival)
    assert all(r.prompt >= 1 <= r.output and r.prompt + r.output <= source.longest for r in slow)
    assert slow[-1].arrival == pytest.approx(count / rate)


def test_a_trace_is_sent_at_its_own_times_and_from_the_first_on_again():
    trace = [TimedRequest(t, 10, n) for n, t in enumerate([0.0, 1.0, 4.0], start=1)]
    source = LoadSource("", trace, False, 100, 0)
    taken = source.take(7, source.own_rate(7))
    lap = 4 + 4 / 3
    assert [r.arrival for r in taken] == pytest.approx([0, 1, 4, lap, lap + 1, lap + 4, 2 * lap])
    assert [r.output for r in taken] == [1, 2, 3, 1, 2, 3, 1]


def test_requests_that_come_together_have_no_rate():
    source = LoadSource("", [TimedRequest(0.0, 5, 5)] * 3, False, 100, 0)
    assert source.own_rate(3) is None
    with pytest.raises(InvalidRequestError, match="let them arrive at random"):
        source.take(3, 1.0)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.5, 40.0]), st.data())
def test_the_first_of_a_trace_may_come_together(together, later, rate, data):
    """They are sent at once, at whatever rate; one alone is such a case, too."""
    trace = [TimedRequest(0.0, 70, n) for n in range(1, together + 1)]
    trace += [TimedRequest(float(n), 70, 1) for n in range(1, later + 1)]
    source = LoadSource("", trace, False, 60, 0)
    count = data.draw(st.integers(1, together))
    assert source.own_rate(count) is None
    taken = source.take(count, rate)
    assert [(r.arrival, r.prompt, r.output) for r in taken] == [
        (0.0, 60 - n, n) for n in range(1, count + 1)
    ]


@pytest.mark.parametrize("longest", [3, 200, 342])
def test_examples_that_do_not_fit_are_refused(longest):
    """Five of them are 341 tokens, and there must be room for a sentence and its translation."""
    source = LoadSource("translation-5", [], True, longest, 0)
    with pytest.raises(
        ConfigurationError,
        match=f"prompt of translation-5 begins with 341 tokens, and a request may have {longest}; "
        "choose another dataset, or a longer context",
    ):
        source.take(5, 1.0)


@given(st.sampled_from([("translation-1", 80), ("translation-5", 341)]), st.integers(2, 500))
def test_examples_that_just_fit_are_served(dataset, room):
    name, shots = dataset
    for request in LoadSource(name, [], True, shots + room, 0).take(20, 1.0):
        assert request.prompt > shots
        assert request.output >= 1
        assert request.prompt + request.output <= shots + room


def measured(rate, latency, outcome=OK, lag=0.0):
    """A run of requests of one token each, all alike."""
    sent = [
        Record(float(n), 1, n + lag, [n + latency], n + latency, 1, 1, outcome) for n in range(4)
    ]
    return summarise(rate, sent)


@given(st.floats(0.5, 20), st.floats(1, 50), st.floats(0.05, 0.9))
def test_the_sweep_finds_where_latency_breaks(start, capacity, limit):
    """Latency of 1 / (capacity - rate), without bound from there on."""

    def run_at(rate):
        return measured(rate, 1 / (capacity - rate) if rate < capacity else 1000.0)

    runs = run_rates([start], limit, run_at)
    rates = [run.rate for run in runs]
    assert rates == pytest.approx([start * FACTOR**n for n in range(len(runs))])
    assert all(run.latency < limit for run in runs[:-1])
    assert runs[-1].latency >= limit
    said = conclusion(runs, limit)
    if len(runs) == 1:
        assert said.startswith("not known, begin with a lower --rate")
    else:
        sustained = float(said.split()[0])
        assert rates[-2] * 0.99 <= sustained <= rates[-1] * 1.01


def test_two_points_are_joined_by_a_straight_line_in_both_logarithms():
    runs = [measured(2.0, 0.1), measured(8.0, 10.0)]
    assert conclusion(runs, 1.0).startswith("4 requests/s")


@pytest.mark.parametrize(
    ("latency", "outcome", "lag", "said"),
    [
        (0.1, "status 429", 0.0, "4 of 4 failed"),
        (0.1, OK, 0.09, "the client itself was late"),
        (2.5, OK, 0.0, "2 of 4 were under way when the last was due"),
    ],
)
def test_the_sweep_ends_where_no_higher_rate_would_tell_more(latency, outcome, lag, said):
    def run_at(rate):
        return measured(rate, 0.1) if rate < 2 else measured(rate, latency, outcome, lag)

    runs = run_rates([1.0], 5, run_at)
    assert [run.rate for run in runs] == [1.0, 1.5, 2.25]
    assert said in conclusion(runs, 5)
    assert "at least 1.5 requests/s" in conclusion(runs, 5)
    assert conclusion(runs[-1:], 5).startswith("not known")


def test_rates_that_were_named_are_run_and_no_others():
    runs = run_rates([1.0, 9.0, 3.0], None, lambda rate: measured(rate, math.exp(rate)))
    assert [run.rate for run in runs] == [1.0, 9.0, 3.0]
