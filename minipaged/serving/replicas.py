"""Several engines behind one endpoint, as a Ray Serve application.

    serve run minipaged.serving.replicas:build model=tiny num_replicas=2

Ray starts the replicas, watches them and carries the messages.  What is ours is the server's
own API as the front, an engine in each replica, and the choice among them by prefix.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)
from starlette.types import ASGIApp

from minipaged.engine.builder import EngineOptions, load_engine
from minipaged.errors import MinipagedError
from minipaged.models.loader import load_tokenizer
from minipaged.serving.app import create_app
from minipaged.serving.async_engine import AsyncEngine, EngineDiedError, Observer
from minipaged.serving.failures import APIError, to_api_error
from minipaged.serving.gate import Gate, Keys
from minipaged.serving.prefix_routing import PrefixRouter
from minipaged.serving.service import Service
from minipaged.serving.state import EngineState
from minipaged.serving.stream import NewRequest, Stream

RAY_ERRORS = RayError, RayServeException  # the second one where no replica can be asked
SPARE_CALLS = 1000  # beyond a replica's queue: to be refused there, or to ask how it stands
ENGINE_OPTIONS = ("dtype", "block_size", "num_blocks", "max_num_seqs", "attention", "seed")


class Replica:
    """One engine, in a process of its own."""

    def __init__(self, model: str, options: dict[str, Any], max_queued: int) -> None:
        engine = load_engine(model, EngineOptions(**options))
        self._engine = AsyncEngine(engine, max_queued)
        self._limits = engine.context_length, engine.vocab_size

    async def generate(self, requests: Sequence[NewRequest]) -> AsyncIterator[Any]:
        """First whether they are accepted, None or what the client is told; then the outputs."""
        try:
            stream = await self._engine.add(requests)
        except MinipagedError as error:
            refusal = to_api_error(error)
            yield vars(refusal)
            return
        try:
            yield None
            async for output in stream.outputs():
                yield output
        finally:  # also when the front gives up, because its client has gone
            self._engine.abort(stream)

    async def state(self) -> EngineState:
        """Of this replica's engine."""
        return await self._engine.state()

    def limits(self) -> tuple[int, int]:
        """Tokens of a context, and of the vocabulary."""
        return self._limits

    async def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if self._engine.died.is_set():
            raise EngineDiedError


class PrefixAwareRouter(FIFOMixin, RequestRouter):
    """Ray's side of the choice: it asks `PrefixRouter` and counts what is on the way."""

    def initialize_state(self, block_size: int, slack: int) -> None:
        """Called by Ray with `request_router_kwargs`."""
        self._prefixes: PrefixRouter[ReplicaID] = PrefixRouter(block_size, slack)
        self._loads: Counter[ReplicaID] = Counter()
        self._routed: set[str] = set()
        # Of requests that come together all are chosen for before the first one is sent; who gives
        # up before it is sent takes its future along.
        self._chosen: WeakKeyDictionary[asyncio.Future, ReplicaID] = WeakKeyDictionary()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each; Ray takes the first that has room."""
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        prompt, salt = _prefix_of(pending_request)
        if pending_request is not None:
            self._chosen.pop(pending_request.future, None)  # it is chosen for again
        on_the_way = Counter(self._chosen.values())
        loads = {i: self._loads[i] + on_the_way[i] for i in replicas}
        ranked = self._prefixes.rank(prompt, loads, salt)
        if pending_request is not None:
            self._chosen[pending_request.future] = ranked[0]
        return [[replicas[i]] for i in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        """A request was sent to a replica."""
        prompt, salt = _prefix_of(pending_request)
        self._prefixes.remember(prompt, replica_id, salt)
        self._chosen.pop(pending_request.future, None)
        self._loads[replica_id] += 1
        self._routed.add(pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has ended.  Ray says so of calls to all replicas, too, which were not routed."""
        if internal_request_id in self._routed:
            self._routed.remove(internal_request_id)
            self._loads[replica_id] -= 1


def _prefix_of(pending: PendingRequest | None) -> tuple[list[int], bytes]:
    """The prompt of a call, the first one if there are several; none, for other calls."""
    if pending is None or not pending.args:
        return [], b""
    first: NewRequest = pending.args[0][0]
    return first.prompt, first.cache_salt


