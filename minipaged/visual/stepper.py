"""Blocks being taken, filled, shared, copied, swapped and freed, to step through in a notebook.

One piece of HTML and SVG with a few lines of script in it; it needs no server and loads nothing,
so that it moves in JupyterLab and in the built book alike.
"""

from __future__ import annotations

import html
import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minipaged.engine.trace import Trace
from minipaged.memory.block_allocator import BlockAllocator, BlockId
from minipaged.memory.block_manager import BlockManager
from minipaged.visual.block_map import letters, logical_index

TEMPLATE = Path(__file__).with_name("stepper.html")


@dataclass(frozen=True)
class Cell:
    """A physical block.

    label: whose it is, as in "A1"; empty for a free block.
    filled: share of its slots that hold tokens.
    holders: its reference count.
    color: number of the sequence, for the shade.
    """

    label: str = ""
    filled: float = 0.0
    holders: int = 0
    color: int = 0


FREE = Cell()


@dataclass(frozen=True)
class Frame:
    """One moment: what happened, and every block of the pools after it."""

    caption: str
    device: tuple[Cell, ...]
    host: tuple[Cell, ...] = ()


class Stepper:
    """Frames to play, step and scrub; shows itself in a notebook."""

    def __init__(self, frames: Iterable[Frame], columns: int = 16) -> None:
        self.frames = list(frames)
        self.columns = columns
        if not self.frames:
            raise ValueError("there is no frame to show; take at least one")

    def _repr_html_(self) -> str:
        frames = [
            {
                "caption": frame.caption,
                "pools": [
                    [[cell.label, cell.filled, cell.holders, cell.color % 8] for cell in pool]
                    for pool in (frame.device, frame.host)
                ],
            }
            for frame in self.frames
        ]
        # "<" cannot stand in a script of a page.
        data = json.dumps({"frames": frames, "columns": self.columns}).replace("<", "\\u003c")
        parts = {
            "ID": f"stepper-{uuid.uuid4().hex[:12]}",
            "CAPTION": html.escape(self.frames[-1].caption),
            "DATA": data,
        }
        page = TEMPLATE.read_text("utf-8")
        return re.sub(r"\b(ID|CAPTION|DATA)\b", lambda match: parts[match[1]], page)


def pool_frame(caption: str, pool: BlockAllocator) -> Frame:
    """An allocator by itself: the reference count of every block that is held."""
    counts = [pool.ref_count(block) for block in range(pool.num_blocks)]
    return Frame(caption, tuple(Cell(f"{n}x", 1.0, n, n - 1) if n else FREE for n in counts))


def manager_frame(caption: str, manager: BlockManager) -> Frame:
    """All tables of a block manager, as logical blocks in their physical ones."""
    pools = []
    for pool in (manager.device, manager.host):
        cells = [FREE] * pool.num_blocks
        held: dict[BlockId, list[str]] = {}
        for seq_id, table in sorted(manager.tables.items()):
            if table.allocator is not pool:
                continue
            for logical, block in enumerate(table.blocks[table.num_dropped :], table.num_dropped):
                held.setdefault(block, []).append(f"{_letter(seq_id)}{logical}")
                tokens = min(manager.block_size, table.num_tokens - logical * manager.block_size)
                filled = max(cells[block].filled, tokens / manager.block_size)
                color = cells[block].color if len(held[block]) > 1 else seq_id
                count = pool.ref_count(block)
                cells[block] = Cell(" ".join(held[block]), filled, count, color)
        pools.append(tuple(cells))
    return Frame(caption, *pools)


def trace_frames(trace: Trace) -> list[Frame]:
    """Every step of an engine's run."""
    records = list(trace)
    names = letters(tuple({t.seq_id: t for record in records for t in record.tables}.values()))
    order = {seq_id: i for i, seq_id in enumerate(names)}
    frames = []
    for record in records:
        plan = record.plan
        sizes: tuple[int, int] = (record.num_blocks, record.num_host_blocks)
        pools = [[FREE] * size for size in sizes]
        for table in sorted(record.tables):
            cells = pools[table.on_host]
            for block in table.blocks:
                cell = cells[block]
                filled = table.filled_slots(block, record.block_size) / record.block_size
                label = f"{names[table.seq_id]}{logical_index(table, block)}"
                color = cell.color if cell.holders else order[table.seq_id]
                joined = f"{cell.label} {label}".strip()
                cells[block] = Cell(joined, max(cell.filled, filled), cell.holders + 1, color)
        parts = [f"step {record.step}: {plan.num_tokens} tokens of {len(plan.scheduled)} sequences"]
        for word, copies in (
            ("swapped out", plan.swap_out),
            ("swapped in", plan.swap_in),
            ("copied on write", plan.copies),
        ):
            if copies:
                parts.append(f"{len(copies)} blocks {word}")
        if plan.preempted:
            parts.append(f"preempted: {', '.join(plan.preempted)}")
        if record.waiting:
            parts.append(f"waiting: {', '.join(record.waiting)}")
        frames.append(Frame("; ".join(parts), *map(tuple, pools)))
    return frames


def _letter(seq_id: int) -> str:
    return chr(ord("A") + seq_id) if 0 <= seq_id < 26 else f"#{seq_id}"
