"""What a paged attention needs to know of a step: its queries, contexts and block tables.

Built once per step and read by every layer.  All attentions take the same description, so
that a slow one, a fast one and a kernel can stand in for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

PagedAttention = Callable[
    [
        Float[Tensor, "tokens heads head_dim"],
        Float[Tensor, "num_blocks block_size kv_heads head_dim"],
        Float[Tensor, "num_blocks block_size kv_heads head_dim"],
    ],
    Float[Tensor, "tokens heads head_dim"],
]
"""Queries, key cache and value cache of a layer in, attention out."""


@dataclass(frozen=True)
class PagedBatch:
    """The sequences of one step; sequence i owns rows query_starts[i]:query_starts[i + 1].

    query_lengths: new tokens of each sequence, at least 1; they are the last of its context.
    context_lengths: tokens of each sequence in the cache, the new ones included.
    block_tables: physical blocks, row i padded behind its ceil(context / block_size) blocks
        with an id that must not be read.
    window: tokens that a query sees, itself included; None is all of its context.
    """

    block_size: int
    query_lengths: Int[np.ndarray, " seqs"]
    context_lengths: Int[np.ndarray, " seqs"]
    block_tables: Int[np.ndarray, "seqs max_blocks"]
    window: int | None = None

    PADDING = np.iinfo(np.int32).max

    @classmethod
    def from_lists(
        cls,
        block_size: int,
        query_lengths: Sequence[int],
        context_lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        window: int | None = None,
    ) -> PagedBatch:
        """The batch of tables of unequal length."""
        widest = max(map(len, block_tables), default=0)
        tables = np.full((len(block_tables), widest), cls.PADDING, dtype=np.int64)
        for row, table in zip(tables, block_tables, strict=True):
            row[: len(table)] = table
        return cls(
            block_size,
            np.asarray(query_lengths, dtype=np.int64),
            np.asarray(context_lengths, dtype=np.int64),
            tables,
            window,
        )

    @property
    def num_seqs(self) -> int:
        """Sequences of the step."""
        return len(self.query_lengths)

    @property
    def query_starts(self) -> Int[np.ndarray, " seqs_plus_one"]:
        """First row of every sequence, and the number of rows at the end."""
        raise NotImplementedError("Task 5.1: PagedBatch.query_starts is still to be written")

    @property
    def context_starts(self) -> Int[np.ndarray, " seqs"]:
        """First token of each sequence that its first new token, and so any of them, sees."""
        if self.window is None:
            return np.zeros_like(self.context_lengths)
        return np.maximum(0, self.context_lengths - self.query_lengths - self.window + 1)

    def columns(self, seqs: np.ndarray | slice = slice(None)) -> dict[str, np.ndarray]:
        """What compiled code is given of these sequences, by the names it has there, in int32."""
        columns = {
            "block_tables": self.block_tables,
            "context_lengths": self.context_lengths,
            "query_starts": self.query_starts[:-1],
            "query_lengths": self.query_lengths,
        }
        return {name: column[seqs].astype(np.int32) for name, column in columns.items()}

    def positions(self) -> Int[np.ndarray, " tokens"]:
        """Position of every new token in its sequence."""
        raise NotImplementedError("Task 5.1: PagedBatch.positions is still to be written")

    def slots(self) -> Int[np.ndarray, " tokens"]:
        """Slot in which the keys and values of every new token are stored."""
        raise NotImplementedError("Task 5.2: PagedBatch.slots is still to be written")


def check_contexts(batch: PagedBatch) -> None:
    """Raises ValueError for a sequence without tokens, of which no softmax can be taken."""
    for seq in np.flatnonzero(batch.context_lengths < np.maximum(batch.query_lengths, 1)):
        raise ValueError(
            f"sequence {seq} has a context of {batch.context_lengths[seq]} tokens and "
            f"{batch.query_lengths[seq]} new ones; the new ones count as context, at least 1"
        )


def check_block_tables(batch: PagedBatch, num_blocks: int) -> None:
    """Raises IndexError for a table that leads out of the cache where tokens are seen."""
    logical = np.arange(batch.block_tables.shape[1])
    first, end = batch.context_starts[:, None], batch.context_lengths[:, None]
    read = (logical * batch.block_size < end) & ((logical + 1) * batch.block_size > first)
    wrong = read & ((batch.block_tables < 0) | (batch.block_tables >= num_blocks))
    for seq, block in np.argwhere(wrong):
        raise IndexError(
            f"sequence {seq} of the step has its logical block {block} in physical block "
            f"{batch.block_tables[seq, block]}, but the cache has {num_blocks} blocks"
        )
