"""The block map says what the tables say."""

import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from hypothesis import given, settings
from rich.console import Console
from runs import record, shared_record
from strategies import Request, Workload, workloads

from minipaged.engine.trace import StepRecord, TableRecord
from minipaged.scheduling.step_plan import StepPlan
from minipaged.visual import block_map as bm
from minipaged.visual.beam_tree import beam_tree

mpl.use("Agg")

RUN = Workload(
    tuple(Request((1, 2, 3, i), {"max_tokens": 14, "ignore_eos": True}) for i in range(4)),
    block_size=2,
    num_blocks=16,
    max_num_seqs=4,
    max_num_batched_tokens=12,
)


def text_of(renderable, width=110):
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@settings(max_examples=25)
@given(workload=workloads())
def test_every_block_stands_in_the_grid_once_with_its_owner(workload):
    trace, _ = record(workload)
    for step in trace:
        names = bm.letters(step.tables)
        cells = []
        for line in str(bm.pool_text(step, names)).splitlines():
            cells += re.findall(r".{4}", line[8:])
        assert len(cells) == step.num_blocks
        for block, cell in enumerate(cells):
            owners = [t for t in sorted(step.device_tables) if block in t.blocks]
            if not owners:
                assert cell.strip() == (bm.CACHED if block in step.cached_blocks else bm.FREE)
            else:
                assert names[owners[0].seq_id] in cell
                assert cell.endswith(str(len(owners)) if len(owners) > 1 else " ")
                filled = owners[0].filled_slots(block, step.block_size)
                assert (bm.LEVELS[-1] in cell) == (filled * 8 > 7 * step.block_size)


def test_a_shared_block_is_marked():
    text = str(bm.pool_text(shared_record(), bm.letters(shared_record().tables)))
    assert "A█2" in text  # its reference count
    assert text.count("2") == 1
    assert shared_record().num_used_blocks == 3
    assert shared_record().num_wasted_slots == 2 + 3


def test_the_summary_of_a_run():
    trace, engine = record(RUN)
    text = text_of(bm.run_summary(trace))
    fullest = max(trace.records, key=lambda r: r.num_used_blocks)
    used = {block for table in fullest.tables for block in table.blocks}
    empty = len(used) * 2 - sum(table.num_tokens for table in fullest.tables)
    assert f"{len(used)} of 16 blocks used" in text
    assert f"{empty} slots wasted: {empty / len(used) / 2:.1%}" in text
    assert f"preemptions: {engine.scheduler.num_preemptions};" in text
    for i, letter in enumerate("ABCD"):
        (line,) = [li for li in text.splitlines() if f"request {i}" in li]
        assert line.strip().startswith(letter)
        last = trace.last_tables()[i]
        assert f"[{', '.join(map(str, last.blocks))}]  last block 1/2 full" in line


@pytest.mark.parametrize("num_blocks", [600, 100_000])
def test_large_pools_and_long_tables_stay_short(num_blocks):
    table = TableRecord(0, "long", tuple(range(0, 580, 2)), 290 * 16)
    step = StepRecord(0, 0.1, StepPlan(), 16, num_blocks, (table,), (), (), {}, {}, 0)
    text = text_of(bm.block_map(step))
    assert len(text.splitlines()) < 40
    assert "[0, 2, 4, 6, 8, 10, … 278 more …, 568, 570, 572, 574, 576, 578]" in text


def test_how_many_used_blocks_are_left_out_is_said():
    tables = tuple(TableRecord(i, str(i), (i,), 1) for i in range(600))
    step = StepRecord(0, 0.1, StepPlan(), 16, 8192, tables, (), (), {}, {}, 0)
    assert "only used blocks are shown, of 8192, and 88 more are used" in text_of(
        bm.block_map(step)
    )


def test_many_sequences_have_names_of_their_own():
    tables = tuple(TableRecord(i, str(i), (i,), 1) for i in range(120))
    names = bm.letters(tables)
    assert len(set(names.values())) == 120
    assert [names[0], names[25], names[26], names[52]] == ["A", "Z", "a", "#52"]


@settings(max_examples=25)
@given(workload=workloads(crowded=True))
def test_every_run_has_a_summary(workload):
    """Swapped, shared, forked or dropped: whatever happened, there is a picture of it."""
    trace, engine = record(workload)
    text = text_of(bm.run_summary(trace))
    assert ("moved to the host" in text) == (engine.scheduler.preemption.num_swaps > 0)
    shared = any(step.num_shared_blocks for step in trace)
    assert ("saved by" in text) == shared
    assert ("prefix cache: " in text) == workload.prefix_caching
    for request_id in trace.records[0].running:
        assert "prompt" in text_of(beam_tree(trace, request_id, "prompt"))
    bm.plot_block_map(trace.fullest)
    plt.close("all")


def test_the_figure_shows_every_block():
    trace, _ = record(RUN)
    ax = bm.plot_block_map(trace.fullest)
    used = trace.fullest.num_used_blocks
    assert len(ax.patches) == 16 + used
    labels = [t.get_text() for t in ax.texts]
    for table in trace.fullest.tables:
        for i in range(len(table.blocks)):
            assert f"{'ABCD'[table.seq_id]}{i}" in labels
    ax.figure.canvas.draw()
