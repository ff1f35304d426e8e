"""How the engine stands between two steps, as plain data: for metrics and the dashboard.

Made in the engine's thread, by way of `AsyncEngine.ask`; read anywhere.
"""

from __future__ import annotations

import operator
from dataclasses import astuple, dataclass

from minipaged.engine.engine import Engine
from minipaged.request.sequence import Status


@dataclass(frozen=True)
class EngineState:
    """Requests and blocks by state, and what was counted since the engine started.

    Of the device pool, a block is `exclusive` if one table holds it, `shared` if several do,
    `cached` if none does and the prefix cache can find it again, and `free` otherwise.
    """

    running: int
    waiting: int
    swapped: int
    exclusive_blocks: int
    shared_blocks: int
    cached_blocks: int
    free_blocks: int
    used_host_blocks: int
    free_host_blocks: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    recomputations: int
    swaps: int
    steps: int

    def __add__(self, other: EngineState) -> EngineState:
        """Of two engines together."""
        return EngineState(*map(operator.add, astuple(self), astuple(other)))


def engine_state(engine: Engine) -> EngineState:
    """Count; takes time proportional to the blocks in use."""
    scheduler, manager = engine.scheduler, engine.scheduler.manager
    device, host, cache = manager.device, manager.host, manager.prefix_cache
    held = {b for t in manager.tables.values() if t.allocator is device for b in t.held_blocks}
    shared = sum(device.ref_count(block) > 1 for block in held)
    swapped = sum(group.status is Status.SWAPPED for group in scheduler.waiting)
    return EngineState(
        running=len(scheduler.running),
        waiting=len(scheduler.waiting) - swapped,
        swapped=swapped,
        exclusive_blocks=len(held) - shared,
        shared_blocks=shared,
        cached_blocks=device.num_cached,
        free_blocks=device.num_blocks - len(held) - device.num_cached,
        used_host_blocks=host.num_used,
        free_host_blocks=host.num_blocks - host.num_used,
        prefix_queried_tokens=cache.num_queried_tokens if cache else 0,
        prefix_hit_tokens=cache.num_hit_tokens if cache else 0,
        recomputations=scheduler.preemption.num_recomputations,
        swaps=scheduler.preemption.num_swaps,
        steps=engine.num_steps,
    )
