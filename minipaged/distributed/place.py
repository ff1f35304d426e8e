"""Which rank this process is, as its environment says.

The variables are torchrun's (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, and MASTER_ADDR for
its store), or those that `processes.py` sets for the ranks that it starts.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

from minipaged.models.shard import Shard

STORE_FILE = "MINIPAGED_STORE"
LOOPBACK = "127.0.0.1"


class Place(NamedTuple):
    """Which rank this process is, and where on its host."""

    shard: Shard
    local_rank: int
    local_size: int

    @property
    def host(self) -> str:
        """The name or number by which the other ranks reach this one."""
        if self.local_size == self.shard.size:
            return LOOPBACK
        master = os.environ["MASTER_ADDR"]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))  # sends nothing: it asks which way it would go
            number = probe.getsockname()[0]
        return master if number.startswith("127.") else number


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that torchrun, or `processes.py`, gave this process; None if it is on its own."""
    if not {"RANK", "WORLD_SIZE"} <= environment.keys():
        return None
    if "MASTER_ADDR" not in environment and STORE_FILE not in environment:
        return None  # other programs count their processes with these names as well
    size = int(environment["WORLD_SIZE"])
    return Place(
        Shard(int(environment["RANK"]), size),
        int(environment.get("LOCAL_RANK", environment["RANK"])),
        int(environment.get("LOCAL_WORLD_SIZE", size)),
    )
