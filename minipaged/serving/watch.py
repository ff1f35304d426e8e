"""What somebody who watches the engine is told: the blocks after every step, the queues, counts.

Made in the engine's thread, while somebody watches and not otherwise.  However long nobody
fetches what was seen, it stays within a bound: of the steps the newest are kept, and of the
others the counts.  No token and no text goes in.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

from minipaged.engine.engine import Engine
from minipaged.engine.trace import StepRecord, TableRecord
from minipaged.memory.block_allocator import BlockId
from minipaged.memory.block_table import BlockCopy
from minipaged.request.sequence import FinishReason, RequestId, SequenceGroup, SequenceId
from minipaged.scheduling.step_plan import StepPlan

MOST_ENTRIES = 6000  # of tables, copies and so on, that are kept for whoever watches


class Frame(NamedTuple):
    """The block tables at the end of a step, before finished sequences are freed, or between two.

    at: seconds of `time.monotonic`.
    step: the last one that ended; -1 before the first.
    cached: free blocks that the prefix cache can find again.
    copies: on write; of each the source, the destination, who writes it, and who keep the source.
    The others say what the step did, as a StepRecord does; between two steps all are empty.
    """

    at: float
    step: int
    tables: tuple[TableRecord, ...]
    cached: tuple[BlockId, ...]
    forks: tuple[tuple[SequenceId, SequenceId], ...] = ()
    copies: tuple[tuple[int, ...], ...] = ()
    swap_out: tuple[BlockCopy, ...] = ()
    swap_in: tuple[BlockCopy, ...] = ()
    preempted: tuple[RequestId, ...] = ()
    swapped: tuple[RequestId, ...] = ()
    ended: tuple[SequenceId, ...] = ()
    finished: tuple[tuple[RequestId, FinishReason], ...] = ()

    @property
    def num_entries(self) -> int:
        """Roughly what it takes to keep and to send, its cached blocks apart."""
        blocks = sum([len(table.blocks) for table in self.tables])
        return 8 + blocks + 6 * len(self.tables) + sum([len(field) for field in self[4:]])


class Queued(NamedTuple):
    """A request that waits or runs.  status: "running", "waiting" or "swapped"."""

    request_id: RequestId
    status: str
    num_prompt_tokens: int
    num_output_tokens: int


class News(NamedTuple):
    """What happened since somebody last asked.

    frames: of the newest steps, and at last how the engine stands now if that is new.
    num_skipped: steps of which there is no frame.
    queue: those that run, in the order of service, and then those that wait.
    counts: since the watch began; preemptions and prefix hits since the engine did.
    """

    frames: list[Frame]
    num_skipped: int
    queue: tuple[Queued, ...]
    counts: dict[str, int]


class Watch:
    """Sees every step of an engine as one of its observers, between `attach` and `detach`.

    All its methods are to be called in the engine's thread: by way of `AsyncEngine.ask`.
    """

    def __init__(self) -> None:
        self._frames: deque[tuple[Frame, int]] = deque()  # and their entries
        self._num_entries = 0
        self._num_skipped = 0
        names = ["steps", "tokens", "computed", "forks", "copies", "swapped_out", "swapped_in"]
        self._counts = Counter(dict.fromkeys(names, 0))
        self._newest: Frame | None = None

    def attach(self, engine: Engine) -> None:
        """Begin to watch."""
        engine.observers.append(self.observe)

    def detach(self, engine: Engine) -> None:
        """Watch no longer."""
        if self.observe in engine.observers:
            engine.observers.remove(self.observe)

    def observe(self, record: StepRecord) -> None:
        """A step has ended."""
        plan = record.plan
        frame = Frame(
            at=time.monotonic(),
            step=record.step,
            tables=record.tables,
            cached=self._same_or_new(record.cached_blocks),
            forks=record.forks,
            copies=tuple(_copies(plan, record.block_size)) if plan.copies else (),
            swap_out=plan.swap_out,
            swap_in=plan.swap_in,
            preempted=plan.preempted,
            swapped=plan.swapped,
            ended=record.ended,
            finished=tuple(record.finished.items()),
        )
        self._counts.update(
            steps=1,
            tokens=len(record.new_text),
            computed=plan.num_tokens,
            forks=len(record.forks),
            copies=len(plan.copies),
            swapped_out=len(plan.swap_out),
            swapped_in=len(plan.swap_in),
        )
        size = frame.num_entries
        if self._newest is None or frame.cached is not self._newest.cached:
            size += len(frame.cached)
        self._newest = frame
        self._frames.append((frame, size))
        self._num_entries += size
        while self._num_entries > MOST_ENTRIES:
            self._num_entries -= self._frames.popleft()[1]
            self._num_skipped += 1

    def fetch(self, engine: Engine) -> News:
        """What happened since the last call, and how the engine stands."""
        scheduler, manager = engine.scheduler, engine.scheduler.manager
        groups = [*scheduler.running, *scheduler.waiting]
        frames = [frame for frame, _ in self._frames]
        now = Frame(
            at=time.monotonic(),
            step=engine.num_steps - 1,
            tables=engine.table_records(),
            cached=self._same_or_new(tuple(manager.device.cached_blocks)),
        )
        if self._newest is None or now[1:4] != self._newest[1:4]:
            frames.append(now)
            self._newest = now
        elif self._num_skipped and not frames:
            frames.append(now)
        cache = manager.prefix_cache
        counts = {
            **self._counts,
            "preemptions": scheduler.num_preemptions,
            "queried": cache.num_queried_tokens if cache is not None else 0,
            "hit": cache.num_hit_tokens if cache is not None else 0,
        }
        news = News(frames, self._num_skipped, tuple(map(_queued, groups)), counts)
        self._frames.clear()
        self._num_entries = self._num_skipped = 0
        return news

    def _same_or_new(self, cached: tuple[BlockId, ...]) -> tuple[BlockId, ...]:
        """The object that was there before, if it is equal: most steps cache nothing."""
        return self._newest.cached if self._newest and self._newest.cached == cached else cached


def _copies(plan: StepPlan, block_size: int) -> Iterator[tuple[int, ...]]:
    """The copies-on-write of a step with those whom they concern: see Frame."""
    writers = {
        item.block_table[item.num_computed_tokens // block_size]: item.seq_id
        for item in plan.scheduled
    }
    for source, destination in plan.copies:
        keepers = [item.seq_id for item in plan.scheduled if source in item.block_table]
        yield source, destination, writers[destination], *keepers


def _queued(group: SequenceGroup) -> Queued:
    return Queued(
        group.request_id,
        group.status.value,
        group.sequences[0].num_prompt_tokens,
        sum(sequence.num_output_tokens for sequence in group.sequences),
    )
