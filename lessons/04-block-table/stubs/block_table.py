"""The block table of one sequence: logical block i of the sequence lies in physical block table[i].

Owns the mapping, how many slots are filled, and copy-on-write of the last block.  It takes
blocks from an allocator it shares with all other tables; it never sees a tensor.
"""

from __future__ import annotations

from typing import NamedTuple

from minipaged.memory.block_allocator import BlockAllocator, BlockId


class BlockCopy(NamedTuple):
    """An order to copy one physical block onto another before the forward pass."""

    source: BlockId
    destination: BlockId


DROPPED: BlockId = -1
"""Stands in a table for a block that fell out of the sliding window; it must not be read."""


class BlockTable:
    """Logical to physical blocks of one sequence (section 4.3, figure 6).

    `num_tokens` counts the slots given out, those of the running step included.  All blocks
    but the last are full, so that less than one block is wasted (T7).  With a sliding window
    the first `num_dropped` blocks are gone, and less than one more block holds tokens that
    are out of sight.
    """

    __slots__ = ("allocator", "block_size", "blocks", "num_dropped", "num_tokens")

    def __init__(self, block_size: int, allocator: BlockAllocator) -> None:
        self.block_size = block_size
        self.allocator = allocator
        self.blocks: list[BlockId] = []
        self.num_tokens = 0
        self.num_dropped = 0

    @property
    def held_blocks(self) -> list[BlockId]:
        """The physical blocks that this table holds, in logical order."""
        return self.blocks[self.num_dropped :] if self.num_dropped else self.blocks

    @property
    def num_empty_slots(self) -> int:
        """Slots of the last block that hold no token: the waste."""
        raise NotImplementedError("Task 4.1: BlockTable.num_empty_slots is still to be written")

    def blocks_needed(self, num_new_tokens: int) -> int:
        """Free blocks that `append(num_new_tokens)` would take, a copy-on-write included."""
        raise NotImplementedError("Task 4.2: BlockTable.blocks_needed is still to be written")

    def append(self, num_new_tokens: int) -> BlockCopy | None:
        """Give slots to the next tokens, taking new blocks when the last one is full.

        A last block that is shared and about to be written is first replaced by a copy of
        its own; the caller must have the contents copied before the forward pass.  Raises
        OutOfBlocksError, with nothing changed, if the pool has too few free blocks.
        """
        raise NotImplementedError("Task 4.3: BlockTable.append is still to be written")

    def fork(self, num_tokens: int | None = None) -> BlockTable:
        """A second table over the same blocks; nothing is copied (section 4.4).

        With `num_tokens` only over the full blocks of that many tokens.
        """
        child = BlockTable(self.block_size, self.allocator)
        num_blocks = len(self.blocks)
        child.num_tokens = self.num_tokens
        if num_tokens is not None:
            num_blocks = num_tokens // self.block_size
            child.num_tokens = num_blocks * self.block_size
        child.blocks = self.blocks[:num_blocks]
        child.num_dropped = self.num_dropped
        for block in child.held_blocks:
            self.allocator.share(block)
        return child

    def drop_before(self, position: int) -> None:
        """Let go of the blocks that hold only tokens before `position`: nobody will see them."""
        while (self.num_dropped + 1) * self.block_size <= position:
            self.allocator.free(self.blocks[self.num_dropped])
            self.blocks[self.num_dropped] = DROPPED
            self.num_dropped += 1

    def free(self) -> None:
        """Let go of every block, the last one first, so that a prefix outlives what follows it."""
        raise NotImplementedError("Task 4.4: BlockTable.free is still to be written")

    def slot(self, position: int) -> int:
        """Where token `position` lies: physical block * block size + offset."""
        raise NotImplementedError("Task 4.1: BlockTable.slot is still to be written")

    def check_integrity(self) -> None:
        """Assert that the blocks are just enough, and that none of them stands here twice."""
        raise NotImplementedError("Task 4.5: BlockTable.check_integrity is still to be written")

    def must_copy(self, num_new_tokens: int) -> bool:
        """Whether the next tokens go into a block that another table holds too."""
        written = num_new_tokens > 0 and self.num_tokens % self.block_size > 0
        return written and self.allocator.ref_count(self.blocks[-1]) > 1

    def __repr__(self) -> str:
        return f"BlockTable({self.blocks}, {self.num_tokens} tokens)"
