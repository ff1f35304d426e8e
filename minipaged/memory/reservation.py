"""Contiguous memory for every request, reserved when it begins: what the paper argues against.

Owns how much is reserved and where, behind the verbs of the block manager, so that the same
scheduler and the same model run on it.  A run of blocks is reserved for as many tokens as a
sequence may come to, and its tokens lie there one after the other.  Nothing can be shared: a
fork that goes its own way is copied whole, into a run that was reserved for it as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from minipaged.errors import ConfigurationError
from minipaged.memory.block_allocator import BlockAllocator, BlockId
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.block_table import BlockCopy, BlockTable
from minipaged.memory.buddy_allocator import BuddyAllocator, run_length

ReserveFor = Callable[[int, int, int], int]
"""Slots to reserve for a sequence, from its prompt, its output at most, and the model's context."""

RESERVATIONS: dict[str, ReserveFor] = {
    "orca-max": lambda prompt, output, context: context,
    "orca-pow2": lambda prompt, output, context: min(prompt + run_length(output), context),
    "orca-oracle": lambda prompt, output, context: prompt + output,
    "static": lambda prompt, output, context: context,
}
"""Section 6.1; the oracle takes the output at most for what it will be."""


@dataclass
class Reservation:
    """The runs of one request, taken together and given back together.

    num_slots: that a sequence was given, before rounding up to a run.
    num_runs: one for each sequence that it will have at a time.
    length: blocks of a run.
    spare: first blocks of the runs in which there is no sequence.
    sequences: first block of a run to the number of sequences that are in it.
    """

    num_slots: int
    num_runs: int
    length: int
    spare: list[BlockId] = field(default_factory=list)
    sequences: Counter[BlockId] = field(default_factory=Counter)

    def enter(self, start: BlockId) -> BlockId:
        """Count one more sequence in this run."""
        self.sequences[start] += 1
        return start

    def leave(self, start: BlockId) -> None:
        """Count one less; a run without any is spare."""
        self.sequences[start] -= 1
        if not self.sequences[start]:
            del self.sequences[start]
            self.spare.append(start)


class ReservedTable(BlockTable):
    """A table whose blocks follow each other, from the beginning of a run on."""

    __slots__ = ("reservation", "start")

    def __init__(
        self, block_size: int, allocator: BlockAllocator, reservation: Reservation, start: BlockId
    ) -> None:
        super().__init__(block_size, allocator)
        self.reservation = reservation
        self.start = reservation.enter(start)

    def append(self, num_new_tokens: int) -> None:
        """Give slots to the next tokens, behind those that are there."""
        self.num_tokens += num_new_tokens
        while len(self.blocks) * self.block_size < self.num_tokens:
            self.blocks.append(self.allocator.take(self.start + len(self.blocks)))

    def move_apart(self) -> list[BlockCopy]:
        """Leave a run that siblings are in, before writing; returns the copies of every block.

        Copy-on-write, with the whole run for a block.
        """
        if self.reservation.sequences[self.start] == 1:
            return []
        start = self.reservation.spare.pop()
        copies = [BlockCopy(block, start + i) for i, block in enumerate(self.blocks)]
        for i, (block, destination) in enumerate(copies):
            self.blocks[i] = self.allocator.take(destination)
            self.allocator.free(block)
        self.reservation.leave(self.start)
        self.start = self.reservation.enter(start)
        return copies

    def fork(self, num_tokens: int | None = None) -> BlockTable:
        """A second table over the same run, until one of the two is written."""
        assert num_tokens is None, "only a recomputation shares a part, and none is ever needed"
        child = ReservedTable(self.block_size, self.allocator, self.reservation, self.start)
        child.blocks, child.num_tokens = list(self.blocks), self.num_tokens
        for block in child.blocks:
            self.allocator.share(block)
        return child

    def free(self) -> None:
        """Let go of every block, and of the place in the run."""
        super().free()
        self.reservation.leave(self.start)


