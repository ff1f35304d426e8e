"""What happens to a sequence group that has to make room (section 4.5).

Owns the fate of the victim's blocks and tokens.  Who becomes a victim, and where it queues
afterwards, is the scheduler's business.
"""

from __future__ import annotations

from minipaged.memory.block_manager import BlockManager
from minipaged.request.sequence import SequenceGroup, Status


def preempt_by_recomputation(group: SequenceGroup, manager: BlockManager) -> None:
    """Give up every block of the group, all or nothing; its tokens are kept.

    When the group is resumed, prompt and generated tokens together are computed like one
    longer prompt.  No token is drawn a second time, so the output cannot change.
    """
    for sequence in group.sequences:
        manager.free(sequence.seq_id)
        sequence.num_computed_tokens = 0
    group.status = Status.WAITING
