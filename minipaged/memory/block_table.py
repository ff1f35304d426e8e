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


class BlockTable:
    """Logical to physical blocks of one sequence (section 4.3, figure 6).

    `num_tokens` counts the slots given out, those of the running step included.  All blocks
    but the last are full, so that less than one block is wasted (T7).
    """

    __slots__ = ("allocator", "block_size", "blocks", "num_tokens")

    def __init__(self, block_size: int, allocator: BlockAllocator) -> None:
        self.block_size = block_size
        self.allocator = allocator
        self.blocks: list[BlockId] = []
        self.num_tokens = 0

    @property
    def num_empty_slots(self) -> int:
        """Slots of the last block that hold no token: the waste."""
        return len(self.blocks) * self.block_size - self.num_tokens

    def blocks_needed(self, num_new_tokens: int) -> int:
        """Free blocks that `append(num_new_tokens)` would take, a copy-on-write included."""
        total = -(-(self.num_tokens + num_new_tokens) // self.block_size)
        return total - len(self.blocks) + self._must_copy(num_new_tokens)

    def append(self, num_new_tokens: int) -> BlockCopy | None:
        """Give slots to the next tokens, taking new blocks when the last one is full.

        A last block that is shared and about to be written is first replaced by a copy of
        its own; the caller must have the contents copied before the forward pass.  Raises
        OutOfBlocksError, with nothing changed, if the pool has too few free blocks.
        """
        num_tokens = self.num_tokens + num_new_tokens
        needed = self.blocks_needed(num_new_tokens)
        if needed == 0:
            self.num_tokens = num_tokens
            return None
        allocator = self.allocator
        allocator.check_available(needed)
        copy = None
        if self._must_copy(num_new_tokens):
            shared = self.blocks[-1]
            copy = BlockCopy(shared, allocator.allocate())
            self.blocks[-1] = copy.destination
            allocator.free(shared)
        while len(self.blocks) * self.block_size < num_tokens:
            self.blocks.append(allocator.allocate())
        self.num_tokens = num_tokens
        return copy

    def fork(self) -> BlockTable:
        """A second table over the same blocks; nothing is copied (section 4.4)."""
        child = BlockTable(self.block_size, self.allocator)
        child.blocks = self.blocks.copy()
        child.num_tokens = self.num_tokens
        for block in child.blocks:
            self.allocator.share(block)
        return child

    def free(self) -> None:
        """Let go of every block, the last one first."""
        for block in reversed(self.blocks):
            self.allocator.free(block)
        self.blocks.clear()
        self.num_tokens = 0

    def slot(self, position: int) -> int:
        """Where token `position` lies: physical block * block size + offset."""
        if not 0 <= position < self.num_tokens:
            raise IndexError(f"token {position} of a sequence of {self.num_tokens} has no slot")
        logical, offset = divmod(position, self.block_size)
        return self.blocks[logical] * self.block_size + offset

    def check_integrity(self) -> None:
        """Assert that the blocks are just enough, and each is held once by this table."""
        assert 0 <= self.num_empty_slots < max(self.block_size, 1), repr(self)
        assert len(set(self.blocks)) == len(self.blocks), f"a block stands twice in {self}"

    def _must_copy(self, num_new_tokens: int) -> bool:
        written = num_new_tokens > 0 and self.num_tokens % self.block_size > 0
        return written and self.allocator.ref_count(self.blocks[-1]) > 1

    def __repr__(self) -> str:
        return f"BlockTable({self.blocks}, {self.num_tokens} tokens)"
