"""One pool of physical KV blocks: which are free, and how many tables hold each of the others.

Owns ids and reference counts alone.  It does not know what a block contains, who holds it,
or where its memory is; a pool on the GPU and a pool on the host look the same from here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from minipaged.errors import ConfigurationError, OutOfBlocksError

BlockId = int


class BlockAllocator:
    """A free list and reference counts over the blocks 0 .. num_blocks - 1 (section 4.2).

    A free block may be worth keeping: the prefix cache can ask that the contents of a block
    be remembered.  When nobody holds such a block any more, it is free like any other, but is
    given out last, the one that was let go longest ago first; until then `share` finds it
    again.

    on_free(block): the last holder of a block whose contents are not remembered let go of it;
        the debug mode poisons the block's memory there.
    on_evict(block): a remembered block is about to be given out for other contents.
    """

    def __init__(self, num_blocks: int, on_free: Callable[[BlockId], None] | None = None) -> None:
        if num_blocks < 0:
            raise ConfigurationError(f"a pool of {num_blocks} blocks cannot be; 0 is the least")
        self.num_blocks = num_blocks
        self.on_free = on_free
        self.on_evict: Callable[[BlockId], None] | None = None
        self._ref_counts = [0] * num_blocks
        # A stack, so that warm blocks are used again, out of which any block can be taken.
        self._free = dict.fromkeys(range(num_blocks - 1, -1, -1))
        self._remembered: set[BlockId] = set()
        self._cached: OrderedDict[BlockId, None] = OrderedDict()  # free and remembered, in order

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose contents can be found again."""
        return len(self._cached)

    @property
    def cached_blocks(self) -> list[BlockId]:
        """Those blocks, in the order in which they would be given away."""
        return list(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds; a shared block counts once."""
        return self.num_blocks - self.num_free

    def ref_count(self, block: BlockId) -> int:
        """How many tables hold `block`; 0 if it is free."""
        return self._ref_counts[block]

    def allocate(self) -> BlockId:
        """Take a free block; its reference count is 1.  Raises OutOfBlocksError if none is left."""
        self.check_available(1)
        block = self._free.popitem()[0] if self._free else self._evict()
        self._ref_counts[block] = 1
        return block

    def take(self, block: BlockId) -> BlockId:
        """Take this free block, for those who care where their blocks lie."""
        if block not in self._free:
            raise ValueError(f"block {block} is taken but not free")
        del self._free[block]
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
        """Count one more holder of a block that is in use, or is free but remembered."""
        raise NotImplementedError("Task 10.3: BlockAllocator.share is still to be written")

    def free(self, block: BlockId) -> None:
        """Count one holder less; after the last one the block is free."""
        raise NotImplementedError("Task 10.3: BlockAllocator.free is still to be written")

    def remember(self, block: BlockId) -> None:
        """Keep the contents of a block in use, once it is free, for as long as possible."""
        raise NotImplementedError("Task 10.3: BlockAllocator.remember is still to be written")

    def is_remembered(self, block: BlockId) -> bool:
        """Whether `block` keeps its contents when it is free."""
        return block in self._remembered

    def _evict(self) -> BlockId:
        """The remembered block that has been free longest, its contents forgotten."""
        raise NotImplementedError("Task 10.3: BlockAllocator._evict is still to be written")

    def check_integrity(self, holds: Mapping[BlockId, int]) -> None:
        """Assert conservation (T2), given how often each block stands in a table."""
        free = set(self._free) | self._cached.keys()
        assert len(free) == self.num_free, f"free twice: {free}"
        assert self._remembered.isdisjoint(self._free), "a remembered block was forgotten silently"
        assert self._remembered >= self._cached.keys(), "a cached block is not remembered"
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
