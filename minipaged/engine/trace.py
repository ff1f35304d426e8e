"""What happened in each step, as plain data for pictures, progress lines and tests.

An engine calls its observers with one StepRecord after every step; `Trace` is the observer
that keeps them.  Nothing is recorded while nobody observes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from minipaged.memory.block_allocator import BlockId
from minipaged.request.sequence import FinishReason, RequestId, SequenceId
from minipaged.scheduling.step_plan import StepPlan


class TableRecord(NamedTuple):
    """The block table of a sequence at the end of a step, before a finished one is freed.

    blocks: physical block of each logical block from number `num_dropped` on; those before it
        fell out of the sliding window.
    num_tokens: slots given out; all blocks but the last are full.
    on_host: the sequence is swapped out, and its blocks are those of the host pool.
    """

    seq_id: SequenceId
    request_id: RequestId
    blocks: tuple[BlockId, ...]
    num_tokens: int
    num_dropped: int = 0
    on_host: bool = False

    def filled_slots(self, block: BlockId, block_size: int) -> int:
        """Tokens that this table has in one of its blocks."""
        logical = self.num_dropped + self.blocks.index(block)
        return min(block_size, self.num_tokens - logical * block_size)


class StepRecord(NamedTuple):
    """One iteration: what was planned, and how the queues and the cache look after it.

    step: counts from 0.
    seconds: wall-clock time of the whole step.
    new_text: what each output grew by.
    running, waiting: requests in the order of service, those that finished in the step included.
    finished: requests that ended in this step and why.
    forks: (parent, child) of the sequences that began in this step.
    num_preemptions, num_swaps: since the engine started; a swap is one kind of preemption.
    completed: sequences whose output became complete; of a beam search, beams behind which a
        hypothesis did.
    ended: sequences that have no place in the next step: complete, or beams that dropped out.
    cached_blocks: free blocks whose contents the prefix cache can find again.
    num_hit_tokens, num_queried_tokens: of prompts, found in the prefix cache and looked for.
    """

    step: int
    seconds: float
    plan: StepPlan
    block_size: int
    num_blocks: int
    tables: tuple[TableRecord, ...]
    running: tuple[RequestId, ...]
    waiting: tuple[RequestId, ...]
    finished: dict[RequestId, FinishReason]
    new_text: dict[SequenceId, str]
    num_preemptions: int
    forks: tuple[tuple[SequenceId, SequenceId], ...] = ()
    num_swaps: int = 0
    num_host_blocks: int = 0
    completed: tuple[SequenceId, ...] = ()
    ended: tuple[SequenceId, ...] = ()
    cached_blocks: tuple[BlockId, ...] = ()
    num_hit_tokens: int = 0
    num_queried_tokens: int = 0

    @property
    def device_tables(self) -> tuple[TableRecord, ...]:
        """The tables whose blocks are on the device."""
        return tuple(table for table in self.tables if not table.on_host)

    @property
    def holders(self) -> Counter[BlockId]:
        """How many tables hold each used device block."""
        return Counter(block for table in self.device_tables for block in table.blocks)

    @property
    def num_used_blocks(self) -> int:
        """Device blocks that stand in some table; a shared one counts once."""
        return len(self.holders)

    @property
    def num_shared_blocks(self) -> int:
        """Device blocks that stand in more than one table."""
        return sum(count > 1 for count in self.holders.values())

    @property
    def num_unshared_blocks(self) -> int:
        """Device blocks that the same tables would hold if nothing was shared."""
        return sum(len(table.blocks) for table in self.device_tables)

    @property
    def num_used_host_blocks(self) -> int:
        """Host blocks that stand in some table."""
        return len({block for table in self.tables if table.on_host for block in table.blocks})

    @property
    def num_wasted_slots(self) -> int:
        """Slots of used blocks that hold no token; those of a shared last block count once."""
        empty = {
            table.blocks[-1]: self.block_size
            - table.filled_slots(table.blocks[-1], self.block_size)
            for table in self.device_tables
            if table.blocks
        }
        return sum(empty.values())

    @property
    def waste(self) -> float:
        """Share of the slots of used blocks that hold no token, 0 to 1."""
        return self.num_wasted_slots / max(1, self.num_used_blocks * self.block_size)


class Trace:
    """Keeps the records of a run."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def __call__(self, record: StepRecord) -> None:
        self.records.append(record)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self.records)

    @property
    def fullest(self) -> StepRecord:
        """The first of the steps that used most blocks.  ValueError if there was no step."""
        return max(self.records, key=lambda record: record.num_used_blocks)

    @property
    def mean_waste(self) -> float:
        """Wasted slots over slots of used blocks, summed over all steps."""
        slots = sum(record.num_used_blocks * record.block_size for record in self.records)
        return sum(record.num_wasted_slots for record in self.records) / max(1, slots)

    @property
    def saved_by_sharing(self) -> float:
        """Blocks saved over blocks without sharing, summed over all steps (section 6.3)."""
        without = sum(record.num_unshared_blocks for record in self.records)
        return 1 - sum(record.num_used_blocks for record in self.records) / max(1, without)

    @property
    def num_copied_blocks(self) -> int:
        """Copies on write."""
        return sum(len(record.plan.copies) for record in self.records)

    @property
    def num_swapped_blocks(self) -> tuple[int, int]:
        """Blocks moved out to the host and back in."""
        plans = [record.plan for record in self.records]
        return sum(len(plan.swap_out) for plan in plans), sum(len(plan.swap_in) for plan in plans)

    def last_tables(self) -> dict[SequenceId, TableRecord]:
        """The longest table each sequence ever had, which is the one before it was freed.

        Beams that dropped out on the way are left out.
        """
        tables: dict[SequenceId, TableRecord] = {}
        for record in self.records:
            for table in record.tables:
                before = tables.get(table.seq_id)
                if before is None or table.num_tokens >= before.num_tokens:
                    tables[table.seq_id] = table
            for seq_id in record.ended:
                in_time = seq_id in tables and tables[seq_id].request_id in record.finished
                if seq_id not in record.completed and not in_time:
                    tables.pop(seq_id, None)
        return tables
