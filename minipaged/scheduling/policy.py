"""Who is served first: the one place to change the order of service.

A policy gives each sequence group a key.  The scheduler admits waiting groups from the
smallest key on, and preempts running ones from the largest on.  A key never changes, so
that a group cannot lose the place it has once reached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minipaged.errors import ConfigurationError
from minipaged.request.sequence import SequenceGroup

Policy = Callable[[SequenceGroup], Any]

PATIENCE = 64


def first_come_first_served(group: SequenceGroup) -> tuple[int, ...]:
    """In order of arrival (section 4.5)."""
    return (group.arrival,)


def urgent_first(group: SequenceGroup) -> tuple[int, ...]:
    """As if a request of priority p had arrived after the next 64 p requests.

    So urgent requests overtake others, but no more than that many overtake any one request:
    nobody starves, whatever arrives (T6).
    """
    return (group.arrival + PATIENCE * group.priority, group.arrival)


POLICIES: dict[str, Policy] = {"fcfs": first_come_first_served, "priority": urgent_first}


def policy_named(name: str) -> Policy:
    """The policy of this name; ConfigurationError if there is none."""
    if name not in POLICIES:
        raise ConfigurationError(
            f"there is no scheduling policy {name!r}; choose one of {', '.join(POLICIES)}"
        )
    return POLICIES[name]
