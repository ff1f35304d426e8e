"""Starts the other ranks as processes of this host, for who does not use torchrun."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minipaged.distributed.lifeline import Lifeline
from minipaged.distributed.place import LOOPBACK, STORE_FILE
from minipaged.distributed.ranks import Ranks
from minipaged.distributed.rendezvous import LIFELINE
from minipaged.engine.builder import EngineOptions

SUBSTITUTES = "MINIPAGED_SUBSTITUTES"
ROOT = Path(__file__).parents[2]


def start_ranks(model: str | Path, options: EngineOptions, size: int) -> tuple[Ranks, Any]:
    """Start ranks 1 to size - 1, and divide this process's threads among all of them.

    Returns what ends them, and the store in which to make process groups with them.
    """
    threads = torch.get_num_threads()
    each = max(1, threads // size)
    torch.set_num_threads(each)
    folder = tempfile.TemporaryDirectory(prefix="minipaged-")
    file = str(Path(folder.name) / "store")
    lifeline = Lifeline(size, LOOPBACK)
    values = {**dataclasses.asdict(options), "dtype": str(options.dtype).removeprefix("torch.")}
    command = [sys.executable, "-m", "minipaged.distributed.worker", str(model), json.dumps(values)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(each),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        STORE_FILE: file,
        LIFELINE: json.dumps(lifeline.address),
        SUBSTITUTES: json.dumps(_substitutes()),
    }
    processes = {
        rank: subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
        )
        for rank in range(1, size)
    }
    return Ranks(lifeline, processes, folder, threads), dist.FileStore(file, size)


def _substitutes() -> dict[str, str]:
    """A learner's files that stand in for modules here, and have to in the other ranks too."""
    substitution = sys.modules.get("minipaged.course.substitution")
    if substitution is None:
        return {}
    return {file: str(path.resolve()) for file, path in substitution.substituted().items()}
