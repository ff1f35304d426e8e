"""A learner's kernels on the emulated GPU: compiled once, and what goes wrong fails the test."""

import functools
import shutil
import tempfile
from pathlib import Path

import quick_kernels
import torch

from minipaged.attention import build


@functools.cache
def compile_once(make):
    """What `make` makes of a copy of the sources, or what the compiler says if it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "cuda"
        shutil.copytree(build.SOURCES, sources)
        try:
            return make(sources), ""
        except RuntimeError as error:
            lines = str(error).replace(f"{sources}/", "").splitlines()
            first = next((i for i, line in enumerate(lines) if " error: " in line), 0)
            return None, "\n".join(lines[first : first + 6])


def compiled(make):
    """What `make` makes of the sources; the first error of the compiler fails the test."""
    result, complaint = compile_once(make)
    if result is None:
        raise AssertionError(f"your kernels do not compile:\n{complaint}")
    return result


def fail_as_reported(said):
    """What the emulator said: that a task is open, or that it stopped the kernel."""
    if "is still to be written" in said:
        raise NotImplementedError(said[said.index("Task ") :])
    raise AssertionError(f"the emulator stopped the kernel:\n{said}")


class Emulator:
    """The kernels in float64 for these head sizes; a report of the emulator fails the test."""

    def __init__(self, *head_sizes):
        self._make = functools.partial(
            quick_kernels.compile_kernels, dtypes=(torch.float64,), head_sizes=head_sizes
        )

    def __getattr__(self, function):
        kernels = compiled(self._make)

        def call(*arguments):
            try:
                return getattr(kernels, function)(*arguments)
            except RuntimeError as error:
                said = str(error)
            return fail_as_reported(said)

        return call
