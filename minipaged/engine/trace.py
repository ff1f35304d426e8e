"""What happened in each step, as plain data for pictures, progress lines and tests.

An engine calls its observers with one StepRecord after every step; `Trace` is the observer
that keeps them.  Nothing is recorded while nobody observes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from minipaged.memory.block_allocator import BlockId
from minipaged.request.sequence import FinishReason, RequestId, SequenceId
from minipaged.scheduling.step_plan import StepPlan


class TableRecord(NamedTuple):
    """The block table of a sequence at the end of a step, before a finished one is freed.

    blocks: physical block of each logical block.
    num_tokens: filled slots; all blocks but the last are full.
    """

    seq_id: SequenceId
    request_id: RequestId
    blocks: tuple[BlockId, ...]
    num_tokens: int


class StepRecord(NamedTuple):
    """One iteration: what was planned, and how the queues and the cache look after it.

    step: counts from 0.
    seconds: wall-clock time of the whole step.
    new_text: what each request's output grew by.
    running, waiting: requests in order of arrival, those that finished in the step included.
    finished: requests that ended in this step and why.
    num_preemptions: since the engine started.
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
    new_text: dict[RequestId, str]
    num_preemptions: int

    @property
    def num_used_blocks(self) -> int:
        """Device blocks that stand in some table; a shared one counts once."""
        return len({block for table in self.tables for block in table.blocks})

    @property
    def num_wasted_slots(self) -> int:
        """Slots of used blocks that hold no token; those of a shared last block count once."""
        empty = {
            table.blocks[-1]: len(table.blocks) * self.block_size - table.num_tokens
            for table in self.tables
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

    def last_tables(self) -> dict[SequenceId, TableRecord]:
        """The longest table each sequence ever had, which is the one before it was freed."""
        tables: dict[SequenceId, TableRecord] = {}
        for record in self.records:
            for table in record.tables:
                if (
                    table.seq_id not in tables
                    or table.num_tokens >= tables[table.seq_id].num_tokens
                ):
                    tables[table.seq_id] = table
        return tables
