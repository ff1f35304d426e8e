"""Settings for every test, those of the lessons included."""

import os

# Two workers on two cores: threads of one that wait for those of the other cost more than they do.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, Phase, settings

_common = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("laptop", max_examples=50, **_common)
# CI draws the same examples every time: a failure there is a failure everywhere.
settings.register_profile("ci", max_examples=75, derandomize=True, **_common)
settings.register_profile("thorough", max_examples=3000, **_common)
# For learners: one failure at a time, the smallest, and the same when they test again.
settings.register_profile(
    "lesson",
    max_examples=100,
    derandomize=True,
    report_multiple_bugs=False,
    **{**_common, "print_blob": False},
)
# For lessons that must pass: whoever is right is right with the first examples.
settings.register_profile(
    "brief",
    max_examples=25,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    **_common,
)
# For the grader, which gives a seed: nobody knows the examples before.
settings.register_profile(
    "grading",
    max_examples=100,
    database=None,
    report_multiple_bugs=False,
    **{**_common, "print_blob": False},
)
# For planted bugs: it is enough to know that an example fails, not to find the smallest.
settings.register_profile(
    "planted",
    max_examples=150,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    **_common,
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "laptop")
)
