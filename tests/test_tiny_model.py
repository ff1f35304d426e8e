"""The shipped model: small, as good as its card says, and made by the script that is here."""

import math
import os
from pathlib import Path

import pytest
import torch

from minipaged.models.loader import TINY, load_decoder
from minipaged.models.tiny import train as tiny
from minipaged.models.tiny.checkpoint import save_checkpoint
from minipaged.models.tiny.evaluate import causal_attend, held_out_loss, nats_per_character

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("MINIPAGED_DATA", ROOT.parent / "shared" / "data"))


def test_it_is_at_most_8_mb():
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) <= 8_000_000


def test_it_is_what_the_script_makes():
    decoder, tokenizer = load_decoder("tiny")
    assert decoder.config == tiny.CONFIG
    assert tokenizer.vocab_size == tiny.CONFIG.vocab_size


@pytest.mark.slow
def test_held_out_loss():
    """At most 1.60 nats per character over the last tenth of the text, with the stored weights."""
    text = DATA / "tinyshakespeare.txt"
    if not text.exists():
        pytest.skip(f"{text} is not there; set MINIPAGED_DATA to the directory that holds it")
    loss = held_out_loss(text.read_text("utf-8"))
    print(f"{loss:.4f} nats per character")
    assert loss <= 1.60
    card = (TINY / "README.md").read_text("utf-8")
    assert f"**{loss:.3f} nats per character**" in card


def test_every_token_is_predicted_once():
    """A uniform model is log(vocabulary) off at every token but the first."""

    class Uniform:
        config = tiny.CONFIG

        def __call__(self, tokens, positions, attend):
            return torch.zeros(len(tokens), 1024)

    for tokens in (1, 2, 255, 256, 257, 512, 513, 768, 769, 3333):
        expected = (tokens - 1) * math.log(1024) / 999
        assert nats_per_character(Uniform(), [7] * tokens, 999) == pytest.approx(expected)


def test_training_learns_and_saves_what_it_learned(tmp_path):
    text = "the cat sat on the mat and the dog sat on the log. " * 60
    tokenizer = tiny.train_tokenizer(text, 280)
    config = tiny.dataclasses.replace(
        tiny.CONFIG,
        vocab_size=280,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=48,
        max_positions=24,
    )
    losses = []
    decoder = tiny.train(
        torch.tensor(tokenizer.encode(text).ids),
        config,
        tiny.Recipe(minutes=2, batch_size=4, learning_rate=1e-2),
        max_steps=40,
        report=lambda step, done, loss, average: losses.append(loss),
    )
    assert losses[-1] < 0.6 * losses[0]
    save_checkpoint(decoder, tokenizer, tmp_path)
    loaded, _ = load_decoder(tmp_path, torch.float32)
    tokens = torch.arange(20)
    with torch.inference_mode():
        expected = decoder(tokens, tokens, causal_attend(1))
        actual = loaded(tokens, tokens, causal_attend(1))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
