"""Draws the pictures of the README and the book: `python -m minipaged.visual.figures`.

They come from runs of the engine on the shipped model.  Outputs have a fixed length there,
so that the pictures show the same blocks on every machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from minipaged.engine.builder import EngineOptions, load_engine
from minipaged.engine.trace import Trace
from minipaged.request.sampling_params import SamplingParams
from minipaged.visual.block_map import plot_block_map

IMAGES = Path(__file__).parents[2] / "book" / "images"
PROMPTS = ["ROMEO:", "First Citizen:", "To be, or not to be", "KING RICHARD III:", "O, what light"]


def recorded_run(max_tokens: int = 100, num_blocks: int = 32) -> Trace:
    """Five prompts served together by a pool that is a little too small for them."""
    engine = load_engine("tiny", EngineOptions(num_blocks=num_blocks))
    trace = Trace()
    engine.observers.append(trace)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.8)
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, params)
    while engine.has_unfinished_requests:
        engine.step()
    return trace


def draw_block_map(path: Path) -> None:
    """The pool of that run some steps before it is full."""
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "minipaged", "font.family": "sans-serif"}
    trace = recorded_run()
    with mpl.rc_context(style):
        ax = plot_block_map(trace.records[trace.fullest.step - 18])
        ax.figure.savefig(path, metadata={"Date": None, "Creator": None})  # type: ignore[union-attr]


if __name__ == "__main__":
    mpl.use("Agg")
    draw_block_map(IMAGES / "block-map.svg")
