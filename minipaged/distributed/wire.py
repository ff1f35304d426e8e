"""A connection between two ranks that carries lines of JSON, and who is at its ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple


class Peer(NamedTuple):
    """A rank as a person can find it."""

    rank: int
    pid: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @classmethod
    def this(cls, rank: int) -> Peer:
        """This process."""
        return cls(rank, os.getpid(), socket.gethostname())


class Address(NamedTuple):
    """Where rank 0 listens, and a word that strangers do not know."""

    host: str
    port: int
    secret: str


class Wire:
    """One end.  Whether the other one still listens shows when nothing comes any more."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        # A host without power closes nothing: ask it after 5 silent seconds, and 3 times more.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **line: Any) -> None:
        """Say something, if the other end still listens."""
        try:
            self._socket.sendall(json.dumps(line).encode() + b"\n")
        except OSError:
            return

    def lines(self) -> Iterator[dict[str, Any]]:
        """What the other end says, until it is gone, in whatever way."""
        try:
            with self._socket.makefile("r", encoding="utf-8") as file:
                yield from map(json.loads, file)
        except (OSError, ValueError):
            return

    def close(self) -> None:
        """End it for both, also for a thread of this process that listens."""
        shut(self._socket)


def shut(connection: socket.socket) -> None:
    """Close a socket, and wake up who waits for it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
