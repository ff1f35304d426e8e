"""How many bytes tensor parallelism moves in a step: the formula, to hold against the count."""

from __future__ import annotations

from dataclasses import dataclass

from minipaged.models.config import ModelConfig
from minipaged.scheduling.step_plan import StepPlan

NUMBER = 8  # bytes of a number in a control message


@dataclass
class Traffic:
    """Bytes that every rank puts into, or takes from, the collectives of each kind.

    control: of the step's plan.
    all_reduce: of the activations that are added up.
    gather: of the logits that one rank sends to rank 0.
    """

    control: int = 0
    all_reduce: int = 0
    gather: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.control + other.control,
            self.all_reduce + other.all_reduce,
            self.gather + other.gather,
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.control - other.control,
            self.all_reduce - other.all_reduce,
            self.gather - other.gather,
        )

    def on_the_wire(self, ranks: int) -> int:
        """What all ranks send together, without headers.

        The plan goes to k - 1 ranks, and k - 1 ranks send logits.  In a ring each rank sends
        2 (k - 1) / k of what is added up: a k-th part at a time, k - 1 times to sum, and k - 1
        times for all to have the sums.
        """
        raise NotImplementedError("Task 18.5: Traffic.on_the_wire is still to be written")


def step_traffic(config: ModelConfig, plan: StepPlan, ranks: int, element_size: int) -> Traffic:
    """The formula for one step of T tokens, S of whose sequences get one.

    control: a header, 4 lengths, 5 numbers for each sequence, its tokens and its blocks, and two
        blocks for each to copy or swap.
    all_reduce: T x hidden_size elements, twice in every layer and once for the embedding.
    gather: S x (vocab_size / k, rounded up) elements.

    config: of the whole model.
    element_size: bytes of an element of the activations.
    """
    raise NotImplementedError("Task 18.5: step_traffic is still to be written")
