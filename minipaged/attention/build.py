"""Compiles the sources in cuda/ when they are first needed, and loads the result.

Through torch.utils.cpp_extension.load_inline, into a folder named after everything that the
result depends on, so that it happens once.  Importing this file compiles nothing.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minipaged.errors import ConfigurationError

logger = logging.getLogger("minipaged")

SOURCES = Path(__file__).parents[2] / "cuda"

CPP_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "half_t",
    torch.bfloat16: "bfloat16_t",
}


# torch forbids in CUDA sources what numbers of 16 bits need here: T(0.0f), float(x), a + b.
ALLOWED = [
    f"-U__CUDA_NO_{what}__"
    for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]

EMULATED_FLAGS = [
    "-Og",  # a third less to compile than -O1, which runs a fifth faster
    "-std=c++17",  # of C++20, which torch asks for, every library gets a std::string of its own
    "-U_FORTIFY_SOURCE",  # it forbids longjmp from one stack to another
    "-Wno-unknown-pragmas",
    "-fvisibility=hidden",
]


def find_compiler() -> None:
    """Raises ConfigurationError unless torch can call a C++ compiler."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise ConfigurationError(
            f"found no C++ compiler {compiler!r} to compile the attention with; install g++ or "
            'clang++ (or name one in CXX), or choose attention "torch"'
        )
    # Where pip puts ninja, which torch compiles with; an environment need not be activated.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        raise ConfigurationError(
            "found no ninja, which torch compiles with; `pip install ninja`, or choose attention "
            '"torch"'
        )


def find_gpu() -> None:
    """Raises ConfigurationError unless torch can use a GPU."""
    if not torch.cuda.is_available():
        raise ConfigurationError(
            'attention "cuda" needs an NVIDIA GPU and a torch built for CUDA; choose "native", '
            '"torch", or "emulated" to run the kernels on the CPU'
        )


def find_nvcc() -> None:
    """Raises ConfigurationError unless there is a GPU, and an nvcc that fits torch."""
    find_compiler()
    find_gpu()
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        wanted = ".".join(str(torch.version.cuda).split(".")[:2])
        raise ConfigurationError(
            "found no nvcc to compile the kernels with; install the CUDA toolkit that fits torch "
            f'(`pip install "cuda-toolkit[nvcc,cudart,cccl]=={wanted}.*"`) and set CUDA_HOME to it'
        )
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise ConfigurationError(
            f"the kernels need a GPU of compute capability 8.0 or later, and this one has "
            f'{major}.{minor}; choose attention "torch"'
        )


def head_size_fits(head_size: int, dtype: torch.dtype) -> None:
    """Raises ConfigurationError for heads that cannot be read 16 bytes at a time."""
    if dtype not in CPP_TYPES:
        raise ConfigurationError(
            f"there is no kernel for {dtype}; choose one of {', '.join(map(str, CPP_TYPES))}"
        )
    if head_size < 1 or head_size * dtype.itemsize % 16 or head_size > 256:
        raise ConfigurationError(
            f"there is no kernel for heads of {head_size} elements of {dtype}: they must be a "
            'multiple of 16 bytes and at most 256; choose attention "torch"'
        )


@functools.cache
def emulated_kernels(
    dtypes: tuple[torch.dtype, ...],
    head_sizes: tuple[int, ...],
    checked: bool = True,
) -> Any:
    """The kernels for these types and head sizes, compiled for the CPU (cuda_on_cpu.h)."""
    find_compiler()
    flags = [*EMULATED_FLAGS, *instances(dtypes, head_sizes)]
    if not checked:
        flags.append("-DUNCHECKED")
    sources = [SOURCES / "paged_attention.cu", SOURCES / "binding.cpp"]
    return load("minipaged_emulated", sources, flags)


@functools.cache
def native_attention() -> Any:
    """The attention for this processor, with the vector instructions that torch uses on it."""
    find_compiler()
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    if capability != "DEFAULT":
        flags.append("-march=native")
    if platform.system() == "Linux":
        # Its threads are those of torch, whose OpenMP is loaded already: so nothing is linked.
        flags.append("-fopenmp")
    return load("minipaged_native", [SOURCES / "native_attention.cpp"], flags, ["native_attention"])


@functools.cache
def cuda_kernels(dtypes: tuple[torch.dtype, ...], head_sizes: tuple[int, ...]) -> Any:
    """The kernels for these types and head sizes, compiled for the GPU of this machine."""
    find_nvcc()
    major, minor = torch.cuda.get_device_capability()
    flags = nvcc_flags(dtypes, head_sizes, [f"sm_{major}{minor}"])
    return load(
        "minipaged_cuda",
        [SOURCES / "binding.cpp"],
        ["-O2"],
        cuda_sources=[SOURCES / "paged_attention.cu"],
        cuda_flags=[shlex.quote(flag) for flag in flags],  # torch gives them to a shell
    )


