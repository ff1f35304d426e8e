"""Block tables of all sequences over two pools of blocks, one on the device and one on the host.

The paper's KV cache manager (section 4.2) behind its three verbs, fork, append and free,
and swapping (section 4.5).  It knows sequence ids and token ids; it knows neither requests
nor tensors, and it moves no data: it returns the copies that somebody must make before the
next forward pass.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from minipaged.errors import ConfigurationError
from minipaged.memory.block_allocator import BlockAllocator, BlockId
from minipaged.memory.block_table import BlockCopy, BlockTable
from minipaged.memory.prefix_cache import PrefixCache, PrefixHash


class BlockManager:
    """Allocates, shares and moves KV blocks on behalf of sequences.

    A sequence has a table from its first `append`, `fork` or `adopt_prefix` until `free`.  The
    table's blocks are all in one pool: on the device, or on the host while the sequence is
    swapped out.

    num_host_blocks: room to swap to, bounded by the device pool, which never has more to swap.
    sliding_window: tokens that a query sees, itself included; blocks behind it are freed.
    prefix_cache: finds full blocks of earlier sequences again; None looks for none.
    """

    def __init__(
        self,
        block_size: int,
        num_blocks: int,
        num_host_blocks: int = 0,
        on_free: Callable[[BlockId], None] | None = None,
        sliding_window: int | None = None,
        prefix_cache: PrefixCache | None = None,
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
        if prefix_cache is not None and sliding_window is not None:
            raise ConfigurationError(
                f"the model's sliding window of {sliding_window} tokens frees the beginning of a "
                "sequence, which a prefix cache needs; leave enable_prefix_caching off "
                "(--no-prefix-cache)"
            )
        self.block_size = block_size
        self.sliding_window = sliding_window
        self.device = BlockAllocator(num_blocks, on_free)
        self.host = BlockAllocator(min(num_host_blocks, num_blocks))
        self.tables: dict[int, BlockTable] = {}
        self.prefix_cache = prefix_cache
        self._known: dict[int, tuple[int, PrefixHash]] = {}  # blocks remembered, hash of them
        if prefix_cache is not None:
            self.device.on_evict = prefix_cache.forget

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a sequence of `num_tokens` tokens fills, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def most_blocks(
        self, num_prompt_tokens: int, num_tokens: int, num_seats: int, tokens_at_once: int
    ) -> int:
        """Blocks that suffice for a new request by itself, whatever its sequences become.

        num_tokens: of each sequence in the end.  They share at least the full blocks of the
        prompt, unless a sliding window drops them.
        """
        each = self.most_blocks_each(num_tokens, tokens_at_once)
        shared = 0 if self.sliding_window is not None else num_prompt_tokens // self.block_size
        return shared + num_seats * (each - shared)

    def most_blocks_each(self, num_tokens: int, tokens_at_once: int) -> int:
        """Blocks that a sequence growing to `num_tokens` tokens ever holds at a time.

        tokens_at_once: of one `append`; with a sliding window they and the window are held,
        which may begin in the middle of a block.
        """
        if self.sliding_window is not None:
            held = self.sliding_window - 1 + tokens_at_once
            return min(self.blocks_for(num_tokens), self.blocks_for(held) + 1)
        return self.blocks_for(num_tokens)

    def expect(self, seq_id: int, num_prompt_tokens: int, num_tokens: int, num_seats: int) -> None:
        """A request will begin with this sequence; paging has nothing to prepare for it."""

    def has_room_to_begin(self, seq_id: int, num_blocks: int) -> bool:
        """Whether the request of this sequence may take so many blocks now."""
        return num_blocks <= self.device.num_free

    def blocks_needed(self, appends: Iterable[tuple[int, int]]) -> int:
        """Free device blocks that these appends take, each of (sequence id, new tokens)."""
        needed = 0
        writers: Counter[BlockId] = Counter()
        holders: dict[BlockId, int] = {}
        for seq_id, num_new_tokens in appends:
            table = self.tables.get(seq_id)
            if table is None:
                needed += self.blocks_for(num_new_tokens)
                continue
            needed += self.blocks_for(table.num_tokens + num_new_tokens) - len(table.blocks)
            if table.must_copy(num_new_tokens):
                block = table.blocks[-1]
                writers[block] += 1
                holders[block] = table.allocator.ref_count(block)
        # Of those who share a block and write it, the last one to hold it needs no copy.
        return needed + sum(min(n, holders[block] - 1) for block, n in writers.items())

    def append(self, seq_id: int, num_new_tokens: int) -> list[BlockCopy]:
        """Give the next tokens of a sequence their slots; the first call makes its table.

        Returns the copies-on-write to perform before the forward pass: with paging, one at most.
        """
        table = self.tables.get(seq_id)
        if table is None:
            table = BlockTable(self.block_size, self.device)
        copy = table.append(num_new_tokens)
        self.tables[seq_id] = table
        return [] if copy is None else [copy]

    def fork(self, parent_id: int, child_id: int, num_tokens: int | None = None) -> None:
        """Let a new sequence share all blocks of another one, or the full ones of `num_tokens`."""
        if child_id in self.tables:
            raise ValueError(f"sequence {child_id} has a block table already")
        self.tables[child_id] = self.tables[parent_id].fork(num_tokens)
        if num_tokens is None and parent_id in self._known:
            self._known[child_id] = self._known[parent_id]

    def free(self, seq_id: int) -> None:
        """Let go of a sequence's blocks; a sequence that has no table yet is no error."""
        table = self.tables.pop(seq_id, None)
        self._known.pop(seq_id, None)
        if table is not None:
            table.free()

    def num_blocks_held(self, seq_ids: Iterable[int]) -> int:
        """Blocks that these sequences hold together; shared ones count once."""
        tables = (self.tables[seq_id] for seq_id in seq_ids if seq_id in self.tables)
        return len({block for table in tables for block in table.held_blocks})

    def num_shared_tokens(self, seq_id: int, other_id: int) -> int:
        """Tokens in full blocks with which both sequences begin.

        With a sliding window it is 0: the beginning may be gone before it could be shared again.
        """
        if self.sliding_window is not None:
            return 0
        table, other = self.tables[seq_id], self.tables[other_id]
        pairs = zip(table.blocks, other.blocks, strict=False)
        num_equal = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        num_full = min(table.num_tokens, other.num_tokens) // self.block_size
        return min(num_equal, num_full) * self.block_size

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
        moving = [seq_id for seq_id in seq_ids if seq_id in self.tables]
        tables = [self.tables[seq_id] for seq_id in moving]
        target.check_available(self.num_blocks_held(moving))
        moved: dict[BlockId, BlockId] = {}
        for seq_id, table in zip(moving, tables, strict=True):
            self._known.pop(seq_id, None)  # what it has on the other side is not known there
            for i in range(len(table.blocks) - 1, table.num_dropped - 1, -1):
                block = table.blocks[i]
                if block in moved:
                    target.share(moved[block])
                else:
                    moved[block] = target.allocate()
                table.blocks[i] = moved[block]
                source.free(block)
            table.allocator = target
        return [BlockCopy(*pair) for pair in moved.items()]

    def cached_prefix(self, token_ids: Sequence[int], salt: PrefixHash = b"") -> list[BlockId]:
        """Blocks of the longest known prefix that leaves at least one token to compute.

        salt: see `PrefixCache.find`.
        """
        if self.prefix_cache is None:
            return []
        return self.prefix_cache.find(token_ids, (len(token_ids) - 1) // self.block_size, salt)

    def adopt_prefix(
        self,
        seq_id: int,
        token_ids: Sequence[int],
        is_counted: bool = True,
        salt: PrefixHash = b"",
    ) -> int:
        """Begin a sequence's table with the blocks of its known prefix; returns its tokens.

        A cached block that nobody holds is a free block, and taken like one.  Counts as a query
        unless told not to: what a sequence finds of itself after a preemption is no hit.
        """
        cache = self.prefix_cache
        if cache is None:
            return 0
        blocks = self.cached_prefix(token_ids, salt)
        num_tokens = len(blocks) * self.block_size
        if is_counted:
            cache.num_queried_tokens += len(token_ids)
            cache.num_hit_tokens += num_tokens
        if blocks:
            table = self.tables[seq_id] = BlockTable(self.block_size, self.device)
            for block in blocks:
                self.device.share(block)
            table.blocks, table.num_tokens = blocks, num_tokens
        return num_tokens

    @property
    def tracks_contents(self) -> bool:
        """Whether `mark_computed` does anything: with a sliding window or a prefix cache."""
        return self.sliding_window is not None or self.prefix_cache is not None

    def mark_computed(self, seq_id: int, token_ids: Sequence[int], salt: PrefixHash = b"") -> None:
        """All tokens that have a slot are in it now; to be called after every step.

        Frees the blocks that fell out of the sliding window, and makes full blocks known to the
        prefix cache.
        """
        table = self.tables.get(seq_id)
        if table is None:
            return
        if self.sliding_window is not None:
            # The next token sees itself and the window - 1 tokens before it.
            table.drop_before(table.num_tokens - self.sliding_window + 1)
        if self.prefix_cache is not None:
            self._remember(self.prefix_cache, seq_id, table, token_ids, salt)

    def _remember(
        self,
        cache: PrefixCache,
        seq_id: int,
        table: BlockTable,
        token_ids: Sequence[int],
        salt: PrefixHash,
    ) -> None:
        """Make the full blocks of a table known.

        Where another sequence was first with the same prefix, its block is shared and the one
        of this sequence freed: a prefix is stored once, and is forgotten from its end.
        """
        device = self.device
        first, prefix = self._known.get(seq_id, (0, salt))
        for i in range(first, table.num_tokens // self.block_size):
            tokens = tuple(token_ids[i * self.block_size : (i + 1) * self.block_size])
            parent = table.blocks[i - 1] if i else None
            prefix = cache.chain(prefix, tokens)
            block = table.blocks[i]
            known = cache.look_up(prefix, parent, tokens)
            if known is None:
                if not cache.insert(prefix, parent, tokens, block):
                    return  # another prefix has this hash, so what follows cannot be found
                device.remember(block)
            elif known != block:
                device.share(known)
                table.blocks[i] = known
                device.free(block)
            self._known[seq_id] = i + 1, prefix

    @property
    def num_wasted_slots(self) -> int:
        """Device slots that are allocated and hold no token; a shared last block counts once."""
        last = {
            table.blocks[-1]: table.num_empty_slots
            for table in self.tables.values()
            if table.held_blocks and table.allocator is self.device
        }
        return sum(last.values())

    def check_integrity(self) -> None:
        """Assert T2 for both pools and T7 for every table."""
        for pool in (self.device, self.host):
            holds: Counter[BlockId] = Counter()
            for table in self.tables.values():
                if table.allocator is pool:
                    holds.update(table.held_blocks)
            pool.check_integrity(holds)
        for table in self.tables.values():
            table.check_integrity()
        if self.prefix_cache is not None:
            self.prefix_cache.check_integrity(self.device.is_remembered)

    def __repr__(self) -> str:
        tables = ", ".join(f"{seq_id}: {table.blocks}" for seq_id, table in self.tables.items())
        return f"tables {{{tables}}}   device {self.device}   host {self.host}"
