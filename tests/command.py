"""`minipaged ...` as a user runs it, in a fork of a process that has imported what takes long.

To start Python and import torch takes two seconds, and most of what is asked of the command line
takes less.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from minipaged.course.proof import call_forked

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
    sys.argv = ["minipaged", *arguments]

    from minipaged.cli import main

    main()
