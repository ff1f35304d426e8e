"""A rank's end of its connection to rank 0; `lifeline.py` is the other."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any, NoReturn

from minipaged.distributed.lifeline import ORPHANED, PATIENCE
from minipaged.distributed.wire import Address, Peer, Wire

LAST_WORDS = 0.5
"""Seconds that rank 0 has to speak: when one rank has ended, torchrun ends the others."""


class WorkerLifeline:
    """The end of a rank other than 0.  When rank 0 says "end", or is gone, the process ends."""

    def __init__(self, address: Address, peer: Peer) -> None:
        self._leaving = False
        self._started = threading.Event()
        self._wire = Wire(socket.create_connection((address.host, address.port)))
        self._wire.send(secret=address.secret, peer=peer)
        threading.Thread(target=self._listen, daemon=True).start()

    def wait_for_start(self, arguments: dict[str, Any]) -> None:
        """Wait until all ranks are there and rank 0 has seen that they were asked for the same."""
        self._wire.send(word="asked", arguments=arguments)
        self._started.wait()

    def fail(self, because: str) -> None:
        """Say what went wrong here, for rank 0 to tell, before this process ends by itself."""
        self._leaving = True
        self._wire.send(word="failed", because=because)
        time.sleep(LAST_WORDS)

    def check(self) -> None:
        """Nothing to raise: where something failed, the process has ended."""

    def explain(self, error: RuntimeError) -> NoReturn:
        """A connection to another rank broke: rank 0 will know who is gone, and end this too."""
        because = str(error).splitlines()[0]
        self._wire.send(word="lost", because=because)
        time.sleep(2 * PATIENCE)
        os._exit(ORPHANED)

    def leave(self) -> None:
        """Say that the end that follows is meant."""
        self._leaving = True
        self._wire.send(word="bye")

    def _listen(self) -> None:
        for line in self._wire.lines():
            if line["word"] == "end" and not self._leaving:
                time.sleep(LAST_WORDS)
                os._exit(line["code"])
            self._started.set()
        if not self._leaving:
            os._exit(ORPHANED)
