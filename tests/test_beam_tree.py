"""The tree of a request tells the same story as its outputs."""

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from runs import record
from strategies import Request, Workload

from minipaged.visual.beam_tree import MOST_BRANCHES, Branch, beam_tree, branches


def all_branches(branch):
    yield branch
    for child in branch.children:
        yield from all_branches(child)


def workload(params, num_blocks=60, **options):
    return Workload((Request((1, 2, 3), params),), 4, num_blocks, 8, 16, **options)


def lengths_of_paths(branch, before=0):
    """Output tokens along the way to each branch at which an output was complete."""
    tokens = before + branch.num_tokens
    yield from [tokens] * branch.num_complete
    for child in branch.children:
        yield from lengths_of_paths(child, tokens)


@settings(max_examples=30)
@given(n=st.integers(2, 4), max_tokens=st.integers(1, 12), seed=st.integers(0, 3))
def test_samples_fork_once_from_the_prompt(n, max_tokens, seed):
    params = {"n": n, "max_tokens": max_tokens}
    trace, _ = record(workload(params, model_seed=seed))
    root = branches(trace, "0")
    assert root.num_tokens == 0
    assert len(root.children) == n
    assert all(not child.children and child.survives for child in root.children)
    last = trace.records[-1]
    assert sorted(lengths_of_paths(root)) == sorted(
        table.num_tokens + 1 - 3 for table in trace.last_tables().values()
    )
    assert last.forks == () or max_tokens == 1


@settings(max_examples=30)
@given(width=st.integers(2, 4), max_tokens=st.integers(1, 12), seed=st.integers(0, 3))
def test_beams_fork_and_drop_out(width, max_tokens, seed):
    params = {"best_of": width, "max_tokens": max_tokens, "use_beam_search": True}
    params |= {"temperature": 0, "ignore_eos": True}
    trace, _ = record(workload(params, model_seed=seed))
    root = branches(trace, "0")
    every = list(all_branches(root))
    forks = sum(len(record.forks) for record in trace)
    assert len(every) == 1 + sum(len(branch.children) for branch in every)
    assert sum(max(0, len(branch.children) - 1) for branch in every) == forks
    # All hypotheses of a search without end tokens are complete in its last step.
    assert set(lengths_of_paths(root)) == {max_tokens - 1}
    assert sum(branch.num_complete for branch in every) == width
    for branch in every:
        assert branch.survives == any(b.num_complete for b in all_branches(branch))


def test_the_tree_is_printed_and_stays_short():
    params = {"best_of": 4, "max_tokens": 40, "use_beam_search": True, "temperature": 0}
    trace, _ = record(workload({**params, "ignore_eos": True}))
    console = Console(width=200, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(beam_tree(trace, "0", "[0] prompt"))
    lines = capture.get().splitlines()
    assert lines[0] == "[0] prompt"
    assert sum("dropped" in line for line in lines) > 5
    assert len(lines) <= MOST_BRANCHES + 2
    assert branches(trace, "no such request") is None
    assert Branch(0, 0, 0).children == []
