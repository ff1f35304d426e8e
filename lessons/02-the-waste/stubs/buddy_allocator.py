"""Contiguous runs of blocks out of one pool: a buddy allocator, as the paper assumes for Orca.

Owns which runs are free.  Runs are powers of two long, and begin at a multiple of their length;
a free run is halved until it is just long enough, and halves that are both free are joined
again.  What a run is used for, and how much of it, is `reservation.py`'s knowledge.
"""

from __future__ import annotations

from collections.abc import Callable

from minipaged.errors import ConfigurationError, OutOfBlocksError
from minipaged.memory.block_allocator import BlockId


def run_length(num_blocks: int) -> int:
    """Length of the run that is given to whoever asks for `num_blocks`: a power of two."""
    raise NotImplementedError("Task 2.1: run_length is still to be written")


class BuddyAllocator:
    """Free runs of the blocks 0 .. num_blocks - 1, by their length (Knuth 2.5; section 6.1).

    A pool that is no power of two begins as runs of falling length, one for each of its bits.
    on_free(block): called for every block of a run that is given back; the debug mode poisons
        the block's memory there.
    """

    def __init__(self, num_blocks: int, on_free: Callable[[BlockId], None] | None = None) -> None:
        if num_blocks < 0:
            raise ConfigurationError(f"a pool of {num_blocks} blocks cannot be; 0 is the least")
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.on_free = on_free
        # Length to the first blocks of the free runs of that length; a stack, and a set of it.
        self._free: dict[int, dict[BlockId, None]] = {
            1 << order: {} for order in range(num_blocks.bit_length())
        }
        self._used: dict[BlockId, int] = {}  # first block of a run to its length
        start = 0
        for length in reversed(self._free):
            if num_blocks & length:
                self._free[length][start] = None
                start += length

    @property
    def num_used(self) -> int:
        """Blocks of runs that are in use, whether anything is in them or not."""
        return self.num_blocks - self.num_free

    def num_free_within(self, length: int) -> int:
        """Free blocks that can be had in runs of this length, a power of two."""
        return sum(n * len(starts) for n, starts in self._free.items() if n >= length)

    def allocate(self, num_blocks: int) -> BlockId:
        """Take a run for so many blocks, rounded up; returns its first one.

        Raises OutOfBlocksError if no free run is long enough, however many blocks are free.
        """
        raise NotImplementedError("Task 2.2: BuddyAllocator.allocate is still to be written")

    def free(self, start: BlockId) -> None:
        """Give back the run that begins here, and join it with its buddy while that is free."""
        raise NotImplementedError("Task 2.3: BuddyAllocator.free is still to be written")

    def check_integrity(self) -> None:
        """Assert conservation (T2): every block is in one run, and no two buddies are both free."""
        raise NotImplementedError("Task 2.4: BuddyAllocator.check_integrity is still to be written")

    def __repr__(self) -> str:
        free = {n: sorted(starts) for n, starts in self._free.items() if starts}
        return f"BuddyAllocator(free {free}, used {self._used})"
