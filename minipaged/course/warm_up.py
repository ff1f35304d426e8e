"""What the first Hypothesis test of a process finds out: here before the process is forked."""

import warnings

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisSideeffectWarning


@settings(max_examples=5, database=None)
@given(st.lists(st.integers(), min_size=100))
def _any_test(_: list[int]) -> None:
    """Hypothesis looks through all modules for constants, once it draws one: one time in 20."""


with warnings.catch_warnings():
    # That something is drawn before pytest begins is meant.
    warnings.simplefilter("ignore", HypothesisSideeffectWarning)
    _any_test()
