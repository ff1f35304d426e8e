"""The block map: which physical block belongs to whom, how full it is, who shares it.

One text for the terminal, one matplotlib figure for notebooks and the README.  Both show
the state at the end of one step, as the record of that step has it.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from minipaged.engine.trace import StepRecord, TableRecord, Trace
from minipaged.memory.block_allocator import BlockId
from minipaged.request.sequence import SequenceId

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")
LEVELS = "▁▂▃▄▅▆▇█"
FREE = "·"
CACHED = "∘"
MOST_BLOCKS = 512  # shown one by one
MOST_ENTRIES = 12  # of a block table, before its middle is left out
PAPER = "systems before PagedAttention kept token states in 20.4 % to 38.2 % of the memory (fig. 2)"


def letters(record_tables: tuple[TableRecord, ...]) -> dict[SequenceId, str]:
    """A short name for each sequence: A to Z, then a to z, then numbers."""
    names = string.ascii_letters[26:] + string.ascii_letters[:26]
    return {
        table.seq_id: names[i] if i < len(names) else f"#{i}"
        for i, table in enumerate(sorted(record_tables))
    }


def owners(record: StepRecord) -> dict[BlockId, list[TableRecord]]:
    """The tables that hold each used block; more than one where it is shared."""
    held: dict[BlockId, list[TableRecord]] = {}
    for table in sorted(record.device_tables):
        for block in table.blocks:
            held.setdefault(block, []).append(table)
    return held


def pool_text(record: StepRecord, names: dict[SequenceId, str], width: int = 16) -> Text:
    """The pool as a grid: the owner's name, how full the block is, and how many share it."""
    held, cached = owners(record), frozenset(record.cached_blocks)
    blocks = range(record.num_blocks)
    if record.num_blocks > MOST_BLOCKS:
        blocks = sorted(held)[:MOST_BLOCKS]  # type: ignore[assignment]
    text = Text()
    for place, block in enumerate(blocks):
        if place % width == 0:
            text.append(f"\n{block:6}  " if place else f"{block:6}  ", style="dim")
        if block not in held:
            text.append(f" {CACHED if block in cached else FREE}  ", style="dim")
            continue
        first = held[block][0]
        filled = first.filled_slots(block, record.block_size)
        level = LEVELS[max(0, -(-filled * len(LEVELS) // record.block_size) - 1)]
        count = len(held[block])  # the reference count
        shared = " " if count == 1 else str(count) if count < 10 else "+"
        text.append(f"{names[first.seq_id]:>2}{level}{shared}", style=color(first.seq_id))
    if len(blocks) < record.num_blocks:
        more = len(held) - len(blocks)
        left_out = f", and {more} more are used" if more else ""
        text.append(
            f"\n        only used blocks are shown, of {record.num_blocks}{left_out}", style="dim"
        )
    return text


def color(seq_id: SequenceId) -> str:
    """A colour of the terminal for a sequence; its name says the same."""
    return COLORS[seq_id % len(COLORS)]


def table_text(table: TableRecord, name: str, block_size: int) -> Text:
    """One block table: physical blocks in logical order, and how full the last one is."""
    entries = [str(block) for block in table.blocks]
    if len(entries) > MOST_ENTRIES:
        left_out = len(entries) - MOST_ENTRIES
        half = MOST_ENTRIES // 2
        entries = [*entries[:half], f"… {left_out} more …", *entries[-half:]]
    if table.num_dropped:
        entries.insert(0, f"{table.num_dropped} out of the window")
    last = table.filled_slots(table.blocks[-1], block_size) if table.blocks else 0
    where = "host " if table.on_host else ""
    text = Text(f"{name:>2}  ", style=color(table.seq_id))
    text.append(f"request {table.request_id}  {where}[{', '.join(entries)}]", style="default")
    text.append(f"  last block {last}/{block_size} full", style="dim")
    return text


def sharing_text(trace: Trace) -> Text:
    """What was shared, copied, swapped and found again in a run; empty if nothing was."""
    last, parts = trace.records[-1], []
    shared = max(record.num_shared_blocks for record in trace)
    if shared:
        parts.append(
            f"{shared} blocks shared at most, {trace.saved_by_sharing:.1%} of the blocks saved by "
            f"sharing, {trace.num_copied_blocks} copied on write"
        )
    out, back = trace.num_swapped_blocks
    if out:
        parts.append(
            f"{last.num_swaps} preemptions by swapping: {out} blocks moved to the host, "
            f"{back} moved back"
        )
    if last.num_queried_tokens:
        share = last.num_hit_tokens / last.num_queried_tokens
        parts.append(
            f"prefix cache: {last.num_hit_tokens} of {last.num_queried_tokens} tokens found "
            f"({share:.1%}), {len(last.cached_blocks)} free blocks remembered at the end"
        )
    return Text("\n".join(parts))


def waste_text(record: StepRecord) -> Text:
    """Blocks in use, and the share of their slots that holds no token."""
    held = record.num_used_blocks * record.block_size - record.num_wasted_slots
    return Text(
        f"{record.num_used_blocks} of {record.num_blocks} blocks used, {held} tokens in them, "
        f"{record.num_wasted_slots} slots wasted: {record.waste:.1%} of the used cache"
    )


def block_map(record: StepRecord) -> Group:
    """The block map of one step, to print on a rich Console."""
    names = letters(record.tables)
    tables = [table_text(t, names[t.seq_id], record.block_size) for t in sorted(record.tables)]
    return Group(pool_text(record, names), Text(), *tables, waste_text(record))


def run_summary(trace: Trace) -> Group:
    """A finished run: the pool when it was fullest, and the last table of every sequence."""
    record = trace.fullest
    last = tuple(trace.last_tables().values())
    # Beams that dropped out later are in the fullest step, and nowhere else.
    names = letters(tuple({t.seq_id: t for t in (*record.tables, *last)}.values()))
    sharing = sharing_text(trace)
    return Group(
        Text(
            f"Block map at step {record.step}, the fullest of {len(trace)} "
            f"(a cell is a block of {record.block_size} tokens: owner, how full, how many share "
            f"it; {FREE} free, {CACHED} free and cached)",
            style="bold",
        ),
        pool_text(record, names),
        Text(),
        Text(
            "Last block table of every sequence (physical block of logical block 0, 1, …)", "bold"
        ),
        *(table_text(table, names[table.seq_id], record.block_size) for table in sorted(last)),
        Text(),
        waste_text(record),
        Text(
            f"{trace.mean_waste:.1%} wasted over the whole run, preemptions: "
            f"{trace.records[-1].num_preemptions}; {PAPER}"
        ),
        *([sharing] if sharing else []),
    )


def logical_index(table: TableRecord, block: BlockId) -> int:
    """Which logical block of the sequence this physical block is."""
    return table.num_dropped + table.blocks.index(block)


def plot_block_map(record: StepRecord, ax: Axes | None = None, columns: int = 16) -> Axes:
    """Draw the pool: a box per physical block, filled as far as it holds tokens.

    The number in a box is the physical block, the letter and index its sequence and logical
    block.  Sequences differ by letter and hatching, so that the figure reads in grey.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    held, names = owners(record), letters(record.tables)
    rows = -(-record.num_blocks // columns)
    if ax is None:
        _, ax = plt.subplots(figsize=(0.7 * columns, 0.75 * rows + 0.8), layout="constrained")
    colors = plt.get_cmap("Pastel1").colors  # type: ignore[attr-defined]
    hatches = ["", "//", "..", "\\\\", "xx", "--", "oo", "||"]
    order = {table.seq_id: i for i, table in enumerate(sorted(record.tables))}
    for block in range(record.num_blocks):
        x, y = block % columns, block // columns
        box: dict[str, Any] = {"edgecolor": "0.35", "linewidth": 0.8}
        ax.add_patch(Rectangle((x, y), 0.92, 0.86, facecolor="white", **box))
        if block in held:
            table = held[block][0]
            share = table.filled_slots(block, record.block_size) / record.block_size
            i = order[table.seq_id]
            ax.add_patch(
                Rectangle(
                    (x, y),
                    0.92 * share,
                    0.86,
                    facecolor=colors[i % len(colors)],
                    hatch=hatches[i // len(colors) % len(hatches)],
                    **box,
                )
            )
            labels = [f"{names[t.seq_id]}{logical_index(t, block)}" for t in held[block][:3]]
            ax.text(x + 0.46, y + 0.36, ",".join(labels), ha="center", va="center", fontsize=9)
            if len(held[block]) > 1:
                count = f"{len(held[block])}x"  # the reference count
                ax.text(x + 0.9, y + 0.8, count, fontsize=7, weight="bold", ha="right", va="bottom")
        ax.text(x + 0.05, y + 0.8, str(block), fontsize=6, color="0.35", va="bottom")
    ax.set_xlim(-0.1, columns)
    ax.set_ylim(rows, -0.1)
    ax.set_axis_off()
    ax.set_title(
        f"Step {record.step}: {record.num_used_blocks} of {record.num_blocks} blocks used, "
        f"{record.waste:.1%} of their slots wasted",
        fontsize=10,
        loc="left",
    )
    return ax