class ReplicaLostError(EngineDiedError):
    """A replica ended while it served a request."""

    def __init__(self) -> None:
        MinipagedError.__init__(self, "the replica that had this request has ended; send it again")


class Replicas:
    """To the service what an AsyncEngine is: it sends requests on and brings outputs back."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.observers: list[Observer] = []
        self._handle = handle
        self._pumps: dict[Stream, asyncio.Task[None]] = {}

    @property
    def is_serving(self) -> bool:
        """Ray asks each replica for its health, and replaces those that are not well."""
        return True

    async def add(self, requests: Sequence[NewRequest]) -> Stream:
        """See `AsyncEngine.add`; raises APIError for what a replica refused."""
        stream = Stream(requests)
        outputs = self._handle.options(stream=True).generate.remote(requests)
        try:
            refusal = await anext(outputs)
        except asyncio.CancelledError:
            outputs.cancel()
            raise
        except RAY_ERRORS as error:
            raise ReplicaLostError from error
        if refusal is not None:
            raise APIError(**refusal)
        pump = self._pumps[stream] = asyncio.create_task(self._pump(stream, outputs))
        pump.add_done_callback(lambda _: self._pumps.pop(stream))
        return stream

    def abort(self, stream: Stream) -> None:
        """End the requests of a stream."""
        if stream in self._pumps:
            self._pumps[stream].cancel()

    async def state(self) -> EngineState:
        """The sum over all replicas."""
        try:
            states = await self._handle.broadcast("state").results_async()
        except RAY_ERRORS as error:
            raise ReplicaLostError from error
        return sum(states[1:], states[0])

    async def stop(self) -> None:
        """End what still runs; Ray ends the replicas."""
        for stream in list(self._pumps):
            self.abort(stream)

    async def _pump(self, stream: Stream, outputs: Any) -> None:
        try:
            async for output in outputs:
                stream.put(output)
                for observer in self.observers:
                    observer(stream, output, time.monotonic())
        except asyncio.CancelledError:
            outputs.cancel()
            raise
        except RAY_ERRORS:
            stream.fail(ReplicaLostError())


class Arguments(BaseModel):
    """Of `serve run`, as name=value; most are options of `minipaged serve`.

    slack: see `PrefixRouter`.
    num_gpus: that each replica takes.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "tiny"
    served_model_name: str | None = None
    num_replicas: Annotated[int, Field(ge=1)] = 2
    num_gpus: Annotated[float, Field(ge=0)] = 0
    slack: Annotated[int, Field(ge=0)] = 4
    prefix_cache: bool = True
    isolate_keys: bool = False
    max_queued: Annotated[int, Field(ge=1)] = 256
    dtype: str = "auto"
    block_size: Annotated[int, Field(ge=1)] = 16
    num_blocks: int | None = None
    max_num_seqs: int = 256
    attention: str = "auto"
    seed: int = 0


def build(arguments: Arguments) -> Application:
    """The application: a front with the API, and replicas with an engine each.

    API keys are those of the environment's MINIPAGED_API_KEY, separated by spaces.
    """
    given = arguments.model_dump()
    options = {name: given[name] for name in ENGINE_OPTIONS}
    options["enable_prefix_caching"] = arguments.prefix_cache
    replicas = serve.deployment(
        Replica,
        name="replica",
        num_replicas=arguments.num_replicas,
        max_ongoing_requests=arguments.max_queued + arguments.max_num_seqs + SPARE_CALLS,
        ray_actor_options={"num_cpus": 1, "num_gpus": arguments.num_gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixAwareRouter,
            request_router_kwargs={"block_size": arguments.block_size, "slack": arguments.slack},
        ),
    ).bind(arguments.model, options, arguments.max_queued)
    keys = os.environ.get("MINIPAGED_API_KEY", "").split()
    name = arguments.served_model_name or Path(arguments.model).name

    def front() -> ASGIApp:
        async def make_service() -> Service:
            app = serve.get_replica_context().app_name
            handle = serve.get_deployment_handle("replica", app)
            context_length, vocab_size = await handle.limits.remote()
            tokenizer = load_tokenizer(arguments.model)
            return Service(Replicas(handle), name, tokenizer, context_length, vocab_size)

        return Gate(create_app(make_service), Keys(keys, arguments.isolate_keys))

    return serve.deployment(
        serve.ingress(front)(),
        name="front",
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
    ).bind(replicas)
