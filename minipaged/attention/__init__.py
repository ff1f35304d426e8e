"""Attention over a paged KV cache, chosen by name.

`contiguous.py` is the oracle.  `reference` walks the blocks as the paper's equation does, `torch`
gathers them with PyTorch's operators.  The others are compiled when they are first used: `native`
reads the blocks in place on the CPU, `cuda` on a GPU, and `emulated` runs the kernels of `cuda` on
the CPU, slowly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from minipaged.attention import build, gathered, kernels, native, paged
from minipaged.attention.batch import PagedAttention, PagedBatch
from minipaged.errors import ConfigurationError

Prepare = Callable[[PagedBatch], PagedAttention]


def _emulated(debug: bool) -> Prepare:
    build.find_compiler()
    compile_kernels = functools.partial(build.emulated_kernels, checked=False)
    return kernels.KernelAttention(compile_kernels, debug=debug)


def _cuda(debug: bool) -> Prepare:
    build.find_nvcc()
    return kernels.KernelAttention(build.cuda_kernels, "cuda", debug=debug)


# Given whether to check the block tables of every step, which a kernel trusts.
BACKENDS: dict[str, Callable[[bool], Prepare]] = {
    "reference": lambda debug: paged.prepare,
    "torch": lambda debug: gathered.GatheredAttention(),
    "native": native.native_or_gathered,
    "emulated": _emulated,
    "cuda": _cuda,
}


def backend_name(name: str = "auto", device: str | None = None) -> str:
    """The name of the attention; raises ConfigurationError for an unknown one.

    device: "cpu" or "cuda", where the model is, if it is in memory already; then "auto" is what
        reads memory there.  Else it is "cuda" where there is a GPU, and "torch" elsewhere.
    """
    if name == "auto":
        on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
        return "cuda" if on_gpu else "torch"
    if name not in BACKENDS:
        raise ConfigurationError(
            f"there is no attention {name!r}; choose one of auto, {', '.join(sorted(BACKENDS))}"
        )
    return name


def device_of(name: str = "auto") -> str:
    """Where the model has to be for this attention: "cpu" or "cuda".

    Raises ConfigurationError where that is a GPU, and there is none.
    """
    if backend_name(name) != "cuda":
        return "cpu"
    build.find_gpu()
    return "cuda"


def attention_backend(name: str = "auto", debug: bool = False) -> Prepare:
    """What prepares the attention of each step.

    Raises ConfigurationError where it cannot run here, and says what is missing.
    """
    return BACKENDS[backend_name(name)](debug)
