"""A request as the scheduler sees it: a group of sequences of token ids.

Owns which tokens exist and how many of them are in the KV cache.  Where they lie in the
cache is the block manager's knowledge, what they spell is the engine's.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Literal

import numpy as np

from minipaged.request.sampling_params import SamplingParams

RequestId = str
SequenceId = int
FinishReason = Literal["stop", "length", "abort"]


class Status(enum.Enum):
    """Where a sequence group stands; preemption makes it WAITING or SWAPPED (section 4.5)."""

    WAITING = "waiting"  # it holds no block
    SWAPPED = "swapped"  # it waits, and its blocks lie in the host pool
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Token ids of one prompt and one of its outputs.

    The first `num_computed_tokens` tokens have their keys and values in the cache.  Every
    step computes some of the others, in order.  The last token of a decoding sequence was
    sampled by the step before and is computed by the next one, so that a finished sequence
    never needs a slot for its last token.
    """

    __slots__ = (
        "_random",
        "_random_key",
        "cache_salt",
        "num_computed_tokens",
        "num_prompt_tokens",
        "resume_from",
        "seq_id",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: SequenceId,
        prompt_token_ids: Iterable[int],
        random_key: tuple[int, ...] = (0,),
        cache_salt: bytes = b"",
    ) -> None:
        self.seq_id = seq_id
        self.cache_salt = cache_salt
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        # The sibling that held the same blocks before a preemption, and for how many tokens.
        self.resume_from: tuple[SequenceId, int] | None = None
        self._random_key = random_key
        self._random: np.random.Generator | None = None

    @property
    def random(self) -> np.random.Generator:
        """A stream of its own, one draw per token: what others do cannot change its tokens."""
        if self._random is None:
            # As a path, since plain numbers are filled up with zeros: (0, 1) would be (0, 1, 0).
            seed, *path = self._random_key
            self._random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=path))
        return self._random

    def fork(self, seq_id: SequenceId, random_key: tuple[int, ...] = (0,)) -> Sequence:
        """A sequence with the same tokens so far and a random stream of its own."""
        child = Sequence(seq_id, self.token_ids, random_key, self.cache_salt)
        child.num_prompt_tokens = self.num_prompt_tokens
        child.num_computed_tokens = self.num_computed_tokens
        return child

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """How many tokens were generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that wait for a step: the prompt at first, one while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    def __repr__(self) -> str:
        return f"Sequence {self.seq_id}: {self.num_computed_tokens}/{len(self.token_ids)} computed"


class SequenceGroup:
    """All sequences of one request, preempted and resumed together (section 4.5).

    It begins with one sequence, the prompt.  When the prompt is computed it forks into the
    samples or beams of the request; those that end leave it.
    arrival: counts requests from 0.
    has_forked: its prompt became its samples; means nothing to a beam search, which forks at
        every step.
    priority: 0 is the most urgent; how it bears on the order of service is `policy.py`'s.
    was_recomputed: it lost its blocks to others at least once.
    """

    __slots__ = (
        "arrival",
        "has_forked",
        "params",
        "priority",
        "request_id",
        "sequences",
        "status",
        "was_recomputed",
    )

    def __init__(
        self,
        request_id: RequestId,
        sequences: list[Sequence],
        params: SamplingParams,
        arrival: int,
        priority: int = 0,
    ) -> None:
        self.request_id = request_id
        self.sequences = sequences
        self.params = params
        self.arrival = arrival
        self.priority = priority
        self.status = Status.WAITING
        self.has_forked = params.width == 1
        self.was_recomputed = False

    @property
    def num_seats(self) -> int:
        """Sequences that may run at a time from now on: what it counts for in a batch."""
        if self.has_forked and not self.params.use_beam_search:
            return len(self.sequences)
        return self.params.width

    def __repr__(self) -> str:
        return f"SequenceGroup {self.request_id!r} ({self.status.value}): {self.sequences}"
