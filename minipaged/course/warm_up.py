"""Imports what takes long, for a process that is forked whenever tests are to be run.

Whoever grades, or proves that a lesson is sound, runs pytest hundreds of times.  To start Python
with torch takes two seconds, and a fork of a process that has it a tenth of one.
"""

import contextlib
import gc
import importlib
import os
import warnings
from collections.abc import Sequence

import pytest
from _pytest.config import default_plugins
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.errors import HypothesisSideeffectWarning

from minipaged.course.testing import PLUGINS, WITHOUT

WANTED = [
    "torch",
    "numpy.random",
    *(f"_pytest.{plugin}" for plugin in default_plugins),
    "hypothesis.stateful",
    "jaxtyping",
    "typer",
    "rich",
    # The package, for what it imports; its own modules are imported anew where one is replaced.
    "minipaged.cli",
    "minipaged.serving.server",
    "minipaged.distributed.processes",
]
# By name, pytest would look for them among all that is installed.
_plugins = [importlib.import_module(name) for name in (*PLUGINS, "minipaged.course.plugin")]


def run_pytest(arguments: Sequence[str], hypothesis_folder: str, *plugins: object) -> int:
    """pytest in a fork of this process; returns its exit code.

    hypothesis_folder: where Hypothesis may keep what it finds out.
    plugins: besides those of the tests of the lessons.
    """
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    set_hypothesis_home_dir(hypothesis_folder)
    return int(pytest.main([*arguments, *WITHOUT], [*_plugins, *plugins]))


@settings(max_examples=5, database=None)
@given(st.lists(st.integers(), min_size=100))
def _any_test(_: list[int]) -> None:
    """Hypothesis looks through all modules for constants, once it draws one: one time in 20."""


for name in WANTED:
    # What is not installed, or asks for a task that is open, is met again by who tests with it.
    with contextlib.suppress(ImportError, NotImplementedError):
        importlib.import_module(name)
with warnings.catch_warnings():
    # That something is drawn before pytest begins is meant.
    warnings.simplefilter("ignore", HypothesisSideeffectWarning)
    _any_test()
gc.freeze()  # all this stays: nobody need look through it for garbage
