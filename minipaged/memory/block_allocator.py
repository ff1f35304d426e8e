"""One pool of physical KV blocks: which are free, and how many tables hold each of the others.

Owns ids and reference counts alone.  It does not know what a block contains, who holds it,
or where its memory is; a pool on the GPU and a pool on the host look the same from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from minipaged.errors import ConfigurationError, OutOfBlocksError

BlockId = int


class BlockAllocator:
    """A free list and reference counts over the blocks 0 .. num_blocks - 1 (section 4.2).

    `on_free(block)` is called when the last holder lets go of a block; the debug mode
    poisons the block's memory there.
    """

    def __init__(self, num_blocks: int, on_free: Callable[[BlockId], None] | None = None) -> None:
        if num_blocks < 0:
            raise ConfigurationError(f"a pool of {num_blocks} blocks cannot be; 0 is the least")
        self.num_blocks = num_blocks
        self.on_free = on_free
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: warm blocks are used again

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds; a shared block counts once."""
        return self.num_blocks - len(self._free)

    def ref_count(self, block: BlockId) -> int:
        """How many tables hold `block`; 0 if it is free."""
        return self._ref_counts[block]

    def allocate(self) -> BlockId:
        """Take a free block; its reference count is 1.  Raises OutOfBlocksError if none is left."""
        self.check_available(1)
        block = self._free.pop()
        self._ref_counts[block] = 1
        return block

    def check_available(self, num_blocks: int) -> None:
        """Raise OutOfBlocksError unless `num_blocks` blocks are free."""
        if num_blocks > self.num_free:
            raise OutOfBlocksError(
                f"{num_blocks} blocks are needed and {self.num_free} of {self.num_blocks} are "
                "free; free or preempt a sequence first"
            )

    def share(self, block: BlockId) -> None:
        """Count one more holder of a block that is in use."""
        self._check_used(block, "shared")
        self._ref_counts[block] += 1

    def free(self, block: BlockId) -> None:
        """Count one holder less; the last one puts the block back on the free list."""
        self._check_used(block, "freed")
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free.append(block)
            if self.on_free is not None:
                self.on_free(block)

    def check_integrity(self, holds: Mapping[BlockId, int]) -> None:
        """Assert conservation (T2), given how often each block stands in a table."""
        free = set(self._free)
        assert len(free) == len(self._free), f"free twice: {sorted(self._free)}"
        for block, count in enumerate(self._ref_counts):
            held = holds.get(block, 0)
            assert count == held, f"block {block}: reference count {count}, in {held} tables"
            assert (block in free) == (count == 0), f"block {block}: count {count}, free list wrong"
        assert self.num_free + self.num_used == self.num_blocks

    def _check_used(self, block: BlockId, verb: str) -> None:
        if not 0 <= block < self.num_blocks or self._ref_counts[block] == 0:
            raise ValueError(f"block {block} is {verb} but not in use")

    def __repr__(self) -> str:
        return f"BlockAllocator({self.num_free} of {self.num_blocks} free)"
