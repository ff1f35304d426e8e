"""The emulated kernels of other sources than the project's, compiled in seconds.

What takes long in `build.emulated_kernels` is the binding, which includes torch's headers and
which nobody changes: here it is compiled once, and kept beside what `build` keeps.
"""

import fcntl
import hashlib
import itertools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

from minipaged.attention import build

_count = itertools.count()


def compile_cpp(*arguments):
    """Run the compiler with the flags of the emulated kernels."""
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    options = ["-std=c++20", "-fPIC", *build.EMULATED_FLAGS, *(f"-isystem{f}" for f in folders)]
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *options, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if done.returncode:
        raise RuntimeError(f"the compiler says:\n{done.stderr[-4000:]}")


def binding(sources):
    """The compiled binding of these sources."""
    contents = hashlib.blake2b(torch.__version__.encode() + sys.version.encode(), digest_size=8)
    for name in ("binding.cpp", "arguments.h"):
        contents.update((sources / name).read_bytes())
    home = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "minipaged"))
    home.mkdir(parents=True, exist_ok=True)
    target = home / f"binding_{contents.hexdigest()}.o"
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, the others wait
        if not target.exists():
            new = target.with_suffix(f".{os.getpid()}.o")
            flags = ["-DTORCH_EXTENSION_NAME=planted", "-c", sources / "binding.cpp", "-o", new]
            compile_cpp(*flags)
            new.rename(target)
    return target


def compile_kernels(sources, dtypes, head_sizes):
    """What build.emulated_kernels makes of these sources, but for the binding.

    RuntimeError with what the compiler says where they do not compile.
    """
    # pybind11 knows modules by their full name, so that each is given a package of its own.
    package = f"planted{os.getpid()}_{next(_count)}"
    library = sources / f"{package}.so"
    kernels = [*build.instances(dtypes, head_sizes), "-x", "c++", sources / "paged_attention.cu"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    compile_cpp("-shared", *undefined, *kernels, "-x", "none", binding(sources), "-o", library)
    return build.import_library(f"{package}.planted", library)


def sink_scores(query, cache, kv):
    """Make every score of these a large negative number; returns the queries and keys, values.

    A maximum that begins at 0 instead of minus infinity then leaves only weights of 0.
    """
    cache.keys[0].sub_(30)  # where nobody wrote there is NaN, and stays
    key, value = kv
    return query.abs() + 30, (key - 30, value)
