"""What the tests share: a check that no block manager is left inconsistent, and a browser."""

import pytest
from browser import CHROMIUM, Browser

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


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A headless Chromium (browser.py), or no test."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path to open the page with")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """The same for all tests; whatever page one of them has opened is left."""
    yield chromium
    chromium.open("about:blank")
