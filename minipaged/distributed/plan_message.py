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
    numbers = [len(plan.scheduled)]
    for item in plan.scheduled:
        numbers += (item.seq_id, item.num_computed_tokens, item.samples)
        numbers += (len(item.token_ids), *item.token_ids)
        numbers += (len(item.block_table), *item.block_table)
    for pairs in (plan.swap_out, plan.swap_in, plan.copies):
        numbers.append(len(pairs))
        for pair in pairs:
            numbers += pair
    return torch.tensor(numbers, dtype=torch.int64)


def decode_plan(message: Message) -> StepPlan:
    """The plan that was encoded, without the names of requests."""
    numbers = iter(message.tolist())
    scheduled = tuple(_decode_sequence(numbers) for _ in range(next(numbers)))
    swap_out, swap_in, copies = (_decode_pairs(numbers) for _ in range(3))
    return StepPlan(scheduled, swap_out, swap_in, copies)


def _decode_sequence(numbers: Iterator[int]) -> ScheduledSequence:
    seq_id, num_computed_tokens, samples = islice(numbers, 3)
    token_ids = tuple(islice(numbers, next(numbers)))
    block_table = tuple(islice(numbers, next(numbers)))
    return ScheduledSequence(seq_id, token_ids, num_computed_tokens, block_table, bool(samples))


def _decode_pairs(numbers: Iterator[int]) -> tuple[BlockCopy, ...]:
    return tuple(BlockCopy(next(numbers), next(numbers)) for _ in range(next(numbers)))
