"""What the memory of the KV cache is used for at a moment: the categories of figure 2.

In slots.  `states` hold the keys and values of a token; `reserved` will, before the sequence
ends; `internal` were given to a sequence that will never use them; `external` are given to
nobody, or lost to the rounding of the buddy allocator.  Blocks that are free while nobody waits
for them are no waste, but count as external here as well: look at a full system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

from minipaged.memory.block_manager import BlockManager
from minipaged.memory.reservation import ReservationManager, ReservedTable


@dataclass(frozen=True)
class MemoryUse:
    """Slots, or means of them."""

    states: float = 0
    reserved: float = 0
    internal: float = 0
    external: float = 0

    def __add__(self, other: MemoryUse) -> MemoryUse:
        return MemoryUse(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __truediv__(self, divisor: float) -> MemoryUse:
        return MemoryUse(*(part / divisor for part in astuple(self)))

    @property
    def total(self) -> float:
        """All slots of the cache."""
        return sum(astuple(self))

    def shares(self) -> dict[str, float]:
        """Percent of the cache, by category."""
        raise NotImplementedError("Task 16.3: MemoryUse.shares is still to be written")


def memory_use(manager: BlockManager, final_lengths: Mapping[int, int]) -> MemoryUse:
    """Of the device's memory now.

    final_lengths: tokens that each sequence will have in the cache in the end.
    """
    raise NotImplementedError("Task 16.3: memory_use is still to be written")
