"""What an endpoint is asked before it is measured, and the requests that are made for it."""

import json

import numpy as np
import pytest
from fake_server import FakeServer
from hypothesis import given
from hypothesis import strategies as st

from minipaged.errors import ConfigurationError
from minipaged.evaluation.arrivals import TimedRequest
from minipaged.evaluation.endpoint import WORDS, Endpoint, find_endpoint


def test_the_first_model_and_its_limits():
    with FakeServer(key="secret") as server:
        for url in (server.url, server.url + "/", server.url + "/v1", server.url + "/v1/"):
            found = find_endpoint(url, None, "secret", None)
            assert (found.base_url, found.model) == (server.url, "fake")
            assert (found.context_length, found.longest, found.vocab_size) == (64, 64, 50)
        assert find_endpoint(server.url, "fake", "secret", 10).context_length == 10
        assert find_endpoint(server.url, "fake", "secret", 100).context_length == 64
        other = find_endpoint(server.url, "other", "secret", 100)
        assert (other.context_length, other.longest, other.vocab_size) == (100, 90, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("gone", "secret", None), "no model 'gone' at .* it has 'fake', 'other'"),
        ((None, "guess", None), r"refuses the key \(401\); give another with --api-key"),
        ((None, None, None), "refuses the key"),
        ((None, "sécret", None), "characters that no header may hold"),
        (("other", "secret", None), r"does not tell .* \(max_model_len\); say so with --max"),
        (("fake", "secret", 3), "the context is 3 tokens"),
    ],
)
def test_an_endpoint_that_cannot_be_measured(options, message):
    with FakeServer(key="secret") as server, pytest.raises(ConfigurationError, match=message):
        find_endpoint(server.url, *options)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nowhere", "http://[", "ftp://127.0.0.1"])
def test_nothing_answers(url):
    with pytest.raises(ConfigurationError, match=r"nothing answers at .*; start a server"):
        find_endpoint(url, None, None, None)


def test_something_else_answers():
    with FakeServer() as server, pytest.raises(ConfigurationError, match="gives no list of models"):
        find_endpoint(f"{server.url}/other", None, None, None)


lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=10)


@given(lengths, st.integers(1, 50), st.booleans(), st.integers(0, 9))
def test_prompts_have_their_lengths(lengths, vocab_size, ignore_eos, seed):
    timed = [TimedRequest(i / 4, *both) for i, both in enumerate(lengths)]
    for known in (vocab_size, None):
        endpoint = Endpoint("http://x", "m", {}, 100, known)
        made = endpoint.requests(timed, np.random.default_rng(seed), ignore_eos)
        assert made == endpoint.requests(timed, np.random.default_rng(seed), ignore_eos)
        for request, (prompt, output) in zip(made, lengths, strict=True):
            body = json.loads(request.body)
            assert (request.prompt, request.output, body["max_tokens"]) == (prompt, output, output)
            assert body["stream_options"] == {"include_usage": True}
            assert body.get("ignore_eos", False) == ignore_eos
            if known is None:
                assert [word in WORDS for word in body["prompt"].split()] == [True] * prompt
            else:
                assert len(body["prompt"]) == prompt
                assert all(0 <= token < vocab_size for token in body["prompt"])


def test_what_is_shared_begins_alike_and_only_within_a_run():
    timed = [
        TimedRequest(0, 30, 1, ((7, 16), (8, 8))),
        TimedRequest(1, 40, 1, ((7, 16), (9, 8))),
        TimedRequest(2, 10, 1, ((7, 16),)),
    ]
    endpoint, rng = Endpoint("http://x", "m", {}, 100, 1000), np.random.default_rng(0)
    one, two, cut = (json.loads(r.body)["prompt"] for r in endpoint.requests(timed, rng, True))
    assert one[:16] == two[:16]
    assert one[16:24] != two[16:24]
    assert cut == one[:10]
    (later, *_) = (json.loads(r.body)["prompt"] for r in endpoint.requests(timed, rng, True))
    assert later[:16] != one[:16]
