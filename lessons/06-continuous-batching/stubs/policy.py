"""Who is served first: the one place to change the order of service.

A policy gives each sequence group a key.  The scheduler admits waiting groups from the
smallest key on, and preempts running ones from the largest on.  A key never changes, so
that a group cannot lose the place it has once reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from minipaged.errors import ConfigurationError
from minipaged.request.sequence import SequenceGroup

Policy = Callable[[SequenceGroup], Any]

PATIENCE = 64
UNLIMITED = 2**15  # tokens of a request that names no limit


def first_come_first_served(group: SequenceGroup) -> tuple[int, ...]:
    """In order of arrival (section 4.5)."""
    raise NotImplementedError("Task 6.1: first_come_first_served is still to be written")


def urgent_first(group: SequenceGroup) -> tuple[int, ...]:
    """As if a request of priority p had arrived after the next 64 p requests.

    So urgent requests overtake others, but no more than that many overtake any one request:
    nobody starves, whatever arrives (T6).
    """
    raise NotImplementedError("Task 6.1: urgent_first is still to be written")


def shortest_first(group: SequenceGroup) -> tuple[float, ...]:
    """Short outputs before long ones, within bounds.

    What is predicted is the most that was asked for, max_tokens.  Half as many tokens count like
    an arrival 64 requests earlier, so that a request for a thousand is overtaken by no more than
    640 later ones for a single token.
    """
    raise NotImplementedError("Task 6.1: shortest_first is still to be written")


POLICIES: dict[str, Policy] = {
    "fcfs": first_come_first_served,
    "priority": urgent_first,
    "shortest": shortest_first,
}


def policy_named(name: str) -> Policy:
    """The policy of this name; ConfigurationError if there is none."""
    if name not in POLICIES:
        raise ConfigurationError(
            f"there is no scheduling policy {name!r}; choose one of {', '.join(POLICIES)}"
        )
    return POLICIES[name]
