"""Block tables of all sequences over two pools of blocks, one on the device and one on the host.

The paper's KV cache manager (section 4.2) behind its three verbs, fork, append and free,
and swapping (section 4.5).  It knows sequence ids; it knows neither requests nor tensors,
and it moves no data: it returns the copies that somebody must make before the next
forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from minipaged.errors import ConfigurationError
from minipaged.memory.block_allocator import BlockAllocator, BlockId
from minipaged.memory.block_table import BlockCopy, BlockTable


class BlockManager:
    """Allocates, shares and moves KV blocks on behalf of sequences.

    A sequence has a table from its first `append` until `free`.  The table's blocks are all
    in one pool: on the device, or on the host while the sequence is swapped out.
    """

    def __init__(
        self,
        block_size: int,
        num_blocks: int,
        num_host_blocks: int = 0,
        on_free: Callable[[BlockId], None] | None = None,
    ) -> None:
        if block_size < 1:
            raise ConfigurationError(
                f"block_size is {block_size}; a block holds at least 1 token (16 is usual)"
            )
        if num_blocks < 1:
            raise ConfigurationError(
                f"num_blocks is {num_blocks}; the pool needs at least 1 block, "
                "or None to size it from the memory budget"
            )
        self.block_size = block_size
        self.device = BlockAllocator(num_blocks, on_free)
        self.host = BlockAllocator(num_host_blocks)
        self.tables: dict[int, BlockTable] = {}

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a sequence of `num_tokens` tokens fills, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def blocks_needed(self, seq_id: int, num_new_tokens: int) -> int:
        """Free device blocks that `append(seq_id, num_new_tokens)` would take."""
        table = self.tables.get(seq_id)
        if table is None:
            return self.blocks_for(num_new_tokens)
        return table.blocks_needed(num_new_tokens)

    def append(self, seq_id: int, num_new_tokens: int) -> BlockCopy | None:
        """Give the next tokens of a sequence their slots; the first call makes its table.

        Returns the copy-on-write to perform before the forward pass, if one is needed.
        """
        table = self.tables.get(seq_id)
        if table is None:
            table = BlockTable(self.block_size, self.device)
        copy = table.append(num_new_tokens)
        self.tables[seq_id] = table
        return copy

    def fork(self, parent_id: int, child_id: int) -> None:
        """Let a new sequence share all blocks of another one."""
        if child_id in self.tables:
            raise ValueError(f"sequence {child_id} has a block table already")
        self.tables[child_id] = self.tables[parent_id].fork()

    def free(self, seq_id: int) -> None:
        """Let go of a sequence's blocks; a sequence that has no table yet is no error."""
        table = self.tables.pop(seq_id, None)
        if table is not None:
            table.free()

    def swap_out(self, seq_ids: Iterable[int]) -> list[BlockCopy]:
        """Move the tables of a sequence group to the host pool; returns device -> host copies."""
        return self._move(seq_ids, self.device, self.host)

    def swap_in(self, seq_ids: Iterable[int]) -> list[BlockCopy]:
        """Move the tables of a sequence group back; returns host -> device copies."""
        return self._move(seq_ids, self.host, self.device)

    def _move(
        self, seq_ids: Iterable[int], source: BlockAllocator, target: BlockAllocator
    ) -> list[BlockCopy]:
        """All or nothing; blocks that the sequences share are moved once and stay shared."""
        tables = [self.tables[seq_id] for seq_id in seq_ids if seq_id in self.tables]
        target.check_available(len({block for table in tables for block in table.blocks}))
        moved: dict[BlockId, BlockId] = {}
        for table in tables:
            for i, block in enumerate(table.blocks):
                if block in moved:
                    target.share(moved[block])
                else:
                    moved[block] = target.allocate()
                table.blocks[i] = moved[block]
                source.free(block)
            table.allocator = target
        return [BlockCopy(*pair) for pair in moved.items()]

    @property
    def num_wasted_slots(self) -> int:
        """Device slots that are allocated and hold no token; a shared last block counts once."""
        last = {
            table.blocks[-1]: table.num_empty_slots
            for table in self.tables.values()
            if table.blocks and table.allocator is self.device
        }
        return sum(last.values())

    def check_integrity(self) -> None:
        """Assert T2 for both pools and T7 for every table."""
        for pool in (self.device, self.host):
            holds: Counter[BlockId] = Counter()
            for table in self.tables.values():
                if table.allocator is pool:
                    holds.update(table.blocks)
            pool.check_integrity(holds)
        for table in self.tables.values():
            table.check_integrity()

    def __repr__(self) -> str:
        tables = ", ".join(f"{seq_id}: {table.blocks}" for seq_id, table in self.tables.items())
        return f"tables {{{tables}}}   device {self.device}   host {self.host}"
