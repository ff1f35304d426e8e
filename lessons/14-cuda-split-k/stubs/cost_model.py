"""How long a step takes on a machine that is not here: weights, KV cache and arithmetic.

Simulated, not measured.  A step reads every weight once, and every key and value of the
contexts in it once; it computes two operations for each weight and token, and the attention.
Reading and computing overlap in the linear layers, so that the slower of the two counts.
What a host does between two steps is taken to be hidden.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from minipaged.errors import ConfigurationError
from minipaged.scheduling.step_plan import ScheduledSequence

BYTES = 2  # of a weight, an activation, a key: all in 16 bits


@dataclass(frozen=True)
class Gpu:
    """Figures of a data sheet, in bytes, bytes per second and operations per second.

    link: to the other GPUs, one way.  host_link: to the host's memory, one way.
    """

    memory: float
    bandwidth: float
    operations: float
    link: float
    host_link: float


GPUS = {
    # NVIDIA's data sheet of the A100 in SXM form: HBM2 or HBM2e, 16-bit tensor cores, NVLink 3
    # (600 GB/s both ways), PCIe 4.0 x16 (32 GB/s one way).
    "A100-40GB": Gpu(40e9, 1555e9, 312e12, 300e9, 32e9),
    "A100-80GB": Gpu(80e9, 2039e9, 312e12, 300e9, 32e9),
    # NVIDIA's data sheet of the H200: NVLink 4 (900 GB/s both ways), PCIe 5.0 x16.
    "H200": Gpu(141e9, 4800e9, 989e12, 450e9, 64e9),
}

# Measured, as shares of those figures.  Memory: streaming reads on an A100 reach 88 %
# (a pointer-chasing kernel of NVIDIA's developer forum, thread 339083; a GTC talk says 90 %).
# Arithmetic: 163 of 312 TFLOP/s per GPU in the large layers of Megatron-LM (Narayanan et al.,
# SC 2021, table 1).
READ_EFFICIENCY = 0.88
MATMUL_EFFICIENCY = 163 / 312

# Assumed, not measured: links reach four fifths of their data sheets; a transfer of its own and
# an all-reduce have to be started, 10 microseconds each.
LINK_EFFICIENCY = 0.8
START_SECONDS = 10e-6


@dataclass(frozen=True)
class ModelSize:
    """What a model costs; kv_hidden: numbers of the keys of one token in one layer."""

    num_weights: float
    num_layers: int
    hidden: int
    kv_hidden: int
    context_length: int = 2048

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        raise NotImplementedError("Task 14.4: ModelSize.kv_bytes_per_token is still to be written")


@dataclass(frozen=True)
class Deployment:
    """A model on some GPUs, and the slots of its KV cache.

    kv_slots: tokens that the cache holds; table 1 of the paper for its three deployments.
    """

    model: ModelSize
    gpu: Gpu
    num_gpus: int
    kv_slots: int


# Zhang et al. 2022 (OPT, table 1) and Touvron et al. 2023 (LLaMA, table 2).
OPT_13B = ModelSize(13e9, 40, 5120, 5120)
DEPLOYMENTS = {
    "opt-13b": Deployment(OPT_13B, GPUS["A100-40GB"], 1, 15_700),
    "opt-66b": Deployment(ModelSize(66e9, 64, 9216, 9216), GPUS["A100-40GB"], 4, 9_700),
    "opt-175b": Deployment(ModelSize(175e9, 96, 12288, 12288), GPUS["A100-80GB"], 8, 60_100),
    # As large as OPT-13B, on the same GPU.
    "llama-13b": Deployment(ModelSize(13e9, 40, 5120, 5120), GPUS["A100-40GB"], 1, 15_700),
    # Not the paper's: a longer context, for today's traces.  Slots in nine tenths of the memory,
    # less the weights.
    "llama-3-8b": Deployment(
        ModelSize(8.03e9, 32, 4096, 1024, 131_072), GPUS["A100-80GB"], 1, 426_000
    ),
}


@dataclass
class StepWork:
    """What one step has to do.

    tokens: that go through the layers.
    context_tokens: in the cache, summed over the sequences of the step.
    pairs: of a query and a key that it sees.
    copied_blocks, moved_blocks: on the device, and between device and host.
    """

    tokens: int = 0
    context_tokens: int = 0
    pairs: float = 0
    copied_blocks: int = 0
    moved_blocks: int = 0

    def add(self, scheduled: Iterable[ScheduledSequence]) -> None:
        """Count the tokens of these sequences."""
        raise NotImplementedError("Task 14.4: StepWork.add is still to be written")


class CostModel:
    """Seconds of a step of one deployment; constants are at the top of the file."""

    def __init__(self, deployment: Deployment, block_size: int) -> None:
        model, gpu, n = deployment.model, deployment.gpu, deployment.num_gpus
        self.deployment = deployment
        bandwidth = n * gpu.bandwidth * READ_EFFICIENCY
        operations = n * gpu.operations * MATMUL_EFFICIENCY
        self._weights = model.num_weights * BYTES / bandwidth
        self._token = 2 * model.num_weights / operations
        self._context_token = model.kv_bytes_per_token / bandwidth
        self._pair = 4 * model.num_layers * model.hidden / operations
        # Two all-reduces in a layer, each of a ring: 2 (n - 1) / n times the activations pass
        # through every link.
        link = gpu.link * LINK_EFFICIENCY
        self._reduce = 2 * model.num_layers * START_SECONDS if n > 1 else 0.0
        self._reduce_token = 2 * model.num_layers * 2 * (n - 1) / n * model.hidden * BYTES / link
        block = model.kv_bytes_per_token * block_size
        self._copy = 2 * block / bandwidth
        # As the paper swaps (section 7.3): a transfer for the keys and one for the values of each
        # block and layer, over all links to the host at once.
        self._move = 2 * model.num_layers * START_SECONDS + block / (
            n * gpu.host_link * LINK_EFFICIENCY
        )

    def seconds(self, work: StepWork) -> float:
        """Of one step."""
        raise NotImplementedError("Task 14.4: CostModel.seconds is still to be written")

    def recompute(self, tokens: int) -> float:
        """Seconds to compute the keys and values of a sequence again, by itself."""
        return self.seconds(StepWork(tokens, tokens, tokens * tokens / 2))

    @property
    def move_block(self) -> float:
        """Seconds to swap one block out, or in."""
        return self._move

    @property
    def compute_token(self) -> float:
        """Seconds to compute one more token of a large step."""
        return self._token


def deployment_named(name: str) -> Deployment:
    """One of the paper's deployments; ConfigurationError if there is none of this name."""
    if name not in DEPLOYMENTS:
        raise ConfigurationError(
            f"there is no deployment {name!r}; choose one of {', '.join(DEPLOYMENTS)}, or "
            "describe yours in a file for --hardware"
        )
    return DEPLOYMENTS[name]


