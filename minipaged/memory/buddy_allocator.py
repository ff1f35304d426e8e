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
    return 1 << (num_blocks - 1).bit_length()


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
        length = run_length(num_blocks)
        free = next((n for n, starts in self._free.items() if n >= length and starts), None)
        if free is None:
            raise OutOfBlocksError(
                f"a run of {length} blocks is needed and none is free, although {self.num_free} "
                f"of {self.num_blocks} blocks are; wait until a sequence ends"
            )
        start, _ = self._free[free].popitem()
        while free > length:  # keep the first half, the second is free
            free //= 2
            self._free[free][start + free] = None
        self._used[start] = length
        self.num_free -= length
        return start

    def free(self, start: BlockId) -> None:
        """Give back the run that begins here, and join it with its buddy while that is free."""
        if start not in self._used:
            raise ValueError(f"block {start} is freed but no run in use begins there")
        length = self._used.pop(start)
        self.num_free += length
        if self.on_free is not None:
            for block in range(start, start + length):
                self.on_free(block)
        buddy = start ^ length
        while length in self._free and buddy in self._free[length]:
            del self._free[length][buddy]
            start, length = min(start, buddy), 2 * length
            buddy = start ^ length
        self._free[length][start] = None

    def check_integrity(self) -> None:
        """Assert conservation (T2): every block is in one run, and no two buddies are both free."""
        runs = sorted(
            [(start, n) for n, starts in self._free.items() for start in starts]
            + list(self._used.items())
        )
        end = 0
        for start, length in runs:
            assert start == end, f"blocks {end}..{start - 1} are lost, or held twice: {self}"
            assert start % length == 0, f"a run of {length} at {start}: {self}"
            end = start + length
        assert end == self.num_blocks, repr(self)
        assert self.num_free == sum(n * len(starts) for n, starts in self._free.items()), repr(self)
        for length, starts in self._free.items():
            assert not any(start ^ length in starts for start in starts), f"not joined: {self}"

    def __repr__(self) -> str:
        free = {n: sorted(starts) for n, starts in self._free.items() if starts}
        return f"BuddyAllocator(free {free}, used {self._used})"
