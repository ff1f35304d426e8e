"""Who is alive: every rank keeps a connection to rank 0 on which it has said who it is.

The system closes the connection of a process that dies, however it dies and whatever it was
doing, so the other end knows within a moment.  A rank that leaves says so before.  Rank 0 tells
the others that one is gone; they end at once, and so do all when rank 0 itself is gone.

A rank says who it is, then "asked" (its arguments), and later "failed", "lost" (a connection to
some other rank) or "bye".  Rank 0 says "start", and "end" with an exit code where something failed.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

from minipaged.distributed.wire import Address, Peer, Wire, shut
from minipaged.errors import RankDiedError

REFUSED, ORPHANED = 2, 1  # exit codes: for what was asked, and for what became of another rank
PATIENCE = 5.0  # seconds to wait for news that must be on their way


class Lifeline:
    """Rank 0's end of all connections.

    host: the name or number by which the others reach this one.
    failure: what the first rank that failed or died makes impossible; None while all live.
    told: whether it was raised, so that this process knows and ends by itself.
    on_failure: is called once, from another thread, when it is set.
    """

    def __init__(self, size: int, host: str) -> None:
        self.size = size
        self.failure: RankDiedError | None = None
        self.told = False
        self.on_failure: Callable[[], None] = lambda: None
        self.arguments: dict[Peer, dict[str, Any]] = {}
        self._wires: dict[int, Wire] = {}
        self._ended: set[int] = set()
        self._lost = ""
        self._changed = threading.Condition()
        here = host.startswith("127.")
        self._listener = socket.create_server((host if here else "", 0))
        self.address = Address(host, self._listener.getsockname()[1], secrets.token_hex(16))
        threading.Thread(target=self._accept, daemon=True).start()

    def wait_for_all(self, seconds: float) -> bool:
        """Wait until every rank has said who it is; RankDiedError if one cannot come."""
        with self._changed:
            self._changed.wait_for(self._is_settled, seconds)
        self.check()
        return len(self.arguments) == self.size - 1

    def _is_settled(self) -> bool:
        return self.failure is not None or len(self.arguments) == self.size - 1

    def check(self) -> None:
        """Raise what is known to have failed."""
        if self.failure is not None:
            self.told = True
            raise self.failure

    def wait_for_failure(self, seconds: float) -> None:
        """Wait until there is something to `check`, but no longer than this."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None, seconds)

    def explain(self, error: RuntimeError) -> RankDiedError:
        """What broke a connection between the ranks: the failure that will be known soon."""
        self.wait_for_failure(PATIENCE)
        if "Timed out" in str(error):
            sentence = (
                "the other ranks were waited for in vain in the middle of a step: one of them is "
                "stuck, or waits for something else; start them again"
            )
        else:
            said = self._lost or str(error).splitlines()[0]
            sentence = f"the ranks lost the connection to each other ({said}); start them again"
        self.fail(sentence)  # unless more is known by now
        assert self.failure is not None
        self.told = True
        return self.failure

    def fail(self, sentence: str, code: int = ORPHANED) -> None:
        """From now on nothing works any more, for this reason; all other ranks end with `code`."""
        with self._changed:
            if self.failure is not None:
                return
            self.failure = RankDiedError(sentence)
            self._changed.notify_all()
        self.on_failure()
        self.tell("end", code)

    def tell(self, word: str, code: int = 0) -> None:
        """Say a word to every rank that is there."""
        for wire in list(self._wires.values()):
            wire.send(word=word, code=code)

    def wait_for_goodbyes(self, seconds: float) -> None:
        """Wait until every rank has closed its end."""
        with self._changed:
            self._changed.wait_for(lambda: self._wires.keys() <= self._ended, seconds)

    def close(self) -> None:
        """Close all connections; who is still there takes it as the end."""
        shut(self._listener)
        for wire in list(self._wires.values()):
            wire.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._attend, args=(Wire(connection),), daemon=True).start()

    def _attend(self, wire: Wire) -> None:
        """Listen to one rank until its end."""
        lines = wire.lines()
        first: dict[str, Any] = next(lines, {})
        if first.get("secret") != self.address.secret:
            wire.close()
            return
        peer, said = Peer(*first["peer"]), ""
        self._wires[peer.rank] = wire
        if self.failure is not None:
            wire.send(word="end", code=ORPHANED)  # it comes too late
        for line in lines:
            said = line["word"]
            if said == "asked":
                with self._changed:
                    self.arguments[peer] = line["arguments"]
                    self._changed.notify_all()
            elif said == "failed":
                self.fail(f"{peer} failed: {line['because']}")
            elif said == "lost":
                self._lost = f"{peer}: {line['because']}"
        if said in ("", "asked"):
            self.fail(
                f"{peer} died, and the other ranks cannot go on without it; look for its last "
                "words, or whether its memory ran out, and start all ranks again"
            )
        with self._changed:
            self._ended.add(peer.rank)
            self._changed.notify_all()
