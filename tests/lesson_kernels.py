"""A learner's kernels on the emulated GPU: compiled once, and what goes wrong fails the test."""

import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import quick_kernels
import torch
from test_attention import place
from test_kernels import expected, queries_of

from minipaged.attention import build
from minipaged.attention.kernels import Launch
from minipaged.course.narration import story
from minipaged.course.notation import name
from minipaged.course.stubs import STILL_OPEN


@functools.cache
def compile_once(make):
    """What `make` makes of a copy of the sources, or what the compiler says if it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "cuda"
        shutil.copytree(build.SOURCES, sources)
        try:
            return make(sources), ""
        except RuntimeError as error:
            lines = str(error).replace(f"{sources}/", "").splitlines()
            first = next((i for i, line in enumerate(lines) if " error: " in line), 0)
            return None, "\n".join(lines[first : first + 6])


def compiled(make):
    """What `make` makes of the sources; the first error of the compiler fails the test."""
    result, complaint = compile_once(make)
    if result is None:
        raise AssertionError(f"your kernels do not compile:\n{complaint}")
    return result


def fail_as_reported(said):
    """What the emulator said: that a task is open, or that it stopped the kernel."""
    if STILL_OPEN in said:
        raise NotImplementedError(said[said.index("Task ") :])
    raise AssertionError(f"the emulator stopped the kernel:\n{said}")


class Emulator:
    """Some kernels in float64 for these head sizes; a report of the emulator fails the test.

    They are compiled when the first of them is called: not every test of a lesson needs them.
    """

    def __init__(self, *head_sizes, versions):
        self._make = functools.partial(
            quick_kernels.compile_kernels,
            dtypes=(torch.float64,),
            head_sizes=head_sizes,
            versions=versions,
        )

    def attention(self, arguments):
        self._call("attention", arguments)

    def write_cache(self, arguments):
        self._call("write_cache", arguments)

    def copy_cache(self, arguments):
        self._call("copy_cache", arguments)

    def seed_emulator(self, seed):
        self._call("seed_emulator", seed)

    def _call(self, function, argument):
        kernels = compiled(self._make)
        try:
            return getattr(kernels, function)(argument)
        except RuntimeError as error:
            said = str(error)
        return fail_as_reported(said)


def check_decoding(kernels, case, version, larger=1.0):
    """A decoding kernel equals contiguous attention, for sequences with one new token."""
    torch.manual_seed(case.seed)
    batch, cache, kv = place(case)
    query = queries_of(case) * abs(larger)
    if larger < 0:
        query, kv = quick_kernels.sink_scores(query, cache, kv)
    story.begin()
    heads = case.kv_heads * case.group
    story.tell(f"block_size, head_size = {case.block_size}, {case.head_dim}")
    story.tell(f"heads, kv_heads = {heads}, {case.kv_heads}")
    decoding = np.flatnonzero(batch.query_lengths == 1)
    for seq, (context, new) in enumerate(case.sequences):
        table = batch.block_tables[seq][: -(-context // case.block_size)].tolist()
        note = "" if new == 1 else f", {new} of them new: not this kernel's"
        story.tell(f"# table {name(seq)}: {table}   {context} tokens{note}")
    story.tell(
        f"{version}(queries{'' if larger == 1 else f' * {abs(larger):g}'}, cache, tables)",
        "every score is far below 0" if larger < 0 else "",
    )
    kernels.seed_emulator(case.seed)
    output = torch.full(query.shape, float("nan"), dtype=torch.float64)
    launch = Launch.of_batch(batch, decoding, version, torch.device("cpu"), splits=1)
    launch.run(kernels, output, query, cache.keys[0], cache.values[0])
    wanted = expected(dataclasses.replace(case, window=None), query, kv)
    for seq in decoding:
        row = batch.query_starts[seq]
        close = torch.isclose(output[row], wanted[row], rtol=1e-9, atol=1e-11)
        for head, element in (~close).nonzero().tolist()[:1]:
            got, right = output[row, head, element].item(), wanted[row, head, element].item()
            why = ""
            if got != got:
                why = ": not written, or computed from a slot that nobody wrote, or inf / inf"
            raise AssertionError(
                f"output[{element}] of head {head} of sequence {name(seq)} "
                f"is {got:.5g}{why}; it must be {right:.5g}"
            )
