"""Attention over a paged KV cache, chosen by name.

`contiguous.py` is the oracle.  `reference` walks the blocks as the paper's equation does,
`torch` gathers them and is what the engine uses.  A compiled kernel is one more entry.
"""

from __future__ import annotations

from collections.abc import Callable

from minipaged.attention import gathered, paged
from minipaged.attention.batch import PagedAttention, PagedBatch
from minipaged.errors import ConfigurationError

Prepare = Callable[[PagedBatch], PagedAttention]

BACKENDS: dict[str, Callable[[], Prepare]] = {
    "reference": lambda: paged.prepare,
    "torch": gathered.GatheredAttention,
}


def attention_backend(name: str) -> Prepare:
    """What prepares the attention of each step; raises ConfigurationError for an unknown name."""
    if name not in BACKENDS:
        raise ConfigurationError(
            f"there is no attention {name!r}; choose one of {', '.join(sorted(BACKENDS))}"
        )
    return BACKENDS[name]()
