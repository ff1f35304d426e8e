"""Trains the shipped model: `python -m minipaged.models.tiny.train --text FILE`.

The network is the engine's own decoder; training only gives it another `attend`, one
without a cache.  The last tenth of the text is held out: neither tokenizer nor weights
learn from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from minipaged.models.config import ModelConfig
from minipaged.models.decoder import Decoder
from minipaged.models.tiny.checkpoint import save_checkpoint
from minipaged.models.tiny.evaluate import causal_attend, nats_per_character, split_text

CONTEXT = 512
END_OF_TEXT = "<|endoftext|>"
CONFIG = ModelConfig(
    family="llama",
    vocab_size=1024,
    hidden_size=256,
    num_layers=5,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    intermediate_size=640,
    max_positions=CONTEXT,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_ids=(0,),
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a run; the defaults made the shipped weights."""

    minutes: float = 28.0
    batch_size: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    warmup: float = 0.02  # share of the run
    averaging: float = 0.98  # decay of the running average of the weights, which is kept
    seed: int = 0


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any Unicode text has tokens, and they spell it exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def initialize(decoder: Decoder, config: ModelConfig) -> None:
    """Normal weights; projections that write to the residual stream start smaller."""
    for name, parameter in decoder.named_parameters():
        if parameter.dim() > 1:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            smaller = math.sqrt(2 * config.num_layers) if residual else 1.0
            nn.init.normal_(parameter, std=0.02 / smaller)


def add_dropout(decoder: Decoder, probability: float) -> None:
    """Drop elements of the embeddings and of whatever is added to the residual stream."""

    def drop(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.dropout(output, probability, module.training)

    for name, module in decoder.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def optimizers(decoder: Decoder, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for p in decoder.layers.parameters() if p.dim() == 2]
    others = [p for p in decoder.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def learning_rate_factor(done: float, warmup: float) -> float:
    """Linear rise during the warm-up, then linear fall to nothing; `done` is 0 to 1."""
    return min(1.0, (done + 1e-3) / warmup) * max(0.0, 1.0 - done)


def train(
    tokens: Tensor,
    config: ModelConfig,
    recipe: Recipe,
    max_steps: int | None = None,
    report: Callable[[int, float, float, Decoder], None] | None = None,
) -> Decoder:
    """Train on random windows of `tokens` until the time or the steps are used up.

    report(step, share of the run done, loss in nats per token, averaged decoder) is called
    after every step.  Returns the decoder with averaged weights.
    """
    torch.manual_seed(recipe.seed)
    decoder, average = Decoder(config), Decoder(config)
    initialize(decoder, config)
    average.load_state_dict(decoder.state_dict())
    add_dropout(decoder, recipe.dropout)
    steps = optimizers(decoder, recipe)
    length = min(config.max_positions, len(tokens) - 1)
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        for optimizer in steps:
            for group in optimizer.param_groups:
                factor = learning_rate_factor(done, recipe.warmup)
                group["lr"] = recipe.learning_rate * factor
        first = torch.randint(len(tokens) - length, (recipe.batch_size,))
        window = tokens[first[:, None] + torch.arange(length + 1)]
        with torch.autocast("cpu", torch.bfloat16):
            logits = decoder(
                window[:, :-1].flatten(),
                torch.arange(length).repeat(recipe.batch_size),
                causal_attend(recipe.batch_size),
            )
        loss = F.cross_entropy(logits.float(), window[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        decay = min(recipe.averaging, step / (step + 10))
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), decoder.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        elapsed = (time.monotonic() - start) / (60 * recipe.minutes)
        done = max(elapsed, step / max_steps if max_steps else 0.0)
        if report is not None:
            report(step, done, loss.item(), average)
    return average


def main() -> None:
    """Command line: train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="plain text to learn")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    for field in dataclasses.fields(Recipe):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
        )
    arguments = vars(parser.parse_args())
    text, out = arguments.pop("text").read_text(encoding="utf-8"), arguments.pop("out")
    recipe = Recipe(**arguments)
    training, held_out = split_text(text)
    tokenizer = train_tokenizer(training, CONFIG.vocab_size)
    tokens = torch.tensor(tokenizer.encode(training).ids)
    print(f"{len(training)} characters are {len(tokens)} tokens")

    def held_out_loss(decoder: Decoder, share: int) -> float:
        sample = held_out[: len(held_out) // share]
        return nats_per_character(decoder, tokenizer.encode(sample).ids, len(sample))

    def report(step: int, done: float, loss: float, average: Decoder) -> None:
        if step % 50 == 0:
            print(f"step {step:5}  {done:6.1%}  {loss:.3f} nats/token", flush=True)
        if step % 250 == 0:
            print(f"a fifth of the held-out text: {held_out_loss(average, 5):.4f} nats/character")
            save_checkpoint(average, tokenizer, out)

    decoder = train(tokens, CONFIG, recipe, report=report)
    save_checkpoint(decoder, tokenizer, out)
    size = sum(parameter.numel() for parameter in decoder.parameters())
    print(f"{size} parameters, held out: {held_out_loss(decoder, 1):.4f} nats/character")


if __name__ == "__main__":
    main()
