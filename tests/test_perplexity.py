"""Paging does not change what a model knows: its loss on a text is that of transformers."""

import math

import pytest
import torch

from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.evaluation.perplexity import Float8Rounding, measure_losses, paged_loss, read_text
from minipaged.models.loader import load_decoder
from minipaged.models.tiny.evaluate import causal_attend

TEXT = "ROMEO:\nWhat say you to this part of my discourse, good sir?\n\nJULIET:\nI know not.\n" * 9


@pytest.mark.peer
def test_losses_are_those_of_transformers():
    losses = measure_losses("tiny", TEXT, [torch.float32, torch.bfloat16], 200, "torch", True)
    nats = {(loss.dtype, loss.system): loss.nats for loss in losses}
    assert nats["float32", "paged"] == pytest.approx(nats["float32", "transformers"], abs=1e-5)
    assert nats["bfloat16", "paged"] == pytest.approx(nats["bfloat16", "transformers"], abs=5e-3)
    for dtype in ("float32", "bfloat16"):
        rounded, exact = nats[dtype, "paged, 8-bit cache"], nats[dtype, "paged"]
        assert rounded != exact, "the 8-bit cache rounds"
        assert rounded == pytest.approx(exact, abs=0.02)
    assert losses[0].perplexity == math.exp(losses[0].nats)


@pytest.mark.parametrize("attention", ["torch", "reference"])
@pytest.mark.parametrize("length", [2, 100, 101, 250])
def test_chunks_and_blocks_do_not_matter(attention, length):
    decoder, tokenizer = load_decoder("tiny", torch.float64)
    tokens = torch.tensor(tokenizer.encode(TEXT)[:length])
    with torch.inference_mode():
        logits = decoder(tokens, torch.arange(length), causal_attend(1))
    expected = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
    assert paged_loss(decoder, tokens, attention, None) == pytest.approx(expected.item(), rel=1e-6)


def test_an_8_bit_cache_holds_8_bit_numbers():
    keys, values = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)
    key = torch.tensor([[[0.3, 1.0, -17.5, 448.0]]])
    Float8Rounding().write(keys, values, torch.tensor([1]), key, key)
    # Three bits behind the leading one: 0.3 lies between 0.28125 and 0.3125.
    assert keys[0, 1, 0].tolist() == values[0, 1, 0].tolist() == [0.3125, 1.0, -18.0, 448.0]


def test_mistakes(tmp_path):
    with pytest.raises(ConfigurationError, match=r"--window is 1; .* from 2 to .* 512"):
        measure_losses("tiny", TEXT, [torch.float32], 1, "torch", False)
    with pytest.raises(InvalidRequestError, match="the text has 0 tokens; at least 2"):
        measure_losses("tiny", "", [torch.float32], 100, "torch", False)
    with pytest.raises(ConfigurationError, match="--last is 2; it must be above 0"):
        read_text(tmp_path / "text", 2)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_text(tmp_path / "text", 0.5)