def read_deployment(path: Path) -> Deployment:
    """A deployment from a JSON file: {"model": {...}, "gpu": "A100-40GB" or {...}, ...}.

    The names are those of ModelSize, Gpu and Deployment.
    """
    try:
        entry = json.loads(path.read_text("utf-8"))
        gpu = entry["gpu"]
        if isinstance(gpu, str):
            if gpu not in GPUS:
                raise ValueError(f"there is no GPU {gpu!r}; it knows {', '.join(GPUS)}")
            entry["gpu"] = GPUS[gpu]
        else:
            entry["gpu"] = Gpu(**gpu)
        entry["model"] = ModelSize(**entry["model"])
        deployment = Deployment(**entry)
        numbers = [
            (field.name, getattr(part, field.name))
            for part in (deployment.model, deployment.gpu)
            for field in fields(part)
        ]
        numbers += [("num_gpus", deployment.num_gpus), ("kv_slots", deployment.kv_slots)]
        for name, number in numbers:
            if not isinstance(number, (int, float)) or isinstance(number, bool) or number <= 0:
                raise ValueError(f"{name} is {number!r}; it must be a number above 0")
        counts = ("num_layers", "hidden", "kv_hidden", "context_length", "num_gpus", "kv_slots")
        for name, number in numbers:
            if name in counts and not isinstance(number, int):
                raise ValueError(f"{name} is {number!r}; it must be a whole number, such as 400000")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} describes no deployment: {error}; it needs model, gpu, num_gpus and kv_slots "
            "as `minipaged simulate --help` shows"
        ) from error
    return deployment
