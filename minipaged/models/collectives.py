"""What a decoder asks of the other ranks: to add up, and to put together.

One rank alone has nothing to ask.  For more, `distributed/communication.py` does it.
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float
from torch import Tensor


class Collectives(Protocol):
    """All ranks call the same of these, in the same order, with tensors of the same shape."""

    def all_reduce(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The sum over all ranks, which each of them gets; `x` may be overwritten."""
        ...

    def gather_logits(
        self, logits: Float[Tensor, "rows columns"], vocab_size: int
    ) -> Float[Tensor, "rows vocab"]:
        """The logits of the whole vocabulary on rank 0; the others keep their own columns."""
        ...

    def check(self) -> None:
        """Raise RankDiedError if it is known that a rank is gone."""
        ...


class OneRank:
    """Nobody else is there."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather_logits(self, logits: Tensor, vocab_size: int) -> Tensor:
        return logits

    def check(self) -> None:
        return


ONE_RANK = OneRank()
