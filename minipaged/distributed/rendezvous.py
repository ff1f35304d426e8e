"""How the ranks find each other, and whether they were all asked for the same."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minipaged.distributed.place import STORE_FILE, Place
from minipaged.distributed.wire import Address, Peer
from minipaged.engine.builder import EngineOptions
from minipaged.errors import ConfigurationError
from minipaged.models.loader import resolve

LIFELINE = "MINIPAGED_LIFELINE"
ADDRESS_KEY = "minipaged/lifeline"
MEETING = timedelta(seconds=600)
SAMPLE = 2**20  # bytes at either end of a file that tell it from others

Arguments = dict[str, list[str]]
"""What a rank was asked for: for each name what is compared, and how a person sees it."""


def open_store(place: Place, patience: timedelta = MEETING) -> Any:
    """The store in which process groups are made: a file on this host, or torchrun's."""
    if STORE_FILE in os.environ:
        return dist.FileStore(os.environ[STORE_FILE], place.shard.size)
    store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    return store


def publish(store: Any, address: Address) -> None:
    """Let the others know where rank 0 listens; ConfigurationError if it does so already."""
    if store.check([ADDRESS_KEY]):
        raise ConfigurationError(
            "torchrun's ranks have a model already; make one LLM in a program under torchrun"
        )
    store.set(ADDRESS_KEY, json.dumps(address))


def address_of_rank_0(store: Any) -> Address:
    """Where rank 0 listens for the others."""
    text = os.environ.get(LIFELINE) or store.get(ADDRESS_KEY).decode()
    return Address(*json.loads(text))


def arguments_of(model: str | Path, options: EngineOptions) -> Arguments:
    """What must be the same for all ranks: the versions, the model's contents, the options."""
    path = resolve(model)
    identity = model_identity(path)
    arguments = {"model": [identity, f"{model} (contents {identity})"]}
    for package in ("minipaged", "torch"):
        version = torch.__version__ if package == "torch" else _version(package)
        arguments[f"version of {package}"] = [version, version]
    for field in dataclasses.fields(options):
        value = str(getattr(options, field.name)).removeprefix("torch.")
        arguments[field.name] = [value, value]
    return arguments


def check_arguments(mine: Arguments, others: Mapping[Peer, Arguments]) -> None:
    """ConfigurationError for the first rank that was asked for something else than rank 0."""
    for peer, theirs in sorted(others.items()):
        for name, (value, shown) in mine.items():
            other, other_shown = theirs.get(name, ("", "unknown"))
            if other != value:
                raise ConfigurationError(
                    f"{name} is {other_shown} on {peer} and {shown} on rank 0; start all ranks "
                    "with the same"
                )


def model_identity(path: Path) -> str:
    """A few digits of the contents: names, sizes, and both ends of every file of the model."""
    files = [path] if path.is_file() else sorted([path / "config.json", *path.glob("*.saf*")])
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''} {size} ".encode())
        with file.open("rb") as contents:
            digest.update(contents.read(SAMPLE))
            contents.seek(max(0, size - SAMPLE))
            digest.update(contents.read(SAMPLE))
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        return "unknown"
