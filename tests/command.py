"""`minipaged ...` as a user runs it, in a fork of a process that has imported what takes long.

To start Python and import torch takes two seconds, and most of what is asked of the command line
takes less.
"""

import atexit
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from minipaged.course.proof import call_forked, forked
from minipaged.course.testing import PLUGINS, WITHOUT

LEAN = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_ADDOPTS": " ".join([*(f"-p{name}" for name in PLUGINS), *WITHOUT]),
}
"""For a pytest that is started by itself: to look for plugins takes it a third of a second."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}


def minipaged(*arguments, text="", environment=None):
    """Run the command with these arguments, this input and more variables of the environment.

    Returns what subprocess.run does.
    """
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "input").write_text(text)
        code = call_forked(_main, (arguments, folder, environment or {}), seconds=200)
        if code is None:
            raise subprocess.TimeoutExpired(arguments, 200)
        out, errors = (Path(folder, name).read_text() for name in ("output", "errors"))
        return subprocess.CompletedProcess(arguments, code, out, errors)


def _main(arguments, folder, environment):
    """In the new process: its files in place of the terminal, then what `minipaged` calls."""
    os.dup2(os.open(f"{folder}/input", os.O_RDONLY), 0)
    for number, name in enumerate(("output", "errors"), start=1):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdin = os.fdopen(0)
    os.environ.update({**ENVIRONMENT, **environment})
    run_command(arguments)


def run_command(arguments):
    """What `minipaged` calls, in a process that was forked for it."""
    sys.argv = ["minipaged", *arguments]

    from minipaged.cli import main

    main()


class Forked:
    """A function at work in such a fork, with what of subprocess.Popen is needed to talk to it.

    environment: all variables that it has.
    inherits: it prints where this process does; otherwise what it prints can be read here.
    """

    def __init__(self, function, *arguments, environment, inherits=False):
        if inherits:
            outputs = os.dup(1), os.dup(2)
        else:
            readable, writable = os.pipe()
            self.stdout = open(readable)  # noqa: SIM115
            self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
            outputs = writable, os.dup(self._stderr.fileno())
        # Connections, for those find their way into another process.
        outputs = [Connection(output, readable=False) for output in outputs]
        self._process = forked(_call, (function, arguments, environment, outputs))
        self.pid = self._process.pid
        for output in outputs:
            output.close()

    def poll(self):
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        with self.stdout, self._stderr:
            out = self.stdout.read()
            self.wait(timeout)
            self._stderr.seek(0)
            return out, self._stderr.read()


def _call(function, arguments, environment, outputs):
    """In the new process: as one that was started with these variables, to its end."""
    import torch

    for number, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), number)
        output.close()
    # Streams that know what these are: whether one can seek in it, say.
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # it was read when torch was imported
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def _fork_rank(command, env, stdin):
    return Forked(_be_a_rank, command[-2:], environment=env, inherits=True)


def _be_a_rank(arguments):
    sys.argv = ["worker", *arguments]

    from minipaged.distributed.worker import main

    main()


FORKS_RANKS = SimpleNamespace(Popen=_fork_rank, DEVNULL=subprocess.DEVNULL)
"""What `processes.py` may have for `subprocess`, to start ranks that need not import torch."""
