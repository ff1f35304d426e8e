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

    def token_ids(self, own: int) -> list[int]:
        """A prompt that begins like another one exactly as far as the prefixes are the same.

        own: a token below 0 that no other request has, for all behind the prefixes.
        """
        tokens = [id_ for id_, length in self.prefix for _ in range(length)][: self.prompt]
        return tokens + [own] * (self.prompt - len(tokens))


@dataclass(frozen=True)
class Dataset:
    """Mean lengths in tokens (figure 11)."""

    prompt: float
    output: float


DATASETS = {
    "sharegpt": Dataset(161.31, 337.99),
    "alpaca": Dataset(19.31, 58.45),
    # One sentence and its translation, about as long as those of WMT16; the paper gives no means.
    "translation": Dataset(30, 35),
}

# Tokens of the examples that every prompt of a translation begins with (section 6.4).
SHOTS = {"translation-1": 80, "translation-5": 341}

# A chat keeps the last 1,024 tokens of what was said before, and answers with 1,024 at most
# (section 6.5).  How often two have spoken before is not said: here up to 7 times, all alike.
CHAT_TOKENS = 1024
CHAT_ROUNDS = 8


def dataset_named(name: str) -> Dataset:
    """The dataset of this name; ConfigurationError if there is none."""
    if name not in DATASETS:
        raise ConfigurationError(f"there is no dataset {name!r}; choose {', '.join(DATASETS)}")
    return DATASETS[name]


def check_workload(name: str) -> None:
    """Raise ConfigurationError unless poisson_requests knows requests of this name."""
    names = ["sharegpt", "alpaca", *SHOTS, "chat"]
    if name not in names:
        raise ConfigurationError(f"there is no dataset {name!r}; choose {', '.join(names)}")


def draw_lengths(mean: float, count: int, longest: int, rng: np.random.Generator) -> list[int]:
    """Log-normal lengths from 1 to `longest`, of this mean once those above are cut.

    A mean above half of `longest` is the mean before they are cut: else most would be alike.
    """
    location = math.log(mean) - SPREAD**2 / 2
    if mean <= longest / 2:
        low, high = location, math.log(longest)
        while high - low > 1e-6:
            location = (low + high) / 2
            low, high = (location, high) if _cut_mean(location, longest) < mean else (low, location)
    lengths = rng.lognormal(location, SPREAD, count)
    return [int(length) for length in np.clip(np.rint(lengths), 1, longest)]


def _cut_mean(location: float, longest: int) -> float:
    """Mean of the smaller of a log-normal number and `longest`."""

    def below(z: float) -> float:
        return (1 + math.erf(z / math.sqrt(2))) / 2

    z = (math.log(longest) - location) / SPREAD
    return math.exp(location + SPREAD**2 / 2) * below(z - SPREAD) + longest * (1 - below(z))


def poisson_requests(
    workload: str, rate: float, seconds: float, context_length: int, seed: int
) -> Iterator[TimedRequest]:
    """Requests at `rate` per second for so many seconds; prompt and output fit the context.

    workload: a dataset, "translation-1" or "translation-5" with so many examples in front of
        every prompt, or "chat".
    Raises ConfigurationError where the examples leave no room for anything else.
    """
    check_rate(rate)
    shots = SHOTS.get(workload, 0)
    prefix = ((0, shots),) if shots else ()
    dataset = dataset_named({"chat": "sharegpt"}.get(workload, workload.partition("-")[0]))
    rng = np.random.default_rng(seed)
    half = CHAT_TOKENS if workload == "chat" else (context_length - shots) // 2
    if half < 1:
        raise ConfigurationError(
            f"every prompt of {workload} begins with {shots} tokens, and a request may have "
            f"{context_length}; choose another dataset, or a longer context"
        )
    time = 0.0
    while True:
        # A thousand at a time, so that an hour of them needs no memory.
        gaps = rng.exponential(1 / rate, 1000)
        prompts = np.array(draw_lengths(dataset.prompt, 1000, half, rng))
        outputs = draw_lengths(dataset.output, 1000, half, rng)
        if workload == "chat":
            prompts = np.minimum(prompts + _histories(dataset, 1000, rng), CHAT_TOKENS - 1)
        for gap, prompt, output in zip(gaps, prompts.tolist(), outputs, strict=True):
            time += float(gap)
            if time > seconds:
                return
            yield TimedRequest(time, shots + prompt, output, prefix)


def _histories(dataset: Dataset, count: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens that were said before each of so many prompts of a chat."""
    said = [
        draw_lengths(mean, count * (CHAT_ROUNDS - 1), CHAT_TOKENS, rng)
        for mean in (dataset.prompt, dataset.output)
    ]
    rounds = np.sum(said, axis=0).reshape(count, CHAT_ROUNDS - 1).cumsum(axis=1)
    before = np.concatenate((np.zeros((count, 1), dtype=np.int64), rounds), axis=1)
    return before[np.arange(count), rng.integers(CHAT_ROUNDS, size=count)]


def check_rate(rate: float) -> None:
    """Raises ConfigurationError unless requests come at all."""
    if not rate > 0 or math.isinf(rate):
        raise ConfigurationError(f"the rate is {rate:g} requests per second; it must be above 0")
