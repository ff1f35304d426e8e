"""Requests that come at their time: made up as the paper made them up.

Arrivals are a Poisson process.  Lengths are log-normal with the means of figure 11: the family
is the usual one for lengths of texts, positive and with a long tail like the histograms of that
figure.  Its spread has to be guessed, since the paper prints no variance.  Where memory is full,
though, a mean batch of 7.00 requests that hold 20.4 % of 15,700 slots (figures 13a and 2), or
of 30.42 that hold all (figure 13a), means 457 or 516 tokens per running request: so a spread of
the logarithm of 0.75 or 0.86.  0.8 lies between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minipaged.errors import ConfigurationError

SPREAD = 0.8  # standard deviation of the logarithm of a length


class TimedRequest(NamedTuple):
    """One request of a simulation.

    arrival: seconds since the beginning.
    prompt, output: tokens.
    prefix: parts of the prompt that other requests may begin with as well, from its beginning:
        (id, tokens) each.
    """

    arrival: float
    prompt: int
    output: int
    prefix: tuple[tuple[int, int], ...] = ()

    @property
    def token_ids(self) -> list[int]:
        """A prompt that begins like another one exactly as far as the prefixes are the same."""
        tokens = [id_ + 1 for id_, length in self.prefix for _ in range(length)][: self.prompt]
        return tokens + [0] * (self.prompt - len(tokens))


@dataclass(frozen=True)
class Dataset:
    """Mean lengths in tokens (figure 11)."""

    prompt: float
    output: float


DATASETS = {"sharegpt": Dataset(161.31, 337.99), "alpaca": Dataset(19.31, 58.45)}


def dataset_named(name: str) -> Dataset:
    """The dataset of this name; ConfigurationError if there is none."""
    if name not in DATASETS:
        raise ConfigurationError(f"there is no dataset {name!r}; choose {', '.join(DATASETS)}")
    return DATASETS[name]


def draw_lengths(mean: float, count: int, longest: int, rng: np.random.Generator) -> list[int]:
    """Log-normal lengths of this mean, from 1 to `longest`; the cut lowers the mean a little."""
    lengths = rng.lognormal(math.log(mean) - SPREAD**2 / 2, SPREAD, count)
    return [int(length) for length in np.clip(np.rint(lengths), 1, longest)]


def poisson_requests(
    dataset: Dataset,
    rate: float,
    seconds: float,
    context_length: int,
    seed: int,
    prefix: tuple[tuple[int, int], ...] = (),
) -> Iterator[TimedRequest]:
    """Requests at `rate` per second for so many seconds; prompt and output fit the context.

    prefix: what every prompt begins with, before the tokens drawn.
    """
    check_rate(rate)
    rng = np.random.default_rng(seed)
    common = sum(length for _, length in prefix)
    half = (context_length - common) // 2
    time = 0.0
    while True:
        # A thousand at a time: the draws are those of one long list, the memory is not.
        gaps = rng.exponential(1 / rate, 1000)
        prompts = draw_lengths(dataset.prompt, 1000, half, rng)
        outputs = draw_lengths(dataset.output, 1000, half, rng)
        for gap, prompt, output in zip(gaps, prompts, outputs, strict=True):
            time += float(gap)
            if time > seconds:
                return
            yield TimedRequest(time, common + prompt, output, prefix)


def check_rate(rate: float) -> None:
    """Raises ConfigurationError unless requests come at all."""
    if not rate > 0 or math.isinf(rate):
        raise ConfigurationError(f"the rate is {rate:g} requests per second; it must be above 0")
