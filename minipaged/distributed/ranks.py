"""The other ranks as rank 0 has them: alive, busy, stopped or lost."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time

import torch

from minipaged.distributed.communication import Communicator
from minipaged.distributed.lifeline import ORPHANED, REFUSED, Lifeline
from minipaged.errors import ConfigurationError, MinipagedError, RankDiedError

JOINING = 600.0  # seconds until every rank must have said who it is
LEAVING = 10.0  # and until it must have ended


class Ranks:
    """Everything that has to be ended when the model is not needed any more.

    processes: the ranks that this process started, by rank; torchrun looks after its own.
    folder: where they met, if it was in a file.
    threads: what torch is to have again when they are gone.
    """

    communicator: Communicator

    def __init__(
        self,
        lifeline: Lifeline,
        processes: dict[int, subprocess.Popen[bytes]] | None = None,
        folder: tempfile.TemporaryDirectory[str] | None = None,
        threads: int | None = None,
    ) -> None:
        self.lifeline = lifeline
        self._processes = processes or {}
        self._folder = folder
        self._threads = threads
        self._stopped = False

    def wait_for_all(self) -> None:
        """Wait until every rank is there; RankDiedError names one that will not come."""
        deadline = time.monotonic() + JOINING
        while not self.lifeline.wait_for_all(seconds=0.1):
            there = {peer.rank for peer in self.lifeline.arguments}
            for rank, process in self._processes.items():
                if rank not in there and process.poll() is not None:
                    raise RankDiedError(
                        f"rank {rank} (process {process.pid} on {socket.gethostname()}) ended with "
                        f"exit code {process.returncode} before it had joined; what it printed "
                        "says why"
                    )
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, self.lifeline.size)) - there)
                raise RankDiedError(
                    f"rank {missing[0]} did not join within {JOINING:g} seconds; is its host up, "
                    "and does it reach this one?"
                )

    def check(self) -> None:
        """Raise if nothing can be computed any more."""
        self.lifeline.check()
        if self._stopped:
            raise ConfigurationError(
                "the ranks of this model were ended with close(); make another LLM"
            )

    def break_off(self, error: BaseException) -> None:
        """What all ranks do together has not come to its end on rank 0, and others wait for it."""
        if self._stopped:
            return
        self.lifeline.fail(
            f"rank 0 broke off a step ({type(error).__name__}), and the other ranks cannot go on "
            "from the midst of it; make another LLM, or start again",
            REFUSED if isinstance(error, MinipagedError) else ORPHANED,
        )
        self._clear()

    def stop(self) -> None:
        """Let the others go, between two steps, and wait until they are gone."""
        if self.lifeline.failure is None:
            try:
                self.communicator.send_plan(None)
                self.lifeline.wait_for_goodbyes(LEAVING)
            except RankDiedError:
                pass  # what was to be ended is gone
        self._clear()

    def _clear(self) -> None:
        """Wait for the processes, which were told to end, and leave nothing behind."""
        if self._stopped:
            return
        self._stopped = True
        for process in self._processes.values():
            try:
                process.wait(LEAVING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.lifeline.close()
        if self._folder is not None:
            self._folder.cleanup()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
