"""What happens to a sequence group that has to make room: swapping or recomputation (section 4.5).

Owns the fate of the victim's blocks and tokens, and the choice between the two.  Who becomes
a victim, and where it queues afterwards, is the scheduler's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from minipaged.errors import ConfigurationError
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.block_table import BlockCopy
from minipaged.request.sequence import SequenceGroup, Status

PreemptionMode = Literal["recompute", "swap", "auto"]


@dataclass(frozen=True)
class PreemptionCosts:
    """What `auto` compares: seconds to move one block once, and to compute one token again.

    They are estimates, and only their ratio matters; `builder.py` says where they come from.
    """

    move_block: float = 1.0
    compute_token: float = 1.0


class Preemption:
    """Takes the device blocks of a group, all or nothing, and counts how often it did.

    `swap` and `auto` fall back on recomputation when the host pool is too full.
    """

    def __init__(
        self, mode: PreemptionMode = "recompute", costs: PreemptionCosts | None = None
    ) -> None:
        if mode not in get_args(PreemptionMode):
            raise ConfigurationError(
                f"preemption is {mode!r}; it must be one of {', '.join(get_args(PreemptionMode))}"
            )
        self.mode = mode
        self.costs = costs or PreemptionCosts()
        self.num_recomputations = 0
        self.num_swaps = 0

    def preempt(self, group: SequenceGroup, manager: BlockManager) -> list[BlockCopy]:
        """Free the group's device blocks; returns the device -> host copies of a swap."""
        if self._should_swap(group, manager):
            self.num_swaps += 1
            group.status = Status.SWAPPED
            return manager.swap_out([sequence.seq_id for sequence in group.sequences])
        self.num_recomputations += 1
        preempt_by_recomputation(group, manager)
        return []

    def _should_swap(self, group: SequenceGroup, manager: BlockManager) -> bool:
        if self.mode == "recompute":
            return False
        blocks = manager.num_blocks_held(sequence.seq_id for sequence in group.sequences)
        if blocks > manager.host.num_free:
            return False
        if self.mode == "swap":
            return True
        # Every block goes out and comes back; shared blocks hold tokens of several sequences,
        # and are computed once as well.  Behind a sliding window nothing is shared, and what was
        # dropped is computed again.
        tokens = sum(sequence.num_computed_tokens for sequence in group.sequences)
        if manager.sliding_window is None:
            tokens = min(tokens, blocks * manager.block_size)
        return 2 * blocks * self.costs.move_block < tokens * self.costs.compute_token


def preempt_by_recomputation(group: SequenceGroup, manager: BlockManager) -> None:
    """Give up every block of the group; its tokens are kept.

    When the group is resumed, prompt and generated tokens together are computed like one
    longer prompt.  No token is drawn a second time, so the output cannot change.  What
    sequences shared is noted, so that they can share it again: without that, a group might
    need more blocks to come back than it had, or than there are.
    """
    sequences = group.sequences
    for i, sequence in enumerate(sequences):
        if sequence.seq_id not in manager.tables:
            continue  # preempted again before it had its blocks back: the note still holds
        siblings = [other.seq_id for other in sequences[:i] if other.seq_id in manager.tables]
        shared = [(manager.num_shared_tokens(other, sequence.seq_id), other) for other in siblings]
        num_tokens, other = max(shared, default=(0, -1))
        sequence.resume_from = (other, num_tokens) if num_tokens else None
    for sequence in sequences:
        manager.free(sequence.seq_id)
        sequence.num_computed_tokens = 0
    group.status = Status.WAITING
    group.was_recomputed = True
