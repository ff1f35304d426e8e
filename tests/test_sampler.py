"""Each sampling parameter against its formula, and the draws against the distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.decoding.sampler import Draw, penalized, sample, token_distribution
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence

# Logits on a coarse grid, so that ties are common and thresholds are not hit by rounding.
logit_rows = st.lists(st.integers(-12, 12).map(lambda i: i / 4), min_size=2, max_size=12)


def draw_of(params, prompt=(0,), output=(), key=(0,), ends=()):
    sequence = Sequence(0, prompt, key)
    sequence.token_ids += output
    return Draw(sequence, params, ends)


def softmax(values):
    weights = [math.exp(v - max(values)) for v in values]
    return [w / sum(weights) for w in weights]


def expected_distribution(logits, p):
    """vLLM's order, one token at a time: temperature, min_p, top_k, top_p."""
    probabilities = softmax([logit / p.temperature for logit in logits])
    likeliest = max(probabilities)
    kept = [q if q >= p.min_p * likeliest else 0.0 for q in probabilities]
    order = sorted(range(len(kept)), key=lambda i: (-kept[i], i))
    if p.top_k > 0:
        for i in order[p.top_k :]:
            kept[i] = 0.0
    if p.top_p < 1:
        total, mass = sum(kept), 0.0
        for i in order:
            if mass >= p.top_p * total:
                kept[i] = 0.0
            mass += kept[i]
    return [q / sum(kept) for q in kept]


@given(
    logits=logit_rows,
    temperature=st.sampled_from([0.25, 0.7, 1.0, 1.9]),
    top_k=st.integers(-1, 13),
    top_p=st.sampled_from([0.113, 0.371, 0.737, 0.913, 1.0]),
    min_p=st.sampled_from([0.0, 0.0517, 0.317, 1.0]),
)
def test_distribution_after_temperature_min_p_top_k_top_p(logits, temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    actual = token_distribution(torch.tensor([logits], dtype=torch.float64), [params])[0]
    np.testing.assert_allclose(actual, expected_distribution(logits, params), atol=1e-12)


@given(
    logits=logit_rows,
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=3),
    output=st.lists(st.integers(0, 1), max_size=5),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    presence=st.sampled_from([-1.0, 0.0, 0.6]),
    frequency=st.sampled_from([-0.5, 0.0, 0.4]),
)
def test_penalties(logits, prompt, output, repetition, presence, frequency):
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    expected = []
    for token, logit in enumerate(logits):
        if token in prompt + output:
            logit = logit / repetition if logit > 0 else logit * repetition
        count = output.count(token)
        expected.append(logit - frequency * count - presence * (count > 0))
    actual = penalized(
        torch.tensor(logits, dtype=torch.float64),
        torch.tensor(prompt + output),
        torch.tensor(output, dtype=torch.long),
        params,
    )
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@given(rows=st.lists(logit_rows, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_greedy_takes_the_first_of_the_largest(rows, seed):
    width = max(map(len, rows))
    logits = torch.tensor([row + [-99.0] * (width - len(row)) for row in rows])
    greedy = SamplingParams(temperature=0, seed=seed)
    tokens = sample(logits, [draw_of(greedy, key=(seed,)) for _ in rows])
    assert [token.token_id for token in tokens] == [row.index(max(row)) for row in rows]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(options):
    """Chi-square at the level of one false alarm in 10,000, with a fixed seed."""
    from scipy.stats import chi2

    params = SamplingParams(**options)
    logits = torch.linspace(-2, 2, 10, dtype=torch.float64).roll(3)
    n = 20_000
    tokens = sample(logits.expand(n, -1), [draw_of(params, key=(11, i)) for i in range(n)])
    counts = np.bincount([token.token_id for token in tokens], minlength=10)
    expected = n * np.array(expected_distribution(logits.tolist(), params))
    possible = expected > 0
    assert counts[~possible].sum() == 0, "a token of probability 0 was drawn"
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic < chi2.ppf(1 - 1e-4, possible.sum() - 1)


def test_one_stream_also_follows_the_distribution():
    """Successive draws of one sequence, not only first draws of many."""
    draw = draw_of(SamplingParams(), key=(5,))
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64))
    counts = np.bincount([sample(logits, [draw])[0].token_id for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.1, 0.2, 0.3, 0.4], atol=0.03)


@given(
    rows=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=6, unique=True),
    order=st.randoms(use_true_random=False),
)
def test_a_sequence_draws_the_same_whoever_else_is_in_the_batch(rows, order):
    params = [SamplingParams(top_p=0.9), SamplingParams(temperature=0), SamplingParams(top_k=5)]
    torch.manual_seed(0)
    logits = torch.randn(len(rows), 20, dtype=torch.float64)

    def draws():
        return [draw_of(params[i % 3], key=(row,)) for i, row in enumerate(rows)]

    together = [token.token_id for token in sample(logits, draws())]
    alone = [
        sample(row, [draw])[0].token_id for row, draw in zip(logits.split(1), draws(), strict=True)
    ]
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    fresh = draws()
    permuted = sample(logits[shuffled], [fresh[i] for i in shuffled])
    assert together == alone
    assert [together[i] for i in shuffled] == [token.token_id for token in permuted]


def test_no_end_token_before_min_tokens():
    logits = torch.tensor([[0.0, 9.0, 5.0], [0.0, 9.0, 5.0]])
    params = SamplingParams(temperature=0, min_tokens=2)
    early, late = draw_of(params, output=[0], ends=(1,)), draw_of(params, output=[0, 0], ends=(1,))
    assert [token.token_id for token in sample(logits, [early, late])] == [2, 1]


@given(logits=logit_rows, num=st.integers(0, 20), temperature=st.sampled_from([0.0, 0.5, 2.0]))
def test_logprobs_are_the_models_own(logits, num, temperature):
    """Of the unpenalized logits at temperature 1, for the drawn token and the likeliest ones."""
    params = SamplingParams(temperature=temperature, logprobs=num, presence_penalty=1.5)
    draw = draw_of(params, output=[0])
    (token,) = sample(torch.tensor([logits], dtype=torch.float64), [draw])
    expected = np.log(softmax(logits))
    assert token.token_id in token.logprobs
    assert len(token.logprobs) in (min(num, len(logits)), min(num, len(logits)) + 1)
    for token_id, (logprob, rank) in token.logprobs.items():
        assert logprob == pytest.approx(expected[token_id])
        better = sum(logit > logits[token_id] for logit in logits)
        assert better < rank <= better + logits.count(logits[token_id])
    reported = sorted((v.logprob for v in token.logprobs.values()), reverse=True)[:num]
    np.testing.assert_allclose(reported, sorted(expected, reverse=True)[:num], atol=1e-12)


def test_the_batch_is_left_as_it_was():
    logits = torch.randn(3, 8)
    before = logits.clone()
    params = SamplingParams(repetition_penalty=1.5, min_tokens=4, top_k=2, logprobs=3)
    sample(logits, [draw_of(params, ends=(0,)) for _ in range(3)])
    assert torch.equal(logits, before)


def test_extreme_logits_draw_a_possible_token():
    logits = torch.tensor([[1e30, 0.0, -1e30], [-math.inf, -math.inf, 3.0]])
    params = SamplingParams(temperature=1e-9)
    tokens = sample(logits, [draw_of(params), draw_of(params)])
    assert [token.token_id for token in tokens] == [0, 2]


def test_a_tiny_top_p_keeps_the_likeliest_token():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    for top_p in (1e-46, 1e-300):
        kept = token_distribution(logits, [SamplingParams(top_p=top_p)])
        assert kept.tolist() == [[1, 0, 0, 0]]
