"""From outputs to answers: whatever a slow reader misses in between, no text and no token twice."""

from hypothesis import given
from hypothesis import strategies as st

from minipaged.decoding.sampler import Logprob
from minipaged.engine.outputs import CompletionOutput, RequestOutput
from minipaged.serving.answers import CompletionAnswer, Growth, usage


@st.composite
def stories(draw):
    """Of a request with several outputs: how each ends, and how it stood when it was looked at.

    Text that may become a stop string is held back, so that it comes later than its tokens.
    """
    ends = []
    for index in range(draw(st.integers(1, 3))):
        text = draw(st.text(max_size=12))
        num_tokens = draw(st.integers(1, 8))
        ends.append((index, text, list(range(num_tokens)), draw(st.booleans())))
    looks = draw(st.lists(st.floats(0, 1), max_size=6).map(sorted))
    early = draw(st.integers(0, len(ends)))  # outputs that end before the others
    return ends, looks, early


def output(request_id, ends, share, early):
    """How a request stands when this share of it is done."""
    completions = []
    for index, text, token_ids, is_held_back in ends:
        done = share >= 1 or (index < early and share >= 0.5)
        part = 1 if done else share
        num_chars = int(len(text) * part * (0.5 if is_held_back and not done else 1))
        completions.append(
            CompletionOutput(
                index=index,
                text=text[:num_chars],
                token_ids=token_ids[: max(1, int(len(token_ids) * part))],
                logprobs=[
                    {i: Logprob(-0.5, 1)} for i in token_ids[: max(1, int(len(token_ids) * part))]
                ],
                finish_reason="length" if done else None,
            )
        )
    return RequestOutput(request_id, None, [7, 8], completions, share >= 1, num_cached_tokens=1)


@given(several=st.lists(stories(), min_size=1, max_size=3))
def test_pieces_put_together_are_the_whole(several):
    n = 3
    names = [f"request {i}" for i in range(len(several))]
    growth = Growth(names, n)
    texts, tokens, reasons, last = {}, {}, {}, []
    for number, (ends, looks, early) in enumerate(several):
        for share in [*looks, 1]:
            seen = output(names[number], ends, share, early)
            for piece in growth.pieces(seen):
                assert piece.index not in reasons, "a piece after the last one"
                assert piece.text or piece.finish_reason
                assert [i for entry in piece.logprobs for i in entry] == piece.token_ids
                texts[piece.index] = texts.get(piece.index, "") + piece.text
                tokens[piece.index] = tokens.get(piece.index, []) + piece.token_ids
                if piece.finish_reason is not None:
                    reasons[piece.index] = piece.finish_reason
        last.append(seen)
    expected = {n * i + end[0]: end for i, (ends, _, _) in enumerate(several) for end in ends}
    assert texts == {index: end[1] for index, end in expected.items()}
    assert tokens == {index: end[2] for index, end in expected.items()}
    assert reasons.keys() == expected.keys()
    told = usage(last)
    assert told.prompt_tokens == 2 * len(several)
    assert told.prompt_tokens_details.cached_tokens == len(several)
    assert told.completion_tokens == sum(map(len, tokens.values()))
    assert told.total_tokens == told.prompt_tokens + told.completion_tokens


@given(story=stories())
def test_offsets_of_a_stream_are_those_of_the_whole_answer(story):
    """Where a token begins does not depend on how much of the text was held back before it."""
    ends, looks, early = story
    seen = [output("request", ends, share, early) for share in [*looks, 1]]
    growth, streamed = Growth(["request"], 3), CompletionAnswer("a", "tiny", 3, None)
    offsets = {index: [] for index, *_ in ends}
    for each in seen:
        for piece in growth.pieces(each):
            (choice,) = streamed.grown(piece).choices
            offsets[piece.index] += choice.logprobs.text_offset
    whole = CompletionAnswer("b", "tiny", 3, None).whole(seen[-1:])
    assert offsets == {choice.index: choice.logprobs.text_offset for choice in whole.choices}
