"""From a model and its options to an engine on rank 0 and the other ranks at work.

Under torchrun every rank runs the same command and gets here; elsewhere this process is rank 0 and
starts the others.  From there on there is one way: meet, compare what was asked for, load one's
part of the model, and compute what rank 0 plans.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import threading
import traceback
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from minipaged.attention import device_of
from minipaged.distributed.communication import Communicator, gloo_group, nccl_group
from minipaged.distributed.lifeline import ORPHANED, REFUSED, Lifeline
from minipaged.distributed.parallel_runner import ParallelRunner, work
from minipaged.distributed.place import Place, place_of
from minipaged.distributed.processes import start_ranks
from minipaged.distributed.ranks import Ranks
from minipaged.distributed.rendezvous import (
    address_of_rank_0,
    arguments_of,
    check_arguments,
    open_store,
    publish,
)
from minipaged.distributed.wire import Peer
from minipaged.distributed.worker_lifeline import WorkerLifeline
from minipaged.engine.builder import (
    EngineOptions,
    blocks_within_budget,
    build_engine,
    build_runner,
    parse_dtype,
)
from minipaged.engine.engine import Engine
from minipaged.engine.model_runner import ModelRunner
from minipaged.errors import ConfigurationError, MinipagedError
from minipaged.models.decoder import Decoder
from minipaged.models.loader import load_decoder, model_config
from minipaged.models.shard import Shard
from minipaged.models.tokenizer import Tokenizer

logger = logging.getLogger("minipaged")
TELLING = timedelta(seconds=30)


def load_parallel_engine(model: str | Path, options: EngineOptions) -> Engine:
    """On rank 0 the engine; on the others this returns never, but works until rank 0 ends."""
    place = place_of(os.environ)
    asked = options.tensor_parallel_size
    if place is not None and asked not in (None, place.shard.size):
        raise ConfigurationError(
            f"tensor_parallel_size is {asked} and torchrun started {place.shard.size} ranks; leave "
            "it out, or start as many"
        )
    if place is None:
        place = Place(Shard(0, asked or 1), 0, asked or 1)
        return _lead(model, options, place, start=True)
    options = dataclasses.replace(options, tensor_parallel_size=place.shard.size)
    if place.shard.rank > 0:
        _follow(model, options, place)
    return _lead(model, options, place, start=False)


def _lead(model: str | Path, options: EngineOptions, place: Place, start: bool) -> Engine:
    """Rank 0: wait for the others, load, and plan."""
    place.shard.local_config(model_config(model))  # refuses what cannot be before others begin
    arguments = arguments_of(model, options)
    ranks, store = start_ranks(model, options, place.shard.size) if start else _await_ranks(place)
    try:
        ranks.wait_for_all()
        check_arguments(arguments, ranks.lifeline.arguments)
        ranks.lifeline.tell("start")
        ranks.communicator = _connect(store, place, options, ranks.lifeline)
        ranks.lifeline.on_failure = ranks.communicator.abort
        decoder, tokenizer = _load(model, options, place, ranks.communicator)
        options = dataclasses.replace(
            options, num_blocks=_agree_on_blocks(decoder, options, place, ranks.communicator)
        )
        engine = build_engine(decoder, tokenizer, options)
    except BaseException as error:
        ranks.break_off(error)
        raise
    assert isinstance(engine.runner, ModelRunner)
    engine.runner = ParallelRunner(engine.runner, ranks)
    config = decoder.config
    logger.info(
        "tensor parallelism: %d query heads and %d KV heads here and on %s",
        config.num_heads,
        config.num_kv_heads,
        ", ".join(map(str, sorted(ranks.lifeline.arguments))),
    )
    return engine


def _follow(model: str | Path, options: EngineOptions, place: Place) -> NoReturn:
    """Another rank: join, load, and work until told to stop.  Rank 0 does all the talking."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what Ctrl-C ends
    logger.setLevel(logging.ERROR)
    try:
        arguments = arguments_of(model, options)
    except MinipagedError as error:
        tell_rank_0(str(error))
        raise SystemExit(REFUSED) from error
    store = open_store(place)
    rank_0 = WorkerLifeline(address_of_rank_0(store), Peer.this(place.shard.rank))
    rank_0.wait_for_start(arguments)
    try:
        communicator = _connect(store, place, options, rank_0)
        decoder, _ = _load(model, options, place, communicator)
        num_blocks = _agree_on_blocks(decoder, options, place, communicator)
        work(build_runner(decoder, num_blocks, options), communicator)
    except (MinipagedError, NotImplementedError) as error:
        rank_0.fail(str(error))
        raise SystemExit(REFUSED) from error
    except Exception as error:
        traceback.print_exc()
        rank_0.fail(f"{type(error).__name__}: {error}")
        raise SystemExit(ORPHANED) from error
    rank_0.leave()
    raise SystemExit(0)


def tell_rank_0(sentence: str) -> bool:
    """Let rank 0 say what is wrong here; whether it could be told.

    If rank 0 finds the same, it ends without listening, and torchrun ends all with it.
    """
    place = place_of(os.environ)
    if place is None:
        return False
    try:
        address = address_of_rank_0(open_store(place, TELLING))
        WorkerLifeline(address, Peer.this(place.shard.rank)).fail(sentence)
    except (RuntimeError, OSError):
        return False
    return True


def _connect(
    store: Any, place: Place, options: EngineOptions, lifeline: Lifeline | WorkerLifeline
) -> Communicator:
    """The process groups of a rank: gloo always, and NCCL where the model is on GPUs."""
    control = tensors = gloo_group(store, place.shard, place.host)
    if device_of(options.attention) == "cuda":
        if place.local_size > torch.cuda.device_count():
            raise ConfigurationError(
                f"{place.local_size} ranks on {socket.gethostname()} need a GPU each, and it has "
                f"{torch.cuda.device_count()}; start fewer there"
            )
        torch.cuda.set_device(place.local_rank)
        tensors = nccl_group(store, place.shard)
    return Communicator(place.shard, control, tensors, lifeline.explain, lifeline.check)


def _load(
    model: str | Path, options: EngineOptions, place: Place, communicator: Communicator
) -> tuple[Decoder, Tokenizer | None]:
    dtype, device = parse_dtype(options.dtype), device_of(options.attention)
    return load_decoder(model, dtype, device, place.shard, communicator)


def _agree_on_blocks(
    decoder: Decoder, options: EngineOptions, place: Place, communicator: Communicator
) -> int:
    """Blocks of every rank's pool: what was asked for, or what fits where there is least memory.

    Nobody goes on before all have loaded their part.
    """
    num_blocks = options.num_blocks
    if num_blocks is None:
        dtype = decoder.embed_tokens.weight.dtype
        num_blocks = blocks_within_budget(decoder.config, dtype, options, place.local_size)
    return communicator.smallest(num_blocks)


def _await_ranks(place: Place) -> tuple[Ranks, Any]:
    """Under torchrun: listen, and say in its store where."""
    store = open_store(place)
    lifeline = Lifeline(place.shard.size, place.host)
    publish(store, lifeline.address)
    if threading.current_thread() is threading.main_thread():
        _outlive_the_news(lifeline)
    return Ranks(lifeline), store


def _outlive_the_news(lifeline: Lifeline) -> None:
    """When a rank dies, torchrun ends the others: say first which one it was."""

    def end(number: int, frame: FrameType | None) -> None:
        if not lifeline.told:
            lifeline.wait_for_failure(1.0)
            lifeline.check()
            raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
