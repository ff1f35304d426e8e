"""The state of pools, tables and managers in the notation of the paper and of the lessons.

    table A: [7, 1] 6 tokens   table B: [7] 4 tokens   free: {0, 2, 3}   held twice: {7}

Reads only what every version of a module has: a learner's, a wrong one, the reference.
"""

from __future__ import annotations

from typing import Any

MOST_BLOCKS = 12  # of a set, before its rest is only counted


def block_set(blocks: Any) -> str:
    """Blocks in order, in braces; of many the first, and how many more there are."""
    shown = [str(block) for block in sorted(blocks)]
    if len(shown) > MOST_BLOCKS:
        shown[MOST_BLOCKS - 1 :] = [f"and {len(shown) - MOST_BLOCKS + 1} more"]
    return "{" + ", ".join(shown) + "}"


def pool_state(pool: Any) -> str:
    """The free list of an allocator, and the counts of the blocks that are held."""
    counts = {block: count for block, count in enumerate(pool._ref_counts) if count}
    cached = f"   cached: {block_set(pool._cached)}" if pool._cached else ""
    return f"free: {block_set(pool._free)}{cached}   counts: {counts}"


def table_state(table: Any) -> str:
    """A block table, how many tokens have a slot in it, and what is left in its pool."""
    return f"table: {table.blocks} {table.num_tokens} tokens   {pool_state(table.allocator)}"


def manager_state(manager: Any) -> str:
    """All tables of a block manager, and its pools."""
    tables = [
        f"table {name(seq_id)}: {table.blocks} {table.num_tokens} tokens"
        for seq_id, table in manager.tables.items()
    ]
    pools = [f"device {pool_state(manager.device)}"]
    if manager.host.num_blocks:
        pools.append(f"host {pool_state(manager.host)}")
    return "   ".join([*tables, *pools])


def name(seq_id: Any) -> str:
    """Sequence 0 is A, 1 is B, as in the paper's figures; what is named already keeps its name."""
    is_letter = isinstance(seq_id, int) and 0 <= seq_id < 26
    return chr(ord("A") + seq_id) if is_letter else str(seq_id)
