"""One self-contained page to step through a run: blocks taken, filled, freed, who was preempted.

Owns the data of the page; how it looks and moves is in trace_page.html beside this file.
The page loads nothing from elsewhere, so it can be mailed, and works from a file.
"""

from __future__ import annotations

import html
import json
import uuid
from importlib import resources
from pathlib import Path
from typing import Any

from minipaged.engine.trace import StepRecord, TableRecord, Trace
from minipaged.request.sequence import SequenceId

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>body {{ margin: 0; background: #fff; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #0f1419; }} }}</style>
</head><body>
{body}
</body></html>
"""


def trace_html(trace: Trace, title: str = "A run of minipaged, step by step") -> str:
    """The whole page.  ValueError if the trace has no step."""
    return PAGE.format(title=html.escape(title), body=trace_fragment(trace, title))


def write_trace_html(trace: Trace, path: Path, title: str = "A run of minipaged") -> None:
    """Write the page to a file."""
    path.write_text(trace_html(trace, title), encoding="utf-8")


def trace_fragment(trace: Trace, title: str) -> str:
    """The page without its frame, to put into a notebook; its root has an id of its own."""
    template = resources.files("minipaged.visual").joinpath("trace_page.html").read_text("utf-8")
    # Inside a script element only "<" can do harm; JSON has another way to write it.
    data = json.dumps(trace_data(trace, title), separators=(",", ":")).replace("<", "\\u003c")
    root = f"minipaged-trace-{uuid.uuid4().hex[:12]}"
    return template.replace("__ROOT__", root).replace("__DATA__", data)


def trace_data(trace: Trace, title: str) -> dict[str, Any]:
    """What the page knows; block tables are written as changes from step to step."""
    if not trace.records:
        raise ValueError("the trace has no step, so there is nothing to show")
    first = trace.records[0]
    sequences = {table.seq_id: table.request_id for r in trace for table in r.tables}
    steps, before = [], dict[SequenceId, TableRecord]()
    for record in trace:
        steps.append(_step(record, before))
        before = {table.seq_id: table for table in record.tables}
    return {
        "title": title,
        "block_size": first.block_size,
        "num_blocks": first.num_blocks,
        "num_host_blocks": first.num_host_blocks,
        "sequences": [[seq_id, sequences[seq_id]] for seq_id in sorted(sequences)],
        "steps": steps,
    }


def _step(record: StepRecord, before: dict[SequenceId, TableRecord]) -> dict[str, Any]:
    return {
        "tables": [_change(table, before.get(table.seq_id)) for table in record.tables],
        "work": [
            [item.seq_id, item.num_computed_tokens, len(item.token_ids)]
            for item in record.plan.scheduled
        ],
        "running": list(record.running),
        "waiting": list(record.waiting),
        "preempted": list(record.plan.preempted),
        "swapped": list(record.plan.swapped),
        "swap_out": record.plan.swap_out,
        "swap_in": record.plan.swap_in,
        "copies": record.plan.copies,
        "forks": record.forks,
        "dropped": [seq_id for seq_id in record.ended if seq_id not in record.completed],
        "ended": record.ended,
        "cached": record.cached_blocks,
        "shared": record.num_shared_blocks,
        "finished": record.finished,
        "text": {str(seq_id): text for seq_id, text in record.new_text.items() if text},
        "used": record.num_used_blocks,
        "wasted": record.num_wasted_slots,
        "preemptions": record.num_preemptions,
        "ms": round(record.seconds * 1000, 2),
    }


def _change(table: TableRecord, before: TableRecord | None) -> list[int]:
    """[sequence, tokens, blocks kept from the step before, blocks dropped, host, new blocks ...].

    Host is 1 while the blocks are those of the host pool.
    """
    old = before.blocks if before is not None and before.on_host == table.on_host else ()
    kept = 0
    while kept < min(len(old), len(table.blocks)) and old[kept] == table.blocks[kept]:
        kept += 1
    new = table.blocks[kept:]
    return [table.seq_id, table.num_tokens, kept, table.num_dropped, int(table.on_host), *new]
