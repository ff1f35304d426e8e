"""The grader's side of judge.py: starts it, has it fork judges, listens to them and ends them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minipaged.course.judge import PROCESS, kill
from minipaged.course.lesson import LessonError


class Judges:
    """A process that has imported what takes long, and its forks, each of which tests once.

    folder: where they are, with a package of their own.
    environment: all that they know of this process's environment.
    complaints: a file for what that process says; if it dies, the next to ask starts another.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], complaints: Path) -> None:
        self._folder, self._environment, self._complaints = folder, environment, complaints
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs, open(self._complaints, "wb") as errors:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "minipaged.course.judge", str(theirs.fileno())],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the grader
            )

    def close(self) -> None:
        """End them all."""
        self._control.close()
        self._server.wait()

    def run(self, order: dict[str, Any], said: Path, seconds: float) -> list[dict[str, Any]]:
        """What a new judge sends of its order (judge.py), in so many seconds.

        said: the file for what it prints.  LessonError if there can be no judge.
        """
        key = secrets.token_hex(16)
        order_read, order_write = os.pipe()
        results_read, results_write = os.pipe()
        with (
            open(order_write, "w", encoding="utf-8") as orders,
            open(results_read, encoding="utf-8", errors="replace") as results,
        ):
            try:
                with open(said, "wb") as errors:
                    judge = self._ask(files=[order_read, results_write, errors.fileno()])
            finally:
                os.close(order_read)
                os.close(results_write)
            stop = threading.Timer(seconds, kill, [judge])
            stop.start()
            try:
                with contextlib.suppress(BrokenPipeError):
                    json.dump({**order, "key": key}, orders)
                    orders.close()
                return list(_messages(results, key))
            finally:
                stop.cancel()
                self._ask(judge)

    def _ask(self, process: int = 0, files: Sequence[int] = ()) -> int:
        """For a judge with these files, or for the end of one; see PROCESS."""
        with self._lock:
            if self._server.poll() is not None:
                self._control.close()
                self._start()
            try:
                socket.send_fds(self._control, [PROCESS.pack(process)], files)
                answer = self._control.recv(PROCESS.size, socket.MSG_WAITALL)
            except OSError:
                answer = b""
        if not answer:
            self._server.wait()  # until it has said why
            complaints = self._complaints.read_text("utf-8", errors="replace")
            raise LessonError(f"the process that judges has ended: {complaints[-2000:]}")
        return int(PROCESS.unpack(answer)[0])


def _messages(lines: Iterable[str], key: str) -> Iterator[dict[str, Any]]:
    """What the judge said; lines that do not have its key are nobody's."""
    for count, line in enumerate(lines):
        if count > 100_000:
            return
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict) and message.pop("key", None) == key:
                yield message
