"""Iteration-level scheduling (sections 2.3, 4.5 and 4.6).

Before every step it decides which sequence groups run and how many tokens each of their
sequences computes.  Running groups come first, in the order of the policy; when no block is
left, the last of them is preempted, whole.  Waiting groups are admitted in the same order,
and only into room that is free.  The scheduler asks the block manager for slots; it never
sees a tensor, and the tokens it hands out are plain numbers.
"""

from __future__ import annotations

from bisect import insort

from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.memory.block_manager import BlockManager
from minipaged.request.sequence import Sequence, SequenceGroup, SequenceId, Status
from minipaged.scheduling.chunks import Chunk, Draft, next_chunks
from minipaged.scheduling.policy import Policy, first_come_first_served
from minipaged.scheduling.preemption import Preemption
from minipaged.scheduling.step_plan import ScheduledSequence, StepPlan


class Scheduler:
    """Turns queues of sequence groups into one StepPlan after the other.

    Both queues are in the order of the policy.  A swapped group waits in its place among the
    others that wait.
    max_num_seqs: sequences that run at a time.
    max_num_batched_tokens: tokens that one step computes, at least one for each running
        sequence.  What is left goes to prompts, so that a long one takes several steps
        (chunked prefill) and those who decode never wait for it.
    static_batches: admit nobody until all who run have ended, as was usual before Orca.
    """

    def __init__(
        self,
        manager: BlockManager,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        policy: Policy = first_come_first_served,
        preemption: Preemption | None = None,
        static_batches: bool = False,
    ) -> None:
        if max_num_seqs < 1:
            raise ConfigurationError(
                f"max_num_seqs is {max_num_seqs}; at least 1 sequence has to run"
            )
        for name, least, why in (
            ("max_num_seqs", max_num_seqs, "every running sequence needs one token a step"),
            ("block_size", manager.block_size, "a chunk of a prompt should fill a block"),
        ):
            if max_num_batched_tokens < least:
                raise ConfigurationError(
                    f"max_num_batched_tokens is {max_num_batched_tokens}, below {name} {least}; "
                    f"{why}, so raise the one or lower the other"
                )
        self.manager = manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.policy = policy
        self.preemption = preemption or Preemption()
        self.static_batches = static_batches
        self.waiting: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []

    @property
    def num_preemptions(self) -> int:
        """Groups preempted so far, by recomputation or swapping."""
        return self.preemption.num_recomputations + self.preemption.num_swaps

    def add(self, group: SequenceGroup, max_tokens_in_cache: int) -> None:
        """Queue a group whose sequences will hold at most this many tokens each in the cache.

        Refuses, with InvalidRequestError, what could never run (T6).
        """
        manager, first = self.manager, group.sequences[0]
        pool, prompt = manager.device.num_blocks, len(first.token_ids)
        needed = manager.most_blocks(
            prompt, max_tokens_in_cache, group.num_seats, self.max_num_batched_tokens
        )
        if needed > pool:
            raise InvalidRequestError(
                f"request {group.request_id!r} may need {needed} blocks of "
                f"{manager.block_size} tokens and the whole pool has {pool}; shorten the "
                "prompt, lower max_tokens, n or the beam width, or raise num_blocks"
            )
        if group.num_seats > self.max_num_seqs:
            raise InvalidRequestError(
                f"request {group.request_id!r} has {group.num_seats} sequences and "
                f"max_num_seqs is {self.max_num_seqs}; ask for fewer or raise max_num_seqs"
            )
        manager.expect(first.seq_id, prompt, max_tokens_in_cache, group.num_seats)
        insort(self.waiting, group, key=self.policy)

    @property
    def _num_sequences(self) -> int:
        """Sequences that run."""
        return sum([len(group.sequences) for group in self.running])

    @property
    def has_unfinished(self) -> bool:
        """Whether any group still waits or runs."""
        return bool(self.waiting or self.running)

    def schedule(self) -> StepPlan:
        """Plan the next step.  The block tables already count the tokens it will compute."""
        raise NotImplementedError("Task 6.4: Scheduler.schedule is still to be written")

    def fork(self, group: SequenceGroup, parent_id: SequenceId, child: Sequence) -> None:
        """Add a child that shares the blocks of a sequence of the group (section 4.4)."""
        self.manager.fork(parent_id, child.seq_id)
        group.sequences.append(child)

    def drop(self, group: SequenceGroup, sequence: Sequence) -> None:
        """Take one sequence out of its group and let go of its blocks."""
        group.sequences.remove(sequence)
        self.manager.free(sequence.seq_id)

    def remove(self, group: SequenceGroup) -> None:
        """Take a finished or aborted group out of its queue and free its blocks."""
        raise NotImplementedError("Task 6.4: Scheduler.remove is still to be written")

    def _make_room(self, chunks: list[Chunk], position: int, draft: Draft) -> bool:
        """Preempt the last groups until the chunks of running group `position` have blocks.

        Returns False if that group itself had to go, which can only be when it is the last.
        """
        manager = self.manager
        needed = manager.blocks_needed((sequence.seq_id, n) for sequence, n in chunks)
        while needed > manager.device.num_free:
            victim = self.running.pop()
            draft.swap_out += self.preemption.preempt(victim, manager)
            insort(self.waiting, victim, key=self.policy)
            draft.preempted.append(victim.request_id)
            if victim.status is Status.SWAPPED:
                draft.swapped.append(victim.request_id)
            if position == len(self.running):
                return False
        return True

    def _admit(self, draft: Draft) -> None:
        """Let waiting groups run, in order, until one does not fit.

        A block stays free for every sequence that runs: whoever takes the last one is preempted
        as soon as another sequence needs its next, and has run for nothing.
        """
        raise NotImplementedError("Task 6.3: Scheduler._admit is still to be written")

    def _swap_in(self, group: SequenceGroup, draft: Draft, kept_free: int) -> bool:
        """Move a swapped group back if it fits, and so many blocks stay free."""
        if group.status is not Status.SWAPPED:
            return False
        if self._blocks_to_catch_up(group) + kept_free > self.manager.device.num_free:
            return False
        draft.swap_in += self.manager.swap_in([sequence.seq_id for sequence in group.sequences])
        return True

    def _begin(self, group: SequenceGroup, kept_free: int) -> bool:
        """Let a group without blocks begin if it fits beside those that stay free.

        It takes its blocks chunk by chunk.

        Cached blocks of its prefix are taken here.
        """
        if group.status is not Status.WAITING:
            return False
        manager, first = self.manager, group.sequences[0]
        needed = self._blocks_to_catch_up(group) + kept_free
        if not manager.has_room_to_begin(first.seq_id, needed):
            prefix = manager.cached_prefix(first.token_ids, first.cache_salt)
            saved = sum(manager.device.ref_count(block) > 0 for block in prefix)
            if not manager.has_room_to_begin(first.seq_id, needed - saved):
                return False
        first.num_computed_tokens = manager.adopt_prefix(
            first.seq_id, first.token_ids, not group.was_recomputed, first.cache_salt
        )
        return True

    def _blocks_to_catch_up(self, group: SequenceGroup) -> int:
        """Device blocks that suffice for all tokens that a waiting group has."""
        manager, sequences = self.manager, group.sequences
        if manager.sliding_window is not None:
            lengths = (len(sequence.token_ids) for sequence in sequences)
            budget = self.max_num_batched_tokens
            return sum(manager.most_blocks_each(length, budget) for length in lengths)
        swapped = [s for s in sequences if s.seq_id in manager.tables]
        needed = manager.num_blocks_held(s.seq_id for s in swapped)
        needed += manager.blocks_needed((s.seq_id, s.num_uncomputed_tokens) for s in swapped)
        for sequence in sequences:
            if sequence.seq_id not in manager.tables:
                _, shared = sequence.resume_from or (None, 0)
                needed += manager.blocks_for(len(sequence.token_ids)) - manager.blocks_for(shared)
        return needed

    def _take_slots(self, chunks: list[Chunk], draft: Draft) -> None:
        """Take the slots for these chunks and add them to the plan."""
        raise NotImplementedError("Task 6.2: Scheduler._take_slots is still to be written")

    def check_integrity(self) -> None:
        """Assert, between two steps, that queues, statuses and block tables agree (T2, T6)."""
        raise NotImplementedError("Task 6.5: Scheduler.check_integrity is still to be written")
