"""A step on all ranks: rank 0 sends the plan, and then every rank does the same with its part.

The engine of rank 0 sees a runner like any other.  The other ranks have no engine, no scheduler
and no requests: they do what they are told until they are told to stop.
"""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jaxtyping import Float
from torch import Tensor

from minipaged.distributed.communication import Communicator
from minipaged.distributed.ranks import Ranks
from minipaged.engine.model_runner import ModelRunner
from minipaged.scheduling.step_plan import StepPlan


class ParallelRunner(ModelRunner):
    """Rank 0's runner.  The other ranks end with `close`, or when nobody needs it any more."""

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        super().__init__(runner.decoder, runner.cache, runner.prepare_attention, runner.graphs)
        self.ranks = ranks
        self.close = weakref.finalize(self, ranks.stop)

    def execute(self, plan: StepPlan) -> Float[Tensor, "samples vocab"]:
        """Logits of the whole vocabulary; RankDiedError if a rank is gone."""
        self.ranks.check()
        with uninterrupted():
            try:
                self.ranks.communicator.send_plan(plan)
                return super().execute(plan)
            except BaseException as error:
                self.ranks.break_off(error)
                raise


def work(runner: ModelRunner, communicator: Communicator) -> None:
    """What the other ranks do: one plan after the other, until there are no more."""
    while (plan := communicator.receive_plan()) is not None:
        runner.execute(plan)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the step is done, since ranks in different steps wait for ever.

    The second one does not wait.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)  # for what was set before, be it a function or not
