"""Iteration-level scheduling, first come first served (sections 2.3 and 4.5).

Before every step it decides which sequence groups run and how many tokens each of them
computes.  Running groups come first, oldest first; when no block is left, the group that
arrived last loses all of its blocks.  Waiting groups are admitted in order of arrival, and
only into room that is free.  The scheduler asks the block manager for slots; it never sees
a tensor, and the tokens it hands out are plain numbers.
"""

from __future__ import annotations

from collections import deque

from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.block_table import BlockCopy
from minipaged.request.sequence import RequestId, Sequence, SequenceGroup, Status
from minipaged.scheduling.preemption import preempt_by_recomputation
from minipaged.scheduling.step_plan import ScheduledSequence, StepPlan


class Scheduler:
    """Turns queues of sequence groups into one StepPlan after the other.

    Both queues are in order of arrival, and whoever runs arrived before whoever waits.
    max_num_seqs: sequences that run at a time.
    max_num_batched_tokens: tokens that one step computes; a longer prompt takes several
    steps, and since only the last running group can be in the middle of its prompt,
    decoding sequences never wait for the rest of it.
    """

    def __init__(
        self, manager: BlockManager, max_num_seqs: int = 256, max_num_batched_tokens: int = 2048
    ) -> None:
        if max_num_seqs < 1:
            raise ConfigurationError(
                f"max_num_seqs is {max_num_seqs}; at least 1 sequence has to run"
            )
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigurationError(
                f"max_num_batched_tokens is {max_num_batched_tokens}, below max_num_seqs "
                f"{max_num_seqs}; every running sequence needs one token a step, "
                "so raise the one or lower the other"
            )
        self.manager = manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[SequenceGroup] = deque()
        self.running: list[SequenceGroup] = []
        self.num_preemptions = 0

    def add(self, group: SequenceGroup, max_tokens_in_cache: int) -> None:
        """Queue a group whose sequences will hold at most this many tokens each in the cache.

        Refuses, with InvalidRequestError, what could never run (T6).
        """
        pool = self.manager.device.num_blocks
        needed = self.manager.blocks_for(max_tokens_in_cache) * len(group.sequences)
        if needed > pool:
            raise InvalidRequestError(
                f"request {group.request_id!r} may need {needed} blocks of "
                f"{self.manager.block_size} tokens and the whole pool has {pool}; shorten the "
                "prompt, lower max_tokens or raise num_blocks"
            )
        if len(group.sequences) > self.max_num_seqs:
            raise InvalidRequestError(
                f"request {group.request_id!r} has {len(group.sequences)} sequences and "
                f"max_num_seqs is {self.max_num_seqs}; ask for fewer or raise max_num_seqs"
            )
        self.waiting.append(group)

    @property
    def has_unfinished(self) -> bool:
        """Whether any group still waits or runs."""
        return bool(self.waiting or self.running)

    def schedule(self) -> StepPlan:
        """Plan the next step.  The block tables already count the tokens it will compute."""
        scheduled: list[ScheduledSequence] = []
        copies: list[BlockCopy] = []
        preempted: list[RequestId] = []
        budget = self.max_num_batched_tokens

        position = 0
        while position < len(self.running):
            chunks, num_tokens = next_chunks(self.running[position], budget)
            # n tokens never take more than n blocks, so that mostly there is room.
            if num_tokens > self.manager.device.num_free and not self._make_room(
                chunks, position, preempted
            ):
                break  # the group was the last one left and had to go itself
            self._take_slots(chunks, scheduled, copies)
            budget -= num_tokens
            position += 1

        # A step that took blocks away from someone has none to give to someone new.
        num_seqs = len(scheduled)
        while self.waiting and budget > 0 and not preempted:
            group = self.waiting[0]
            num_seqs += len(group.sequences)
            if num_seqs > self.max_num_seqs or not self._fits(group):
                break
            self.running.append(self.waiting.popleft())
            group.status = Status.RUNNING
            chunks, num_tokens = next_chunks(group, budget)
            self._take_slots(chunks, scheduled, copies)
            budget -= num_tokens

        return StepPlan(
            scheduled=tuple(scheduled), copies=tuple(copies), preempted=tuple(preempted)
        )

    def remove(self, group: SequenceGroup) -> None:
        """Take a finished or aborted group out of its queue and free its blocks."""
        if group.status is Status.WAITING:
            self.waiting.remove(group)
        else:
            self.running.remove(group)
        for sequence in group.sequences:
            self.manager.free(sequence.seq_id)
        group.status = Status.FINISHED

    def _make_room(self, chunks: list[Chunk], position: int, preempted: list[RequestId]) -> bool:
        """Preempt the latest arrivals until the chunks of running group `position` have blocks.

        Returns False if that group itself had to go, which can only be when it is the last.
        """
        manager = self.manager
        needed = sum(manager.blocks_needed(sequence.seq_id, n) for sequence, n in chunks)
        while needed > manager.device.num_free:
            victim = self.running.pop()
            preempt_by_recomputation(victim, manager)
            self.waiting.appendleft(victim)
            preempted.append(victim.request_id)
            self.num_preemptions += 1
            if position == len(self.running):
                return False
        return True

    def _fits(self, group: SequenceGroup) -> bool:
        """Whether free blocks suffice for all tokens the group has, though taken chunk by chunk."""
        tokens = (len(sequence.token_ids) for sequence in group.sequences)
        return sum(map(self.manager.blocks_for, tokens)) <= self.manager.device.num_free

    def _take_slots(
        self, chunks: list[Chunk], scheduled: list[ScheduledSequence], copies: list[BlockCopy]
    ) -> None:
        """Take the slots for these chunks and add them to the plan."""
        manager = self.manager
        for sequence, n in chunks:
            copy = manager.append(sequence.seq_id, n)
            if copy is not None:
                copies.append(copy)
            start = sequence.num_computed_tokens
            tokens = sequence.token_ids
            scheduled.append(
                ScheduledSequence(
                    sequence.seq_id,
                    tuple(tokens[start : start + n]),
                    start,
                    tuple(manager.tables[sequence.seq_id].blocks),
                    start + n == len(tokens),
                )
            )

    def check_integrity(self) -> None:
        """Assert, between two steps, that queues, statuses and block tables agree (T2, T6)."""
        arrivals = [group.arrival for group in (*self.running, *self.waiting)]
        assert arrivals == sorted(set(arrivals)), f"served out of order of arrival: {arrivals}"
        tables = dict(self.manager.tables)
        for group in self.running:
            assert group.status is Status.RUNNING, repr(group)
            for sequence in group.sequences:
                table = tables.pop(sequence.seq_id)
                assert table.num_tokens == sequence.num_computed_tokens, f"{sequence} but {table}"
        for group in self.running[:-1]:
            assert all(s.num_uncomputed_tokens == 1 for s in group.sequences), repr(group)
        for group in self.waiting:
            assert group.status is Status.WAITING, repr(group)
            assert all(sequence.num_computed_tokens == 0 for sequence in group.sequences)
        assert not tables, f"blocks held by sequences that do not run: {tables}"
        assert sum(len(group.sequences) for group in self.running) <= self.max_num_seqs
        self.manager.check_integrity()


Chunk = tuple[Sequence, int]
"""A sequence and how many of its next tokens a step computes."""


def next_chunks(group: SequenceGroup, budget: int) -> tuple[list[Chunk], int]:
    """The next tokens of every sequence of a group, as the budget allows, and their number."""
    chunks, num_tokens = [], 0
    for sequence in group.sequences:
        n = min(len(sequence.token_ids) - sequence.num_computed_tokens, budget - num_tokens)
        chunks.append((sequence, n))
        num_tokens += n
    return chunks, num_tokens
