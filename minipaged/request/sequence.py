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
    """Where a sequence group stands.  A preempted group is WAITING again (section 4.5)."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Token ids of one prompt and one of its outputs.

    The first `num_computed_tokens` tokens have their keys and values in the cache.  Every
    step computes some of the others, in order.  The last token of a decoding sequence was
    sampled by the step before and is computed by the next one, so that a finished sequence
    never needs a slot for its last token.
    """

    __slots__ = ("num_computed_tokens", "num_prompt_tokens", "random", "seq_id", "token_ids")

    def __init__(
        self,
        seq_id: SequenceId,
        prompt_token_ids: Iterable[int],
        random_key: tuple[int, ...] = (0,),
    ) -> None:
        self.seq_id = seq_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        # A stream of its own, one draw per token: what others do cannot change its tokens.
        self.random = np.random.default_rng(random_key)

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

    `arrival` counts requests from 0; it is the order of service.
    """

    __slots__ = ("arrival", "params", "request_id", "sequences", "status")

    def __init__(
        self,
        request_id: RequestId,
        sequences: list[Sequence],
        params: SamplingParams,
        arrival: int,
    ) -> None:
        self.request_id = request_id
        self.sequences = sequences
        self.params = params
        self.arrival = arrival
        self.status = Status.WAITING

    def __repr__(self) -> str:
        return f"SequenceGroup {self.request_id!r} ({self.status.value}): {self.sequences}"
