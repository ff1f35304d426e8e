"""What the ranks say to each other in a step, through torch.distributed, and how much of it.

The plan goes over gloo; tensors go over gloo from a CPU and over NCCL from a GPU.  The process
groups belong to the model that uses them, not to the process: a program may have two models, and
groups of its own.  Who died when a connection breaks, the lifeline knows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minipaged.distributed.plan_message import decode_plan, encode_plan
from minipaged.distributed.traffic import Traffic
from minipaged.models.shard import Shard
from minipaged.scheduling.step_plan import StepPlan

CONNECTING = timedelta(seconds=60)
# A server may be idle for long, and then the others wait for rank 0; that a rank is gone shows by
# its connections, not by silence.  Rank 0 waits for the others only within a step, which all ranks
# compute at the same time: who is later than this is stuck, or waits for something else.
IDLE = timedelta(days=365)
IN_A_STEP = timedelta(minutes=5)

Explain = Callable[[RuntimeError], BaseException]


def _unexplained(error: RuntimeError) -> BaseException:
    return error


class Communicator:
    """One rank's connections to the others; `Collectives` for its decoder.

    control: the process group of plans and other numbers.
    tensors: that of tensors where the model computes.
    explain: what an error of a group comes from, in the user's words.
    on_check: raises if a rank is known to be gone.
    payload: bytes of each kind since the start.
    """

    def __init__(
        self,
        shard: Shard,
        control: Any,
        tensors: Any,
        explain: Explain = _unexplained,
        on_check: Callable[[], None] = lambda: None,
    ) -> None:
        self.shard = shard
        self.payload = Traffic()
        self._control, self._tensors = control, tensors
        self._explain, self._on_check = explain, on_check

    def check(self) -> None:
        self._on_check()

    def send_plan(self, plan: StepPlan | None) -> None:
        """From rank 0: what the others are to do next; None is that there is nothing more."""
        message = torch.empty(0, dtype=torch.int64) if plan is None else encode_plan(plan)
        self._broadcast(torch.tensor([len(message)]))
        if plan is not None:
            self._broadcast(message)

    def receive_plan(self) -> StepPlan | None:
        """On the other ranks: wait for the next plan; None is the end."""
        header = torch.empty(1, dtype=torch.int64)
        self._broadcast(header)
        message = torch.empty(int(header), dtype=torch.int64)
        if not len(message):
            return None
        self._broadcast(message)
        return decode_plan(message)

    def all_reduce(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The sum over all ranks, on every one of them."""
        x = x.contiguous()
        self.payload.all_reduce += x.nbytes
        with self._explained():
            self._tensors.allreduce([x]).wait()
        return x

    def gather_logits(
        self, logits: Float[Tensor, "rows columns"], vocab_size: int
    ) -> Float[Tensor, "rows vocab"]:
        """Rank 0 gets everybody's columns; what is sent is as wide as the widest part."""
        if not len(logits):
            return logits.new_empty(0, vocab_size)
        ranks = [Shard(rank, self.shard.size) for rank in range(self.shard.size)]
        widths = [len(rank.part_of(vocab_size).kept) for rank in ranks]
        sent = F.pad(logits, (0, max(widths) - logits.shape[1])).contiguous()
        self.payload.gather += sent.nbytes
        received = []
        if self.shard.rank == 0:
            received = [torch.empty_like(sent) for _ in widths]
        with self._explained():
            self._tensors.gather([received] if received else [], [sent], _to_rank_0()).wait()
        if not received:
            return logits
        return torch.cat([x[:, :width] for x, width in zip(received, widths, strict=True)], dim=1)

    def smallest(self, number: int) -> int:
        """The smallest of what the ranks give, on every one of them."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        options.timeout = IDLE  # to load a model takes some ranks longer than others
        x = torch.tensor([number])
        with self._explained():
            self._control.allreduce([x], options).wait()
        return int(x)

    def abort(self) -> None:
        """A rank is gone.  Gloo notices by itself; NCCL would wait for ever."""
        if self._tensors is not self._control:
            self._tensors.abort()

    def _broadcast(self, numbers: Tensor) -> None:
        self.payload.control += numbers.nbytes
        with self._explained():
            self._control.broadcast([numbers], dist.BroadcastOptions()).wait()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._explain(error) from error


def _to_rank_0() -> dist.GatherOptions:
    options = dist.GatherOptions()
    options.rootRank = 0
    return options


def gloo_group(store: Any, shard: Shard, host: str) -> Any:
    """Connects all ranks with each other; this one is reached at `host`."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    where = {"interface": interface} if interface else {"hostname": host}
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(**where)]
    options._timeout = CONNECTING
    store = dist.PrefixStore("gloo", store)
    group = gloo(store, shard.rank, shard.size, options)
    group._set_default_timeout(IN_A_STEP if shard.rank == 0 else IDLE)
    return group


def nccl_group(store: Any, shard: Shard) -> Any:
    """The same for tensors on GPUs; every rank has chosen its own before."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = IDLE
    store = dist.PrefixStore("nccl", store)
    return dist.ProcessGroupNCCL(store, shard.rank, shard.size, options)
