"""The decoder sees a flat list of tokens; what it owes to none but attention is tested here."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import VOCAB, tiny_decoder

from minipaged.engine.naive import ContiguousCache
from minipaged.errors import ConfigurationError
from minipaged.models import rotary
from minipaged.models.config import ModelConfig, RopeConfig


@torch.inference_mode()
@given(tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), data=st.data())
def test_a_prompt_may_be_computed_in_any_chunks(tokens, data):
    """One code path: all at once, token by token, or anything in between (float64)."""
    decoder = tiny_decoder()
    positions = torch.arange(len(tokens))
    whole = decoder(torch.tensor(tokens), positions, ContiguousCache().attend)
    cache, start, parts = ContiguousCache(), 0, []
    while start < len(tokens):
        n = data.draw(st.integers(1, len(tokens) - start))
        chunk = torch.tensor(tokens[start : start + n])
        parts.append(decoder(chunk, positions[start : start + n], cache.attend))
        start += n
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-11)


@torch.inference_mode()
def test_logits_only_where_they_are_wanted():
    decoder, tokens = tiny_decoder(), torch.arange(9)
    every = decoder(tokens, tokens, ContiguousCache().attend)
    rows = torch.tensor([8, 2])
    some = decoder(tokens, tokens, ContiguousCache().attend, logits_at=rows)
    torch.testing.assert_close(some, every[rows])


@given(positions=st.lists(st.integers(0, 63), min_size=1, max_size=5), half=st.integers(1, 6))
def test_rotation_turns_each_pair_by_its_angle(positions, half):
    """Against complex multiplication: pair (a, b) is a + ib, turned by exp(i angle)."""
    rope, head_dim = RopeConfig(theta=100.0), 2 * half
    table = rotary.rotation_table(rope, head_dim, 64, torch.float64)
    heads = torch.randn(len(positions), 3, head_dim, dtype=torch.float64)
    turned = rotary.rotate(heads, *rotary.look_up(table, torch.tensor(positions)))
    for row, position in enumerate(positions):
        for i in range(half):
            angle = position * 100.0 ** (-2 * i / head_dim)
            pair = torch.complex(heads[row, :, i], heads[row, :, i + half])
            expected = pair * complex(math.cos(angle), math.sin(angle))
            actual = torch.complex(turned[row, :, i], turned[row, :, i + half])
            torch.testing.assert_close(actual, expected)


def test_scores_depend_on_distance_alone():
    table = rotary.rotation_table(RopeConfig(), 16, 200, torch.float64)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        at = [rotary.look_up(table, torch.tensor([p])) for p in (i, j)]
        return (rotary.rotate(q, *at[0]) * rotary.rotate(k, *at[1])).sum()

    torch.testing.assert_close(score(5, 2), score(150, 147))


def test_scaled_frequencies():
    plain = rotary.inverse_frequencies(RopeConfig(theta=500.0), 32)
    linear = rotary.inverse_frequencies(RopeConfig(500.0, "linear", 4.0), 32)
    torch.testing.assert_close(linear, plain / 4)
    llama3 = rotary.inverse_frequencies(RopeConfig(500.0, "llama3", 8.0, 1.0, 4.0, 64), 32)
    turns = 64 * plain / (2 * math.pi)
    torch.testing.assert_close(llama3[turns > 4], plain[turns > 4])
    torch.testing.assert_close(llama3[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert (llama3[between] < plain[between]).all()
    assert (llama3[between] > plain[between] / 8).all()


def config(**changes):
    sizes = {"vocab_size": 4, "hidden_size": 4, "num_layers": 1, "num_heads": 2}
    sizes |= {"num_kv_heads": 2, "head_dim": 2, "intermediate_size": 4, "max_positions": 8}
    return ModelConfig(family="llama", **(sizes | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_heads": 3}, "3 query heads cannot share 2 key-value heads"),
        ({"head_dim": 3}, "head_dim must be even, not 3"),
    ],
)
def test_descriptions_that_cannot_be(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        config(**changes)


def test_kv_bytes_of_the_paper():
    """Section 3: the KV cache of one token of OPT-13B takes 800 KB."""
    opt_13b = config(num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128)
    assert opt_13b.kv_bytes_per_token(2) == 800 * 1024
