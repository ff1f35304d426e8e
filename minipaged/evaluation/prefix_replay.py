"""A production trace replayed through the prefix cache alone; no model runs.

The format is Mooncake's: JSON lines whose `hash_ids` name the blocks of a prompt, equal ids for
equal prefixes.  Each id stands for one token of a block of one token here, so that the cache
that is measured is the engine's own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minipaged.errors import InvalidRequestError
from minipaged.evaluation.workload import read_file
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.prefix_cache import PrefixCache

NO_BLOCK = -1


@dataclass(frozen=True)
class Replay:
    """One replay, counted in blocks of the trace.

    pool_blocks: None is a pool large enough never to forget.
    refused: blocks of requests that are longer than the pool; they count as asked for.
    """

    pool_blocks: int | None
    requests: int
    blocks: int
    hits: int
    evictions: int
    refused: int
    seconds: float

    @property
    def hit_rate(self) -> float:
        """Share of the blocks asked for that were found, 0 to 1."""
        return self.hits / max(1, self.blocks)


def hash_ids(entry: Mapping[str, object]) -> list[int]:
    """The blocks of a prompt, as a line of the trace names them; ValueError for anything else."""
    blocks = entry["hash_ids"]
    if not isinstance(blocks, list) or not all(
        isinstance(block, int) and 0 <= block < 2**63 for block in blocks
    ):
        raise ValueError("hash_ids must be a list of whole numbers, 0 or more")
    return blocks


def read_block_trace(path: Path) -> list[list[int]]:
    """The blocks of every request, in order of arrival."""
    trace = []
    for number, line in enumerate(read_file(path).splitlines(), start=1):
        try:
            blocks = hash_ids(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequestError(
                f'line {number} of {path} is not {{"hash_ids": [0, 1, 2]}}: {error}'
            ) from error
        trace.append(blocks)
    if not trace:
        raise InvalidRequestError(f"{path} has no request; give it at least one line")
    return trace


def replay(trace: list[list[int]], pool_blocks: int | None) -> Replay:
    """Let each request find its prefix, take the other blocks, compute them and end."""
    start = time.perf_counter()
    cache = PrefixCache(1, seed=0)
    size = pool_blocks or sum(map(len, trace)) + 1
    manager = BlockManager(1, size, prefix_cache=cache)
    hits = refused = 0
    for request, blocks in enumerate(trace):
        if len(blocks) > size:
            refused += len(blocks)
            continue
        # One more token stands behind the blocks: a prompt keeps one to compute.
        found = manager.adopt_prefix(request, [*blocks, NO_BLOCK])
        hits += found
        if len(blocks) > found:
            manager.append(request, len(blocks) - found)
            manager.mark_computed(request, blocks)
        manager.free(request)
    seconds = time.perf_counter() - start
    total = sum(map(len, trace))
    return Replay(pool_blocks, len(trace), total, hits, cache.num_evictions, refused, seconds)
