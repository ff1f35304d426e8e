"""The control message of section 4.6: a StepPlan as numbers, and back.

Token ids and block tables are numbers already, so a message is one row of int64: no pickle, which
would run what it is sent.  The names of preempted requests stay behind: no rank but the first
knows of requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

from minipaged.memory.block_table import BlockCopy
from minipaged.scheduling.step_plan import ScheduledSequence, StepPlan

Message = Int[Tensor, " numbers"]


def encode_plan(plan: StepPlan) -> Message:
    """Every list behind its length: the sequences, then the blocks to swap out, in and copy."""
    raise NotImplementedError("Task 18.3: encode_plan is still to be written")


def decode_plan(message: Message) -> StepPlan:
    """The plan that was encoded, without the names of requests."""
    raise NotImplementedError("Task 18.3: decode_plan is still to be written")


def _decode_sequence(numbers: Iterator[int]) -> ScheduledSequence:
    raise NotImplementedError("Task 18.3: _decode_sequence is still to be written")


def _decode_pairs(numbers: Iterator[int]) -> tuple[BlockCopy, ...]:
    raise NotImplementedError("Task 18.3: _decode_pairs is still to be written")
