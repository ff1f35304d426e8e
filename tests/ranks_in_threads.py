"""Tensor-parallel ranks as threads of one process: real process groups, quick to start.

Also small random checkpoints of every family, written by the layouts that read them.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from minipaged.distributed.communication import Communicator, gloo_group
from minipaged.distributed.parallel_runner import ParallelRunner, work
from minipaged.distributed.traffic import Traffic
from minipaged.engine.builder import EngineOptions, build_engine, build_runner
from minipaged.engine.engine import Engine
from minipaged.models import layouts
from minipaged.models.config import ModelConfig
from minipaged.models.decoder import Decoder
from minipaged.models.layouts import Layout
from minipaged.models.safetensors_files import SafetensorsFiles
from minipaged.models.shard import WHOLE, Shard
from minipaged.models.weights import fill

GIVING_UP = timedelta(seconds=20)  # of a rank that waits for one that failed


def _config(family: str, **options: Any) -> ModelConfig:
    sizes = {
        "vocab_size": 13,
        "hidden_size": 20,
        "num_layers": 2,
        "num_heads": 12,
        "num_kv_heads": 4,
        "head_dim": 4,
        "intermediate_size": 27,
        "max_positions": 64,
        "eos_token_ids": (3,),
    }
    return ModelConfig(family=family, **{**sizes, **options})


LEARNED: dict[str, Any] = {
    "norm": "layer",
    "gated_mlp": False,
    "rope": None,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "num_kv_heads": 12,
}
# 12 query heads: 6 or 3 on each rank.  KV heads: 12, 4 (one each), 2 (fewer than 4 ranks) and 1.
FAMILIES: dict[str, tuple[ModelConfig, Layout]] = {
    "opt": (_config("opt", **LEARNED, activation="relu", learned_position_offset=2), layouts.OPT),
    "gpt2": (_config("gpt2", **LEARNED, activation="gelu_tanh"), layouts.GPT2),
    "llama": (_config("llama", qkv_bias=True, output_bias=True, mlp_bias=True), layouts.LLAMA),
    "mistral": (_config("mistral", sliding_window=7, num_kv_heads=2), layouts.LLAMA),
    "qwen2": (
        _config("qwen2", qkv_bias=True, num_kv_heads=1, tie_word_embeddings=True),
        layouts.LLAMA,
    ),
    "qwen3": (_config("qwen3", qk_norm=True, num_kv_heads=2, head_dim=6), layouts.LLAMA),
}


def write_family(name: str, directory: Path) -> None:
    """A random checkpoint, with logits far enough apart for lively outputs."""
    config, layout = FAMILIES[name]
    tensors = {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        decoder = Decoder(config).double().requires_grad_(False)
        for parameter, value in decoder.named_parameters():
            value.normal_(std=0.6 if value.dim() > 1 else 0.3)
            if "norm" in parameter and parameter.endswith("weight"):
                value.add_(1)
            names = layout.sources(parameter)
            kv = config.num_kv_heads * config.head_dim
            rows = {1: [len(value)], 2: [len(value) // 2] * 2, 3: [len(value) - 2 * kv, kv, kv]}
            for tensor, part in zip(names, value.split(rows[len(names)]), strict=True):
                transposed = layout is layouts.GPT2 and ".c_" in tensor and part.dim() == 2
                tensors[tensor] = (part.T if transposed else part).contiguous()
    save_file(tensors, directory / "model.safetensors")


def load_family(name: str, directory: Path, shard: Shard = WHOLE, **collectives: Any) -> Decoder:
    """The part of a checkpoint of `write_family` that a rank has."""
    config, layout = FAMILIES[name]
    with torch.device("meta"):
        decoder = Decoder(config, shard, **collectives)
    fill(decoder, SafetensorsFiles(directory), layout, torch.float64)
    return decoder.requires_grad_(False)


class ThreadedRanks:
    """What `Ranks` is for processes; `engine` can be called again and again."""

    def __init__(self, size: int) -> None:
        store, groups = dist.HashStore(), {}

        def connect(rank: int) -> None:
            groups[rank] = gloo_group(store, Shard(rank, size), "127.0.0.1")
            groups[rank]._set_default_timeout(GIVING_UP)

        threads = [threading.Thread(target=connect, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shards = [Shard(rank, size) for rank in range(size)]
        self.communicators = [Communicator(s, groups[s.rank], groups[s.rank]) for s in shards]
        self.communicator = self.communicators[0]
        self._decoders: dict[str, list[Decoder]] = {}
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []

    def load(self, name: str, directory: Path) -> list[Decoder]:
        """A decoder for each rank; the same at every call."""
        if name not in self._decoders:
            self._decoders[name] = [
                load_family(name, directory, communicator.shard, collectives=communicator)
                for communicator in self.communicators
            ]
        return self._decoders[name]

    def engine(self, decoders: list[Decoder], options: EngineOptions) -> Engine:
        """An engine on rank 0, with the other ranks at work."""
        self.errors.clear()
        for communicator in self.communicators:
            communicator.payload = Traffic()
        engine = build_engine(decoders[0], None, options)
        blocks = options.num_blocks
        runners = [build_runner(decoder, blocks, options) for decoder in decoders[1:]]
        pairs = zip(runners, self.communicators[1:], strict=True)
        self.threads = [
            threading.Thread(target=self._work, args=pair, daemon=True) for pair in pairs
        ]
        for thread in self.threads:
            thread.start()
        engine.runner = ParallelRunner(engine.runner, self)
        return engine

    def _work(self, runner: Any, communicator: Communicator) -> None:
        try:
            work(runner, communicator)
        except BaseException as error:
            self.errors.append(error)

    def check(self) -> None:
        assert not self.errors, self.errors

    def break_off(self, error: BaseException) -> None:
        """Nobody is left waiting, for the groups have a timeout."""

    def stop(self) -> None:
        if not self.errors:
            self.communicator.send_plan(None)
        for thread in self.threads:
            thread.join()
        self.threads = []
        self.check()
