"""The check that no block manager is left inconsistent."""

import pytest

from minipaged.memory.block_manager import BlockManager


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
