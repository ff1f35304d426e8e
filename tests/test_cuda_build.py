"""The way of the CUDA kernels through torch's door, as far as a machine without a GPU can go it.

nvcc compiles them with torch's flags and ours, and the result is linked and imported.  torch's own
CUDA libraries, which a torch for the CPU lacks, are empty here: nothing is launched.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NVCC = shutil.which("nvcc")

BUILD = """
import ctypes, sys, torch
from torch.utils import cpp_extension
from minipaged.attention import build

ctypes.CDLL(sys.argv[1])  # a torch for CUDA has loaded the runtime
cpp_extension.CUDA_HOME = sys.argv[2]
torch.cuda.get_device_capability = lambda: (9, 0)
build.find_nvcc = build.find_compiler
kernels = build.cuda_kernels((torch.bfloat16,), (16,))
print(kernels.attention, kernels.write_cache, kernels.copy_cache)
"""


def toolkit():
    """The folder of the CUDA toolkit, behind whatever script stands for its nvcc; or None."""
    command = [str(NVCC), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", "x.o"]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    tops = [line.split("TOP=")[1] for line in said.splitlines() if "TOP=" in line]
    return Path(tops[0]).resolve() if tops else None


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_the_kernels_are_built_by_torch_and_linked(tmp_path):
    home = toolkit()
    runtimes = [*home.glob("lib*/libcudart.so.*"), *home.glob("targets/*/lib/libcudart.so.*")]
    if not runtimes:
        pytest.skip("a CUDA toolkit without its runtime")
    (tmp_path / "include").symlink_to(home / "include")  # a toolkit without a libcudart.so
    (tmp_path / "bin").symlink_to(home / "bin")
    for name in ("c10_cuda", "torch_cuda"):
        library = tmp_path / f"lib{name}.so"
        subprocess.run(["c++", "-shared", "-x", "c++", os.devnull, "-o", library], check=True)
    folders = {"LIBRARY_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(runtimes[0]), str(tmp_path)],
        env={**os.environ, **folders, "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("built-in method") == 3
