"""How many of its next tokens each sequence computes in a step.

Every running sequence gets one token.  What the step can compute beyond that goes to those
that are behind: prompts, whole or in chunks, and groups that come back from a recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minipaged.memory.block_manager import BlockManager
from minipaged.memory.block_table import BlockCopy
from minipaged.request.sequence import RequestId, Sequence, SequenceGroup
from minipaged.scheduling.step_plan import ScheduledSequence, StepPlan

Chunk = tuple[Sequence, int]
"""A sequence and how many of its next tokens a step computes."""


@dataclass
class Draft:
    """A StepPlan in the making.

    spare: tokens that the step can compute beyond one for each running sequence.
    """

    spare: int
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    swap_out: list[BlockCopy] = field(default_factory=list)
    swap_in: list[BlockCopy] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    preempted: list[RequestId] = field(default_factory=list)
    swapped: list[RequestId] = field(default_factory=list)

    def finish(self) -> StepPlan:
        """The plan."""
        return StepPlan(
            tuple(self.scheduled),
            tuple(self.swap_out),
            tuple(self.swap_in),
            tuple(self.copies),
            tuple(self.preempted),
            tuple(self.swapped),
        )


def next_chunks(
    group: SequenceGroup, draft: Draft, manager: BlockManager
) -> tuple[list[Chunk], int]:
    """The next tokens of every sequence of a running group, and their number."""
    raise NotImplementedError("Task 11.1: next_chunks is still to be written")


def _catch_up(sequences: list[Sequence], allowed: int, manager: BlockManager) -> list[Chunk]:
    """Chunks of a group that was preempted by recomputation while it had several sequences.

    Each is computed but for its last token, so that all draw their next one together, as a
    beam search must.  One after the other, since each begins with the blocks that it shared
    with an earlier one.
    """
    raise NotImplementedError("Task 11.2: _catch_up is still to be written")
