"""The outputs of a request as a tree: where they forked, what each wrote, which dropped out.

A branch is what one sequence wrote between two forks; branches that have a common beginning
have common blocks for it (section 4.4, figures 8 and 9).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.text import Text
from rich.tree import Tree

from minipaged.engine.trace import Trace
from minipaged.request.sequence import RequestId, SequenceId

MOST_BRANCHES = 60


@dataclass
class Branch:
    """A stretch of output of one sequence.

    first_step, last_step: of the tokens in it.
    num_complete: outputs that became complete behind it.
    survives: whether an output that was complete, or still grew at the end, goes through it.
    """

    seq_id: SequenceId
    first_step: int
    last_step: int
    text: str = ""
    num_tokens: int = 0
    num_complete: int = 0
    survives: bool = False
    children: list[Branch] = field(default_factory=list)


def branches(trace: Trace, request_id: RequestId) -> Branch | None:
    """The tree of one request; None if it never had a block.

    The root is the prompt and what its sequence wrote before the first fork.
    """
    root: Branch | None = None
    tips: dict[SequenceId, Branch] = {}
    for record in trace:
        for table in record.tables:
            if root is None and table.request_id == request_id:
                root = tips[table.seq_id] = Branch(table.seq_id, record.step, record.step)
        split: dict[SequenceId, Branch] = {}  # what those who forked in this step had written
        for parent, child in record.forks:
            if parent not in tips:
                continue
            if parent not in split:
                split[parent] = tips[parent]
                tips[parent] = Branch(parent, record.step, record.step)
                split[parent].children.append(tips[parent])
            tips[child] = Branch(child, record.step, record.step)
            split[parent].children.append(tips[child])
        for seq_id, text in record.new_text.items():
            if seq_id in tips:
                tip = tips[seq_id]
                tip.text += text
                tip.num_tokens += 1
                tip.last_step = record.step
        for seq_id in record.completed:
            if seq_id in tips:
                tips[seq_id].num_complete += 1
        for seq_id in record.ended:
            tips.pop(seq_id, None)
    for tip in tips.values():
        tip.survives = True
    if root is not None:
        _mark_survivors(root)
    return root


def _mark_survivors(branch: Branch) -> bool:
    survivors = [_mark_survivors(child) for child in branch.children]
    branch.survives = branch.survives or branch.num_complete > 0 or any(survivors)
    return branch.survives


def beam_tree(trace: Trace, request_id: RequestId, name: str) -> Tree:
    """The tree to print on a rich Console; branches that dropped out are dim and marked."""
    tree = Tree(Text(name, style="bold"))
    root = branches(trace, request_id)
    if root is None:
        return tree
    left = [MOST_BRANCHES]
    _grow(tree, root, left)
    if left[0] < 0:
        tree.add(Text(f"… {-left[0]} more branches", style="dim"))
    return tree


def _grow(tree: Tree, branch: Branch, left: list[int]) -> None:
    """Add a branch and what hangs on it, as long as there is room."""
    left[0] -= 1
    node = tree
    if branch.num_tokens and left[0] >= 0:
        steps = f"{branch.first_step}-{branch.last_step}"
        text = Text(repr(branch.text)[1:-1], style="" if branch.survives else "dim")
        text.append(f"  step {steps}", style="dim")
        if branch.num_complete:
            text.append(f"  {branch.num_complete} complete", style="bold")
        if not branch.survives:
            text.append("  dropped", style="dim")
        node = tree.add(text)
    for child in branch.children:
        _grow(node, child, left)
