"""Which of several replicas a prompt is sent to: one that has its beginning in the cache.

Every replica has a prefix cache of its own, so that a prompt is cheapest where prompts like it
went before, unless that replica is busier than the others.  Owns this choice; who asks, and
how requests travel, is `replicas.py`'s.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from minipaged.memory.prefix_cache import PrefixCache, PrefixHash

Replica = TypeVar("Replica")


class PrefixRouter(Generic[Replica]):
    """Remembers which prefixes were sent where, in full blocks.

    It sees the prompts and not the caches, and may believe in a block that a replica has given
    away since: a wrong guess costs time and changes no token.

    block_size: of the replicas, in tokens.
    slack: requests that a replica may have more than the least busy one and still be chosen.
    capacity: blocks to remember, least recently used ones being forgotten.
    """

    def __init__(self, block_size: int, slack: int = 4, capacity: int = 100_000) -> None:
        self.block_size = block_size
        self.slack = slack
        self.capacity = capacity
        self._names = PrefixCache(block_size)  # for its names of prefixes; it holds no block
        self._replicas: OrderedDict[PrefixHash, set[Replica]] = OrderedDict()
        self._num_sent: Counter[Replica] = Counter()

    def rank(
        self, prompt: Sequence[int], loads: Mapping[Replica, int], salt: bytes = b""
    ) -> list[Replica]:
        """The replicas, the best one for this prompt first.

        Of those that are not too busy, the one with most of the prompt; if that says nothing, the
        least busy one; and then the one that was sent least.
        loads: requests that each replica has.
        """
        most = min(loads.values(), default=0) + self.slack
        known = self.num_known(prompt, loads, salt)
        return sorted(
            loads, key=lambda r: (loads[r] > most, -known[r], loads[r], self._num_sent[r])
        )

    def num_known(
        self, prompt: Sequence[int], replicas: Iterable[Replica], salt: bytes = b""
    ) -> dict[Replica, int]:
        """Blocks with which the prompt begins, by the replica that should have them."""
        known = dict.fromkeys(replicas, 0)
        holders = set(known)
        for number, name in enumerate(self._chain(prompt, salt), 1):
            holders &= self._replicas.get(name, set())
            if not holders:
                break
            known.update(dict.fromkeys(holders, number))
        return known

    def remember(self, prompt: Sequence[int], replica: Replica, salt: bytes = b"") -> None:
        """A prompt was sent to a replica."""
        self._num_sent[replica] += 1
        # From its end, so that the beginning of a prefix is forgotten last.
        for name in reversed(list(self._chain(prompt, salt))):
            self._replicas.setdefault(name, set()).add(replica)
            self._replicas.move_to_end(name)
        while len(self._replicas) > self.capacity:
            self._replicas.popitem(last=False)

    def _chain(self, prompt: Sequence[int], salt: bytes) -> Iterable[PrefixHash]:
        name = salt
        for end in range(self.block_size, len(prompt) + 1, self.block_size):
            name = self._names.chain(name, tuple(prompt[end - self.block_size : end]))
            yield name
