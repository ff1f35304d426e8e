"""Settings for every test, and the check that no block manager is left inconsistent."""

import os

# Two workers on two cores: threads of one that wait for those of the other cost more than they do.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, Phase, settings

from minipaged.memory.block_manager import BlockManager

_common = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("laptop", max_examples=50, **_common)
# CI draws the same examples every time: a failure there is a failure everywhere.
settings.register_profile("ci", max_examples=150, derandomize=True, **_common)
settings.register_profile("thorough", max_examples=3000, **_common)
# For planted bugs: it is enough to know that an example fails, not to find the smallest.
settings.register_profile(
    "planted",
    max_examples=150,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    **_common,
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "laptop")
)


@pytest.fixture(autouse=True)
def every_block_is_accounted_for(monkeypatch):
    """Count before and after: check every block manager that the test made (T2)."""
    managers = []
    construct = BlockManager.__init__

    def remember(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        managers.append(self)

    monkeypatch.setattr(BlockManager, "__init__", remember)
    yield
    for manager in managers:
        manager.check_integrity()
