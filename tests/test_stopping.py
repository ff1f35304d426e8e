"""When an output ends: end tokens, the maximum, stop strings that arrive in pieces."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minipaged.decoding.stopping import end_tokens, num_held_back, stop_by_string, stop_by_token
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence

text = st.text(alphabet="ab", max_size=3)


def test_end_tokens_are_the_requests_and_the_models():
    params = SamplingParams(stop_token_ids=[7])
    assert end_tokens(params, (2,)) == (7, 2)
    assert end_tokens(SamplingParams(stop_token_ids=[7], ignore_eos=True), (2,)) == (7,)


@pytest.mark.parametrize(
    ("output", "reason"),
    [([5], None), ([5, 2], "stop"), ([5, 5, 5], "length"), ([5, 5, 2], "stop")],
)
def test_stop_by_token(output, reason):
    sequence = Sequence(0, [2, 2, 2])  # end tokens of the prompt do not count
    sequence.token_ids += output
    assert stop_by_token(sequence, (2,), max_tokens=3) == reason


@example(pieces=["a", "b"], stops=["ab"], include=False)
@given(
    pieces=st.lists(text, max_size=8),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_stop_strings_in_a_text_that_grows(pieces, stops, include):
    """The cut is that of the whole text up to the piece that completes the first stop string."""
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    so_far, shown = "", ""
    for piece in pieces:
        so_far += piece
        cut = stop_by_string(so_far, len(piece), params)
        found = [(so_far.find(s), len(s)) for s in stops if s in so_far]
        if found:
            start, length = min(found)
            assert cut == (start + length if include else start)
            assert so_far[:cut].startswith(shown), "text was shown that had to be cut off"
            return
        assert cut is None
        shown = so_far[: max(len(shown), len(so_far) - num_held_back(params))]
