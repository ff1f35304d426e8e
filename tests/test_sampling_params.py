"""Bad parameters are refused in one sentence that names the value and the range."""

import pytest

from minipaged.errors import InvalidRequestError
from minipaged.request.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0.1; it must lie in \[0, 1000000.0\]"),
        ({"temperature": 10**400}, "temperature is 1000.*; it must lie in"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"top_k": -2}, r"top_k is -2; it must lie in \[-1, 2147483647\]"),
        ({"top_k": 2**63}, "top_k is 9"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0}, r"top_p is 0; it must lie in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p is 1.01; it must lie in \(0, 1\]"),
        ({"min_p": -0.5}, "min_p is -0.5"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        (
            {"repetition_penalty": 1e-38},
            r"repetition_penalty is 1e-38; it must lie in \[0.01, 100\]",
        ),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5"),
        ({"max_tokens": 0}, r"max_tokens is 0; it must lie in \[1, inf\)"),
        ({"max_tokens": -3}, "max_tokens is -3"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, above max_tokens 4"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": 21}, r"logprobs is 21; it must lie in \[0, 20\]"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"stop": [3]}, "a stop string is 3; it must be text"),
        ({"stop": 3}, "stop is 3; it must be a text or a list of texts"),
        ({"stop_token_ids": [-1]}, "a stop token id is -1"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; it must be a list"),
        ({"stop_token_ids": ["</s>"]}, "a stop token id is '</s>'"),
    ],
)
def test_out_of_range(options, message):
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**options)


def test_defaults_are_plain_sampling():
    params = SamplingParams()
    assert not params.greedy
    assert not params.has_penalties
    assert params.max_tokens == 16


def test_stop_may_be_one_string_or_several():
    assert SamplingParams(stop="\n").stop == ("\n",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()


def test_limits_themselves_are_allowed():
    SamplingParams(temperature=0, top_k=-1, top_p=1, min_p=1, max_tokens=1, logprobs=0, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, r"n is 0; it must lie in \[1, inf\)"),
        ({"n": -2}, "n is -2"),
        ({"n": 1.5}, "n is 1.5; it must be a whole number"),
        ({"best_of": 0}, "best_of is 0"),
        ({"n": 3, "best_of": 2}, "best_of is 2, below n 3; raise it or lower n"),
        ({"n": 2, "temperature": 0}, "temperature is 0 and 2 outputs are asked for"),
        ({"use_beam_search": True, "n": 2}, "temperature is 1.0 with beam search"),
        ({"length_penalty": 2.0}, "mean something to beam search only"),
        ({"early_stopping": True}, "mean something to beam search only"),
    ],
)
def test_numbers_of_outputs(options, message):
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"length_penalty": float("inf")}, "length_penalty is inf"),
        ({"length_penalty": 100}, r"length_penalty is 100; it must lie in \[-10, 10\]"),
        ({"top_k": 5}, "top_k is 5 with beam search"),
        ({"top_p": 0.9}, "top_p is 0.9 with beam search"),
        ({"min_p": 0.1}, "min_p is 0.1 with beam search"),
        ({"repetition_penalty": 1.2}, "repetition_penalty is 1.2 with beam search"),
        ({"presence_penalty": 0.2}, "presence_penalty is 0.2 with beam search"),
        ({"stop": "\n"}, "stop is .* with beam search, .* set it to"),
    ],
)
def test_what_beam_search_does_not_know(options, message):
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(use_beam_search=True, temperature=0, n=2, **options)


def test_widths():
    assert SamplingParams(n=3).width == 3
    assert SamplingParams(n=2, best_of=5).width == 5
    assert not SamplingParams(n=3).is_ranked
    assert SamplingParams(n=2, best_of=5).is_ranked
    assert SamplingParams(n=1, use_beam_search=True, temperature=0).is_ranked
