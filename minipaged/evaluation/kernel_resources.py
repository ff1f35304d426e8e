"""What the compiler gives each kernel of cuda/: registers, shared memory and spills.

Needs nvcc, and no GPU.  A kernel that needs more registers than there are keeps some in slow
memory: it spills.  Dynamic shared memory is chosen at the launch, and is not in the table.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minipaged.attention.build import SOURCES, nvcc_flags
from minipaged.errors import ConfigurationError

ARCHITECTURES = ("sm_80", "sm_90")


@dataclass(frozen=True)
class KernelResources:
    """Of one kernel on one architecture; bytes of shared memory per block, spilled per thread."""

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    spill_bytes: int


def kernel_resources(
    dtype: torch.dtype,
    head_sizes: Sequence[int],
    float8_cache: bool = False,
    architectures: Sequence[str] = ARCHITECTURES,
) -> list[KernelResources]:
    """Compile all kernels for this type and these head sizes, any warning being an error.

    Raises ConfigurationError without nvcc, and with what it says where it fails.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ConfigurationError(
            "found no nvcc to compile the kernels with; install the CUDA toolkit, for example "
            'with `pip install "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"`, and put it on the PATH'
        )
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    flags = [*COMMON_NVCC_FLAGS, "-std=c++20", "-Xptxas", "-v", "-Werror", "all-warnings"]
    flags += ["--threads", "0", f"-DFLOAT8_CACHE={int(float8_cache)}"]
    flags += nvcc_flags((dtype,), head_sizes, architectures)
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [nvcc, *flags, "-fatbin", str(SOURCES / "paged_attention.cu")],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    if result.returncode != 0:
        raise ConfigurationError(f"nvcc does not compile the kernels:\n{result.stderr}")
    return parse_ptxas(result.stderr)


def parse_ptxas(report: str) -> list[KernelResources]:
    """The kernels in what `ptxas -v` prints, by name and architecture."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'"
        r".*?(?P<spill>\d+) bytes spill stores"
        r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = list(pattern.finditer(report))
    names = _demangle([match["name"] for match in found])
    resources = []
    for match, name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        resources.append(
            KernelResources(
                name,
                match["architecture"],
                int(match["registers"]),
                int(shared[1]) if shared else 0,
                int(match["spill"]),
            )
        )
    return sorted(resources, key=lambda r: (r.kernel, r.architecture))


def _demangle(names: list[str]) -> list[str]:
    """C++ names without their argument lists, where c++filt is installed (it comes with g++)."""
    if shutil.which("c++filt") is None:
        return names
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [line.removeprefix("void ").split("(")[0] for line in text.splitlines()]