class ReservationManager(BlockManager):
    """A block manager that gives each request all the memory it may ever need, at once.

    `device` counts the blocks that hold tokens; `runs` are the blocks that nobody else can have.
    A request that runs never needs more, so that nobody is preempted.
    context_length: tokens of the longest sequence the model can serve.
    """

    def __init__(
        self,
        block_size: int,
        num_blocks: int,
        policy: str,
        context_length: int,
        on_free: Callable[[BlockId], None] | None = None,
    ) -> None:
        if policy not in RESERVATIONS:
            raise ConfigurationError(
                f"there is no memory policy {policy!r}; choose one of paged, "
                f"{', '.join(RESERVATIONS)}"
            )
        super().__init__(block_size, num_blocks, on_free=on_free)
        self.context_length = context_length
        self.runs = BuddyAllocator(num_blocks)
        self._reserve_for = RESERVATIONS[policy]
        self._reservations: dict[int, Reservation] = {}  # of every sequence, waiting ones too

    def most_blocks(
        self, num_prompt_tokens: int, num_tokens: int, num_seats: int, tokens_at_once: int
    ) -> int:
        """Blocks of the runs that are reserved for such a request."""
        slots = self._slots(num_prompt_tokens, num_tokens)
        return num_seats * run_length(self.blocks_for(slots))

    def expect(self, seq_id: int, num_prompt_tokens: int, num_tokens: int, num_seats: int) -> None:
        """A request will begin with this sequence: decides how long its runs will be."""
        slots = self._slots(num_prompt_tokens, num_tokens)
        run = run_length(self.blocks_for(slots))
        self._reservations[seq_id] = Reservation(slots, num_seats, run)

    def _slots(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Slots that a sequence is given, of which it will need `num_tokens` at most."""
        output = num_tokens - num_prompt_tokens + 1  # the last token never needs a slot
        slots = self._reserve_for(num_prompt_tokens, output, self.context_length)
        return max(slots, num_tokens)

    def has_room_to_begin(self, seq_id: int, num_blocks: int) -> bool:
        """Whether all runs of the request can be had now, however few blocks it begins with."""
        wanted = self._reservations[seq_id]
        return wanted.num_runs * wanted.length <= self.runs.num_free_within(wanted.length)

    def blocks_needed(self, appends: Iterable[tuple[int, int]]) -> int:
        """None: whoever runs has all that it needs."""
        return 0

    def append(self, seq_id: int, num_new_tokens: int) -> list[BlockCopy]:
        """Give the next tokens of a sequence their slots; the first call reserves the runs."""
        table = self.tables.get(seq_id)
        if table is None:
            reservation = self._reservations[seq_id]
            runs = [self.runs.allocate(reservation.length) for _ in range(reservation.num_runs)]
            reservation.spare = runs[1:]
            table = ReservedTable(self.block_size, self.device, reservation, runs[0])
            self.tables[seq_id] = table
        assert isinstance(table, ReservedTable)
        copies = table.move_apart() if num_new_tokens else []
        table.append(num_new_tokens)
        return copies

    def fork(self, parent_id: int, child_id: int, num_tokens: int | None = None) -> None:
        """Let a new sequence of the request share a run until one of the two is written."""
        super().fork(parent_id, child_id, num_tokens)
        self._reservations[child_id] = self._reservations[parent_id]

    def free(self, seq_id: int) -> None:
        """Let go of a sequence's place; after the last of a request its runs are free."""
        reservation = self._reservations.pop(seq_id, None)
        has_table = seq_id in self.tables
        super().free(seq_id)
        if reservation is not None and has_table and not reservation.sequences:
            for start in reservation.spare:
                self.runs.free(start)

    def check_integrity(self) -> None:
        """Assert conservation of blocks and runs (T2), and that every table is contiguous."""
        super().check_integrity()
        self.runs.check_integrity()
        holders: dict[int, Counter[BlockId]] = {}
        for seq_id, table in self.tables.items():
            assert isinstance(table, ReservedTable)
            assert table.reservation is self._reservations[seq_id]
            run = range(table.start, table.start + table.reservation.length)
            assert table.blocks == list(run[: len(table.blocks)]), f"{table} is not in {run}"
            holders.setdefault(id(table.reservation), Counter())[table.start] += 1
        begun = {id(r): r for r in self._reservations.values() if r.sequences}
        assert holders == {key: r.sequences for key, r in begun.items()}
        taken = sum(r.length * r.num_runs for r in begun.values())
        assert taken == self.runs.num_used, f"{taken} blocks are reserved, but {self.runs}"
