"""The emulated kernels of other sources than the project's, compiled in seconds.

What takes long in `build.emulated_kernels` is the binding, which includes torch's headers, and the
headers of the kernels themselves.  Nobody changes these: here they are compiled once, and kept
beside what `build` keeps.  Nothing is optimized, since most of what is compiled here runs for a
second.
"""

import hashlib
import itertools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from once import once

from minipaged.attention import build

_count = itertools.count()


HEADERS = """\
#define _XOPEN_SOURCE 700
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>
#include <setjmp.h>
#include <ucontext.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
"""


def compile_cpp(*arguments):
    """Run the compiler with the flags of the emulated kernels, but for the optimization."""
    folders = [Path(torch.__file__).parent / "include", sysconfig.get_path("include")]
    options = [
        "-fPIC",
        *build.EMULATED_FLAGS,
        "-O0",
        *(f"-isystem{f}" for f in folders),
    ]
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *options, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if done.returncode:
        raise RuntimeError(f"the compiler says:\n{done.stderr[-4000:]}")


def binding(sources):
    """The compiled binding of these sources."""
    files = [sources / "binding.cpp", sources / "arguments.h"]
    flags = ["-O1", "-DTORCH_EXTENSION_NAME=planted", "-c", files[0], "-o"]  # linked often
    contents = b"".join(path.read_bytes() for path in files)
    return kept("binding.o", contents, lambda target: compile_cpp(*flags, target))


def headers():
    """The compiled headers of the kernels: what is included instead is found beside it."""

    def make(target):
        source = target.with_suffix("")
        source.write_text(HEADERS)
        compile_cpp("-x", "c++-header", source, "-o", target)

    return kept("headers.h.gch", HEADERS.encode(), make).with_suffix("")


def kept(name, contents, make):
    """A file that is made once from these contents, in a folder of its own."""
    key = hashlib.blake2b(contents, digest_size=8)
    key.update(f"{torch.__version__} {sys.version} {os.environ.get('CXX')}".encode())
    home = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "minipaged"))
    target = home / f"quick_{key.hexdigest()}" / name
    once(target.parent, lambda: make(target))
    return target


def compile_kernels(sources, dtypes, head_sizes, versions=()):
    """What build.emulated_kernels makes of these sources, but for the binding.

    versions: the kernels that are wanted; all of them by default.
    RuntimeError with what the compiler says where they do not compile.
    """
    # pybind11 knows modules by their full name, so that each is given a package of its own.
    package = f"planted{os.getpid()}_{next(_count)}"
    library = sources / f"{package}.so"
    kernels = [*build.instances(dtypes, head_sizes, versions), "-include", headers()]
    kernels += ["-x", "c++", sources / "paged_attention.cu"]
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
