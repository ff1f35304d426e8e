"""Settings for every test, those of the lessons included."""

import gc
import os

# Workers share the cores: threads of one that wait for those of another cost more than they do.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, Phase, settings

_common = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
# For learners and those who grade them: one failure at a time.
_one_failure = {**_common, "report_multiple_bugs": False}
# The story of the shortest failure explains enough.
_phases = [Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink]
_told = {**_one_failure, "max_examples": 100, "print_blob": False, "phases": _phases}
# It is enough to know that an example fails, not to find the smallest.
_unshrunk = {**_one_failure, "derandomize": True, "phases": [Phase.explicit, Phase.generate]}

settings.register_profile("laptop", max_examples=50, **_common)
# CI draws the same examples every time: a failure there is a failure everywhere.
settings.register_profile("ci", max_examples=40, derandomize=True, **_common)
settings.register_profile("thorough", max_examples=3000, **_common)
# For learners: the smallest failure, and the same when they test again.
settings.register_profile("lesson", derandomize=True, **_told)
# For the grader, which gives a seed: nobody knows the examples before.
settings.register_profile("grading", database=None, **_told)
# For planted bugs, and for solutions that must pass: who is right is right with the first examples.
settings.register_profile("planted", max_examples=150, **_unshrunk)
settings.register_profile("brief", max_examples=10, **_unshrunk)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "laptop")
)


def pytest_collection_finish():
    """All that was imported by now stays: nobody need look through it for garbage again."""
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread():
    """Small tensors are fastest on one thread: threads that wait for a turn take all the time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
