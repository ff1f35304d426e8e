"""The book builds without a warning, leads nowhere dead, loads nothing, and works in a browser."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from once import once

ROOT = Path(__file__).parents[1]
SCREENSHOTS = os.environ.get("MINIPAGED_SCREENSHOTS")
"""A folder for pictures of all pages, if anybody wants to look at them."""
sys.path.insert(0, str(ROOT / "book"))
import generate  # noqa: E402


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The built book; every notebook is run, or was run before with the same text."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "book"
    once(folder, lambda: build(folder))
    return folder / "html"


def build(folder):
    command = ["-m", "sphinx", "-W", "--keep-going", "-q", "-c", "book", "-b", "html"]
    command += ["-d", str(folder / "doctrees"), ".", str(folder / "html")]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]


class Links(HTMLParser):
    """What a page loads, where it leads, and what can be led to."""

    def __init__(self):
        super().__init__()
        self.loads, self.leads, self.ids = [], [], set()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag == "a" and attributes.get("href"):
            self.leads.append(attributes["href"])
        elif tag == "link" and attributes.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(attributes["href"])
        elif attributes.get("src"):
            self.loads.append(attributes["src"])


def links(page):
    parser = Links()
    parser.feed(page.read_text("utf-8"))
    return parser


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_book_leads_nowhere_dead_and_loads_nothing_from_elsewhere(book):
    pages = {page: links(page) for page in book.rglob("*.html") if "_static" not in page.parts}
    assert len(pages) > 30
    for page, found in pages.items():
        for target in found.loads:
            if not target.startswith("data:"):
                assert not urlsplit(target).netloc, f"{page.name} loads {target}"
                assert (page.parent / unquote(urlsplit(target).path)).exists(), (page.name, target)
        for target in found.leads:
            parts = urlsplit(target)
            if parts.scheme or target in ("#", ""):
                continue
            other = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert other.exists(), f"{page.name} leads to {target}"
            if parts.fragment and other in pages and not parts.fragment.startswith("module-"):
                assert unquote(parts.fragment) in pages[other].ids, f"{page.name}: {target}"
    for style in book.rglob("*.css"):
        for url in re.findall(r"url\(([^)]+)\)|@import\s+['\"]([^'\"]+)", style.read_text("utf-8")):
            assert not "".join(url).strip("'\"").startswith(("http", "//")), style


STEP = """(() => {
  const steps = [];
  for (const stepper of document.querySelectorAll(".minipaged-stepper")) {
    const before = stepper.querySelector("svg").innerHTML;
    stepper.querySelector('[data-do="next"]').click();
    const range = stepper.querySelector("input");
    steps.push([stepper.querySelector("output").textContent,
                stepper.querySelector("svg").innerHTML !== before || range.max === "0"]);
    range.value = range.max;
    range.dispatchEvent(new Event("input"));
    steps.push([stepper.querySelector("output").textContent, true]);
  }
  const page = document.documentElement;
  return {steps, wide: page.scrollWidth > page.clientWidth + 2,
          missing: [...document.images].filter(i => !i.naturalWidth && i.loading !== "lazy")
                                       .map(i => i.src)};
})()"""


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_browser_opens_every_page_and_steps_the_steppers(browser, book):
    num_steppers = 0
    pages = sorted([*book.glob("book/**/*.html"), *book.glob("lessons/*/*.html")])
    assert len(pages) > 30
    # Every other one as narrow as a phone, and those together: a new size draws the page again.
    sizes = {page: (390, 844) if i % 2 else (1280, 900) for i, page in enumerate(pages)}
    for page in sorted(pages, key=sizes.get):
        browser.look(*sizes[page])
        browser.open(page.as_uri())
        result = browser.ask(STEP)
        assert browser.problems == [], page
        assert result["missing"] == [], page
        assert not result["wide"], f"{page} is wider than its window of {sizes[page]}"
        for shown, changed in result["steps"]:
            assert changed, f"{page}: a stepper stands still"
            assert re.fullmatch(r"\d+ / \d+", shown)
        num_steppers += len(result["steps"]) // 2
        if SCREENSHOTS:
            name = "-".join(page.relative_to(book).with_suffix("").parts)
            browser.picture(Path(SCREENSHOTS) / f"{name}.png")
    assert num_steppers >= 5


def test_the_paper_map_covers_the_paper_and_leads_somewhere():
    text = generate.paper_map()  # raises DeadLinkError at the first entry that leads nowhere
    for number in range(1, 20):
        figure = rf"(?i)figures? {number}\b|figure {number}a\b"
        known = number in (6, 7) or re.search(figure, text) or (number == 18)
        assert known, f"figure {number} is not in the paper map"
    for section in (
        "1",
        "2.1",
        "2.2",
        "2.3",
        "3",
        "3.1",
        "4.1",
        "4.2",
        "4.3",
        "4.4",
        "4.5",
        "4.6",
        "5.1",
        "5.2",
        "6.1",
        "6.2",
        "6.3",
        "6.4",
        "6.5",
        "7.1",
        "7.2",
        "7.3",
        "8",
        "9",
    ):
        assert re.search(rf"Section {re.escape(section)}\b", text), f"section {section} is missing"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"code": ["minipaged/memory/block_alocator.py"]}, "there is no file"),
        (
            {"code": ["minipaged/memory/block_table.py::BlockTable.apend"]},
            "there is no BlockTable.ap",
        ),
        ({"tests": ["tests/test_engine.py::test_nothing"]}, "there is no test_nothing"),
        ({"lessons": [99]}, "there is no lesson 99"),
        ({"results": ["fig99"]}, "there is no result fig99"),
    ],
)
def test_a_dead_link_of_the_paper_map_is_named(entry, message):
    with pytest.raises(generate.DeadLinkError, match=message):
        generate.check_entry({"place": "Section 0", **entry}, range(19))


def test_the_api_has_every_public_module(tmp_path):
    generate.write_all(tmp_path)
    memory = (tmp_path / "api" / "memory.md").read_text()
    assert "## `minipaged.memory.block_table`" in memory
    assert "append(self, num_new_tokens: int) -> BlockCopy | None" in memory
    (tmp_path / "api" / "old.md").write_text("of a room that is gone")
    generate.write_all(tmp_path)
    assert not (tmp_path / "api" / "old.md").exists()