def instances(
    dtypes: Sequence[torch.dtype], head_sizes: Sequence[int], versions: Sequence[str] = ()
) -> list[str]:
    """Flags that say which kernels of paged_attention.cu are to be compiled.

    versions: names in `kernels.DECODING` and `kernels.PROMPT`; all of them by default.
    """
    types = ",".join(CPP_TYPES[dtype] for dtype in dtypes)
    flags = [f"-DNUMBER_TYPES={types}", f"-DHEAD_SIZES={','.join(map(str, head_sizes))}"]
    return [*flags, f"-DVERSIONS={','.join(versions)}"] if versions else flags


def nvcc_flags(
    dtypes: Sequence[torch.dtype], head_sizes: Sequence[int], architectures: Sequence[str]
) -> list[str]:
    """Flags for nvcc, behind those of torch.

    architectures: like "sm_90"; where they are named, torch adds none of its own.
    """
    targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in architectures]
    # To nvcc a comma separates values of one flag, unless it is escaped.
    chosen = [flag.replace(",", r"\,") for flag in instances(dtypes, head_sizes)]
    return ["-O3", *ALLOWED, *targets, *chosen]


def load(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str],
    functions: Sequence[str] | None = None,
    cuda_sources: Sequence[Path] = (),
    cuda_flags: Sequence[str] = (),
) -> Any:
    """The Python module of these functions, or that the sources define; compiled at most once."""
    files = [*sources, *cuda_sources]
    if missing := [str(path) for path in files if not path.exists()]:
        raise ConfigurationError(
            f"found no {missing[0]}: the kernels are compiled from the project's own tree; "
            "install it from there with `pip install --editable .`"
        )
    folder = _build_folder(name, files, [*flags, *cuda_flags])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "in_use", "w")  # noqa: SIM115
    except OSError as error:
        raise ConfigurationError(
            f"what is compiled cannot be kept in {folder}: {error}; set TORCH_EXTENSIONS_DIR to a "
            'folder that can be written to, or choose attention "torch"'
        ) from error
    with lock:
        # One process compiles, the others wait; the system lets go of it if that one dies.
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)  # torch's own, which a killed process leaves
        complete = folder / "complete"  # a linker that is killed leaves a part of a library
        if complete.exists():
            return import_library(folder.name, folder / f"{folder.name}.so")
        start = time.perf_counter()
        logger.info("compiling %s; this takes a minute, once", name)
        from torch.utils import cpp_extension  # half a second, for those who compile

        try:
            module = cpp_extension.load_inline(
                folder.name,  # of its own, so that torch numbers no versions of one name
                cpp_sources=[path.read_text() for path in sources],
                cuda_sources=[path.read_text() for path in cuda_sources],
                functions=functions,
                extra_cflags=list(flags),
                extra_cuda_cflags=list(cuda_flags),
                extra_include_paths=[str(sources[0].parent)],
                extra_ldflags=_cuda_runtime(folder) if cuda_sources else [],
                build_directory=str(folder),
                no_implicit_headers=True,
            )
        except (RuntimeError, OSError) as error:
            raise ConfigurationError(
                f"the compiler could not build {name}; choose attention "
                f'"torch", or mend what it says:\n{error}'
            ) from error
        complete.touch()
        logger.debug("%s was ready after %.1f s", name, time.perf_counter() - start)
    return module


def _cuda_runtime(folder: Path) -> list[str]:
    """Where the linker finds the CUDA runtime: the one that torch has loaded, whatever its name.

    A toolkit installed by pip has no file by the name that the linker looks for.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split()[-1])
        if path.name.startswith("libcudart.so"):
            link = folder / "libcudart.so"
            link.unlink(missing_ok=True)
            link.symlink_to(path)
            return [f"-L{folder}"]
    return []


def import_library(name: str, library: Path) -> Any:
    """The module of this name in a library that was compiled before."""
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _processor() -> str:
    """What the processor can do, beyond what torch asks: -march=native means all of it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    able = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return able or platform.processor()


def _build_folder(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """A folder for exactly these sources, flags, compiler, processor and torch."""
    everything = hashlib.blake2b(digest_size=8)
    headers = sorted(path for path in sources[0].parent.rglob("*") if path.suffix in (".h", ".cuh"))
    for path in [*sources, *headers]:
        everything.update(path.read_bytes())
    parts = [*flags, torch.__version__, platform.python_version(), platform.machine()]
    parts += [os.environ.get("CXX", "c++"), torch.backends.cpu.get_cpu_capability()]
    parts += [_processor()] if "-march=native" in flags else []
    everything.update("\0".join(map(str, parts)).encode())
    home = os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "minipaged")
    return Path(home) / f"{name}_{everything.hexdigest()}"
