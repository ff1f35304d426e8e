"""How much memory sharing saves, counted as the paper counts it (section 6.3, figure 15).

Saved are the blocks that the tables hold more than once, over the blocks they would hold
without sharing, summed over all steps of a run.  The model and the beam search are real; the
lengths of prompts and outputs are drawn with the means of the paper's two datasets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minipaged.engine.engine import Engine
from minipaged.engine.trace import StepRecord
from minipaged.evaluation.arrivals import dataset_named, draw_lengths
from minipaged.request.sampling_params import SamplingParams

# Percent that the paper saved (figure 15), by dataset, decoding and width.
PAPER: dict[tuple[str, str], dict[int, str]] = {
    ("alpaca", "parallel"): {2: "6.1", 4: "8.5", 6: "9.8"},
    ("alpaca", "beam"): {2: "37.6", 4: "53.1", 6: "55.2"},
    ("sharegpt", "parallel"): dict.fromkeys((2, 4, 6), "16.2 to 30.5"),
    ("sharegpt", "beam"): dict.fromkeys((2, 4, 6), "44.3 to 66.3"),
}


@dataclass(frozen=True)
class Sharing:
    """One run.

    saved: share of the blocks, 0 to 1; paper: the paper's figure in percent.
    forks_per_sequence: in a step; for beams, the share that a fork of another beam replaced.
    """

    dataset: str
    decoding: str
    width: int
    requests: int
    mean_prompt: float
    mean_output: float
    saved: float
    copies_per_step: float
    forks_per_sequence: float
    paper: str


def measure_sharing(
    engine: Engine, dataset: str, decoding: str, width: int, num_requests: int, seed: int
) -> Sharing:
    """Serve requests with `width` samples or beams each, and count blocks in every step."""
    about = dataset_named(dataset)
    rng = np.random.default_rng(seed)
    half = engine.context_length // 2
    prompts = draw_lengths(about.prompt, num_requests, half, rng)
    outputs = draw_lengths(about.output, num_requests, half, rng)
    texts = own_text(engine, prompts, seed)
    used = without = copies = steps = forks = sequences = 0

    def count(record: StepRecord) -> None:
        nonlocal used, without, copies, steps, forks, sequences
        used += record.num_used_blocks
        without += record.num_unshared_blocks
        copies += len(record.plan.copies)
        steps += 1
        forks += len(record.forks)
        sequences += len(record.plan.scheduled)

    for number, (prompt, output) in enumerate(zip(texts, outputs, strict=True)):
        beam = decoding == "beam"
        params = SamplingParams(
            n=width,
            max_tokens=output,
            ignore_eos=True,
            use_beam_search=beam,
            temperature=0 if beam else 1,
        )
        engine.add_request(f"{decoding}-{width}-{number}", prompt, params)
    engine.observers.append(count)
    while engine.has_unfinished_requests:
        engine.step()
    engine.observers.remove(count)
    return Sharing(
        dataset,
        decoding,
        width,
        num_requests,
        sum(prompts) / num_requests,
        sum(outputs) / num_requests,
        1 - used / max(1, without),
        copies / max(1, steps),
        forks / max(1, sequences),
        PAPER[dataset, decoding].get(width, ""),
    )


def own_text(engine: Engine, lengths: list[int], seed: int) -> list[list[int]]:
    """Prompts in the model's own language: it writes them itself, each from one first token."""
    for number, length in enumerate(lengths):
        params = SamplingParams(max_tokens=length, ignore_eos=True, seed=seed + number)
        engine.add_request(f"text-{number}", [1 + number % (engine.vocab_size - 1)], params)
    written: dict[str, list[int]] = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            written[output.request_id] = output.outputs[0].token_ids
    return [written[f"text-{number}"] for number in range(len(lengths))]
