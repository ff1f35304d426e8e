"""The trace page: its data are the records, it loads nothing, and a browser can step through it."""

import dataclasses
import json
import re
import string

import pytest
from hypothesis import given, settings
from runs import record, shared_record
from strategies import Request, Workload, workloads

from minipaged.engine.trace import Trace
from minipaged.visual.trace_page import trace_html, write_trace_html

RUN = Workload(
    tuple(Request((1, 2, 3, i), {"max_tokens": 14, "ignore_eos": True}) for i in range(4)),
    block_size=2,
    num_blocks=16,
    max_num_seqs=4,
    max_num_batched_tokens=12,
)
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028\"'&amp;<!--\n"


def data_of(page):
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


@settings(max_examples=25)
@given(workload=workloads())
def test_the_data_are_the_records(workload):
    trace, _ = record(workload)
    data = data_of(trace_html(trace))
    before = {}
    assert len(data["steps"]) == len(trace)
    for step, rec in zip(data["steps"], trace, strict=True):
        now = {}
        for seq, tokens, kept, dropped, host, *new in step["tables"]:
            blocks = (*before.get(seq, ((),))[0][:kept], *new)
            now[seq] = blocks, tokens, dropped, bool(host)
        assert now == {
            t.seq_id: (t.blocks, t.num_tokens, t.num_dropped, t.on_host) for t in rec.tables
        }
        assert step["shared"] == rec.num_shared_blocks
        assert [tuple(pair) for pair in step["swap_out"]] == list(rec.plan.swap_out)
        assert step["used"] == rec.num_used_blocks
        assert step["wasted"] == rec.num_wasted_slots
        assert step["preempted"] == list(rec.plan.preempted)
        before = now


def test_nothing_is_loaded_from_elsewhere():
    page = trace_html(record(RUN)[0])
    assert not re.findall(r"https?:(?!\" \+ \"//www\.w3\.org/2000/svg\")", page)
    assert not re.findall(r"(?:src|href|url|@import)\s*[=(]", page)
    assert "import(" not in page
    assert "fetch(" not in page


def test_hostile_text_is_data():
    trace = Trace()
    trace(shared_record()._replace(new_text={0: HOSTILE}))
    page = trace_html(trace, title="<b>&")
    assert data_of(page)["steps"][0]["text"]["0"] == HOSTILE
    assert HOSTILE not in page
    assert page.count("</script>") == 2
    assert "<title>&lt;b&gt;&amp;</title>" in page


def test_the_page_stays_small():
    requests = tuple(
        Request((1 + i % 12,) * 9, {"max_tokens": 50, "ignore_eos": True}) for i in range(30)
    )
    trace, _ = record(Workload(requests, 4, 200, 30, 60))
    assert len(trace) >= 50
    assert len(trace_html(trace)) < 300_000


def test_an_empty_trace_is_refused():
    with pytest.raises(ValueError, match="no step"):
        trace_html(Trace())


SHARING = Workload(
    (
        Request((1, 2, 3, 4, 5), {"n": 2, "max_tokens": 14, "ignore_eos": True}),
        Request(
            (1, 2, 3, 4, 6),
            {
                "best_of": 3,
                "use_beam_search": True,
                "temperature": 0.0,
                "max_tokens": 14,
                "ignore_eos": True,
            },
        ),
    ),
    block_size=2,
    num_blocks=24,
    max_num_seqs=8,
    max_num_batched_tokens=12,
    preemption="swap",
    num_host_blocks=20,
    prefix_caching=True,
)


CELLS = """Object.fromEntries(
  [...document.querySelectorAll('[data-part="pool"] .mp-block.used')].map(
    cell => [cell.dataset.block, cell.dataset.owner]))"""


HATCHED = """Object.fromEntries(
  [...document.querySelectorAll('[data-part="pool"] .mp-block.used .mp-new-part')].map(
    part => [part.parentElement.dataset.block,
             [Math.round(parseFloat(part.style.left) * %d / 100),
              Math.round(parseFloat(part.style.width) * %d / 100)]]))"""

DRAWN = """[...document.querySelectorAll('[data-part="pool"] .mp-block')].map(
  cell => cell.dataset.block)"""


def computed(record):
    """First slot and number of slots of each block that were written in a step by computing."""
    work = {w.seq_id: (w.num_computed_tokens, w.context_length) for w in record.plan.scheduled}
    slots = {}
    for table in record.device_tables:
        begin, end = work.get(table.seq_id, (0, 0))
        for index, block in enumerate(table.blocks, table.num_dropped):
            first = index * record.block_size
            written = range(max(begin, first), min(end, first + record.block_size))
            slots.setdefault(str(block), set()).update(position - first for position in written)
    return {block: [min(held), len(held)] for block, held in slots.items() if held}


@pytest.mark.parametrize("workload", [RUN, SHARING], ids=["plain", "sharing"])
def test_a_browser_steps_through_the_page(tmp_path, browser, workload):
    trace, engine = record(workload)
    if workload is SHARING:
        assert engine.scheduler.preemption.num_swaps > 0
        assert trace.saved_by_sharing > 0
    page = tmp_path / "trace.html"
    write_trace_html(trace, page)
    browser.look(1280, 900)
    browser.open(page.as_uri())

    def see(step):
        """At this step the page shows the blocks of the record, and who owns them."""
        browser.wait(f"document.querySelector('.mp-trace').dataset.step === '{step}'")
        expected = {}
        for table in sorted(trace.records[step].device_tables):
            for block in table.blocks:
                letter = string.ascii_letters.swapcase()[table.seq_id]
                expected[str(block)] = expected.get(str(block), "") + letter
        assert browser.ask(CELLS) == expected, f"step {step}"

    see(0)
    browser.click('[data-do="next"]')
    see(1)
    browser.press("ArrowRight")
    see(2)
    browser.click('[data-do="previous"]')
    see(1)
    browser.ask("document.querySelector('.mp-trace input').value = 9")
    browser.ask("document.querySelector('.mp-trace input').dispatchEvent(new Event('input'))")
    see(9)
    browser.ask("location.hash = '#step=4'")
    see(4)
    browser.click('[data-do="first"]')
    see(0)
    browser.click('[data-do="play"]')
    browser.wait("document.querySelector('.mp-trace').dataset.step >= 2")
    browser.click('[data-do="play"]')
    see(browser.ask("Number(document.querySelector('.mp-trace').dataset.step)"))
    for step in trace:
        browser.ask(f"location.hash = '#step={step.step}'")
        see(step.step)
        assert browser.ask(HATCHED % ((step.block_size,) * 2)) == computed(step), step.step
    assert browser.problems == []


def test_of_a_large_pool_the_blocks_in_use_are_drawn(tmp_path, browser):
    workload = dataclasses.replace(RUN, num_blocks=2000)
    trace, _ = record(workload)
    page = tmp_path / "trace.html"
    write_trace_html(trace, page)
    browser.look(1280, 900)
    browser.open(page.as_uri())
    before = set()
    for step in trace:
        browser.ask(f"location.hash = '#step={step.step}'")
        browser.wait(f"document.querySelector('.mp-trace').dataset.step === '{step.step}'")
        now = {str(block) for table in step.device_tables for block in table.blocks}
        assert set(browser.ask(DRAWN)) == now | before, step.step
        before = now
