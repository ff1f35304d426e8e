"""Runs learner code for the grader: in processes that may do little, and decide nothing.

The grader starts this once.  It imports what takes long, and forks a judge whenever it is asked
to.  A judge reads its order, runs pytest, and sends each result as a line to the grader, which
knows what results there must be.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import struct
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

PROCESS = struct.Struct("q")
"""What the grader and this say to each other: a process.

With the files of an order, of the results and of what is said, the grader asks for a judge, and is
told its process; with the process of a judge alone it asks for its end, and is told it again.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# What learner code has no reason to do, by the names of Python's audit events.
FORBIDDEN = _words(
    """
    os.system os.exec os.fork os.forkpty os.posix_spawn os.spawn os.startfile os.kill os.killpg
    os.remove os.rename os.rmdir os.mkdir os.chmod os.chown os.link os.symlink os.truncate
    os.scandir os.putenv os.unsetenv shutil. subprocess. socket. ctypes. pty. mmap. signal.
    sys.settrace sys.setprofile sys.monitoring sys.addaudithook gc.get_ marshal.dumps marshal.load
    _thread.start_new_thread code.__new__ object.__delattr__
    """
)
# Of these only the learner's own calls are meant, not those of what is called: an import loads
# code with marshal, and `class X(NamedTuple)` sets what else only tampering sets.
FORBIDDEN_DIRECTLY = frozenset(
    _words("exec compile sys._getframe sys._current_frames marshal.loads object.__setattr__")
)
# Of an object, by anybody on the learner's behalf: no import sets these.
FORBIDDEN_TO_SET = frozenset(("__code__", "__class__"))


def forbid(own: Path, readable: list[str]) -> None:
    """From now on code of this folder may not leave its place.

    readable: folders that may be read, when something that is called wants to.
    """
    home = str(own)
    looking = False  # the hook's own look at the stack is an event as well

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal looking
        if looking and event == "sys._getframe":
            return
        before, looking = looking, True
        try:
            if event == "open":
                suspect = not _may_open(arguments, readable)
            elif event == "os.listdir":  # an import looks for modules
                suspect = not _is_readable(arguments[0], readable)
            elif event == "object.__setattr__" and str(arguments[1]) in FORBIDDEN_TO_SET:
                suspect = True
            elif event in FORBIDDEN_DIRECTLY:
                suspect = _is_own(sys._getframe(1), home)
            else:
                suspect = event.startswith(FORBIDDEN)
            if suspect and _is_called_by(sys._getframe(1), home):
                raise PermissionError(f"learner code may not {event} {arguments[:1]}")
        finally:
            looking = before

    sys.addaudithook(hook)


def _may_open(arguments: tuple[Any, ...], readable: list[str]) -> bool:
    """Whether anybody may open this file: to read what Python and its libraries consist of."""
    name, mode = arguments[:2]
    if name is None or isinstance(name, int):
        return True
    writes = isinstance(mode, str) and bool(set(mode) & set("wax+"))
    # Linux keeps what Python and numpy ask of the machine in /proc and /sys.
    return not writes and _is_readable(name, [*readable, "/proc/", "/sys/", "/usr/", "/lib"])


def _is_readable(name: Any, folders: list[str]) -> bool:
    """Whether a path is one of these folders or in it.

    Of a class of the learner's own, it could say here one thing and to Python another.
    """
    if type(name) not in (str, bytes):
        return False
    return (os.path.realpath(os.fsdecode(name)) + "/").startswith(tuple(folders))


def _is_called_by(frame: Any, home: str) -> bool:
    """Whether learner code is among the callers."""
    while frame is not None:
        if _is_own(frame, home):
            return True
        frame = frame.f_back
    return False


def _is_own(frame: Any, home: str) -> bool:
    return frame.f_code.co_filename.startswith(home)


def limit(seconds: int, memory: int) -> None:
    """What this process and its children may use."""
    limits = {
        "RLIMIT_CPU": seconds,
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": 64 << 20,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 512,
    }
    for name, value in limits.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # macOS knows fewer
            resource.setrlimit(getattr(resource, name), (value, value))


class Sender:
    """A pytest plugin that sends every result as soon as it is there."""

    def __init__(self, channel: int, key: str) -> None:
        self._channel, self._key = channel, key

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One line for a case that passed, or for whatever failed of it."""
        if report.when == "call" or report.failed or report.skipped:
            text = "" if report.passed else str(report.longrepr)
            self._send({"case": report.nodeid, "passed": report.passed, "text": text[:4000]})

    def pytest_collectreport(self, report: Any) -> None:
        """A line for a test file that cannot be imported."""
        if report.failed:
            text = str(report.longrepr).strip()
            self._send({"broken": f"your file cannot be imported:\n{text[-1500:]}"})

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps({"key": self._key, **message}) + "\n"
        os.write(self._channel, line.encode())


def judge(order: dict[str, Any], results: int) -> None:
    """Run pytest as the order says, here and now.

    order: the `arguments` of pytest, the `environment`, a `key` to show that a result is from
        here; for learner code also `confined`: the `user` to run it as, the folder that is its
        `own`, what is `readable` (forbid), and `seconds` and `memory` (limit).
    """
    environment = order["environment"]
    os.environ.update(environment)
    tempfile.tempdir = None  # the order names another
    sys.argv = ["pytest"]
    from minipaged.course.warm_up import run_pytest  # everything, before learner code can

    sender = Sender(results, order.pop("key"))
    confined = order.get("confined")
    if confined is not None:
        sys.dont_write_bytecode = True
        if confined["user"] is not None:
            os.setgroups([])
            os.setgid(confined["user"])
            os.setuid(confined["user"])
        limit(confined["seconds"], confined["memory"])
        forbid(Path(confined["own"]), confined["readable"])
    code = run_pytest(order["arguments"], environment["HYPOTHESIS_STORAGE_DIRECTORY"], sender)
    sender._send({"ended": code})


def serve(control: socket.socket) -> None:
    """Fork judges, and end them, until the grader has gone."""
    from minipaged.course import warm_up  # noqa: F401

    judges: set[int] = set()
    while True:
        message, files, _, _ = socket.recv_fds(control, PROCESS.size, 3, socket.MSG_WAITALL)
        if not message:
            break
        (process,) = PROCESS.unpack(message)
        if files:
            process = os.fork()
            if process == 0:
                control.close()
                _begin(*files)
            judges.add(process)
            with contextlib.suppress(OSError):  # it has done so, and may have ended
                os.setpgid(process, process)
            for file in files:
                os.close(file)
        elif process in judges:  # not one of a server that has died
            judges.remove(process)
            kill(process)
            os.waitpid(process, 0)  # until now nobody else has its number
        control.sendall(PROCESS.pack(process))
    for process in judges:
        kill(process)


def _begin(order: int, results: int, said: int) -> None:
    """In a new process: be a judge, and end."""
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.close(said)
        with open(order, encoding="utf-8") as file:
            judge(json.load(file), results)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def kill(process: int) -> None:
    """End a judge, and all that it has started."""
    for send in (os.killpg, os.kill):  # it may have left its group
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(process, 9)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as grader:
        serve(grader)
