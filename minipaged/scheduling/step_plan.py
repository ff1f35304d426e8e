"""One iteration as plain data: all that crosses from the scheduler to the model runner.

The paper's control message (section 4.6): token ids and block tables.  It holds numbers
only, so that a plan can be printed, drawn, replayed, simulated or sent to other ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from minipaged.memory.block_allocator import BlockId
from minipaged.memory.block_table import BlockCopy
from minipaged.request.sequence import RequestId, SequenceId


class ScheduledSequence(NamedTuple):
    """The next tokens of one sequence, a prompt, a part of it or one decoding token alike.

    token_ids: the tokens to compute, at positions num_computed_tokens and following.
    num_computed_tokens: tokens of the sequence that are in the cache before the step.
    block_table: physical block of every logical block, those for token_ids included.
    samples: whether token_ids reach the end of the sequence, so that its next token is drawn.
    """

    seq_id: SequenceId
    token_ids: tuple[int, ...]
    num_computed_tokens: int
    block_table: tuple[BlockId, ...]
    samples: bool

    @property
    def context_length(self) -> int:
        """Tokens in the cache after the step."""
        return self.num_computed_tokens + len(self.token_ids)


class StepPlan(NamedTuple):
    """What one step does, in this order: swap out, swap in, copy, then the forward pass.

    Each pair is (source, destination): device and host block, host and device block, and
    two device blocks.
    preempted: requests that lost their device blocks to this step.
    swapped: those of them whose blocks moved to the host; the others will be recomputed.
    """

    scheduled: tuple[ScheduledSequence, ...] = ()
    swap_out: tuple[BlockCopy, ...] = ()
    swap_in: tuple[BlockCopy, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    preempted: tuple[RequestId, ...] = ()
    swapped: tuple[RequestId, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model in this step."""
        return sum(len(item.token_ids) for item in self.scheduled)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.scheduled and not self.swap_in and not self.swap_out

    def to_dict(self) -> dict[str, Any]:
        """The plan in types that JSON knows."""
        plan = self._asdict()
        plan["scheduled"] = [item._asdict() for item in self.scheduled]
        return plan

    @classmethod
    def from_dict(cls, plan: dict[str, Any]) -> StepPlan:
        """The inverse of `to_dict`, also after a way through JSON, where tuples become lists."""

        def restore(item: dict[str, Any]) -> ScheduledSequence:
            tuples: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in item.items()
            }
            return ScheduledSequence(**tuples)

        return cls(
            scheduled=tuple(restore(item) for item in plan["scheduled"]),
            swap_out=tuple(BlockCopy(*pair) for pair in plan["swap_out"]),
            swap_in=tuple(BlockCopy(*pair) for pair in plan["swap_in"]),
            copies=tuple(BlockCopy(*pair) for pair in plan["copies"]),
            preempted=tuple(plan["preempted"]),
            swapped=tuple(plan["swapped"]),
        )


def default_budget(max_num_seqs: int, block_size: int, static_slots: int = 0) -> int:
    """Tokens that one step computes at most, where nobody asks for another limit.

    static_slots: of the cache under static batches, all prompts of which are computed together.
    """
    return max(2048, max_num_seqs, block_size, static_slots)
