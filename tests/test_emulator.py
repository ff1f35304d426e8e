"""The emulated GPU itself, on kernels that are only there to be seen through by it."""

import subprocess

import pytest
import quick_kernels

from minipaged.attention.build import SOURCES

KERNELS = """\
#include "cuda_on_cpu.h"

#include <cstdio>
#include <cstdlib>

constexpr unsigned ALL = 0xFFFFFFFF;

// Both warps read, and then one of the first writes: after its own __syncwarp, not after a barrier.
__global__ void read_by_two_warps(Global<float> out) {
    SharedMemory memory;
    Shared<float> shared = memory.array<float>(1, "shared");
    if (threadIdx.x == 0) shared[0] = 1.0f;
    __syncthreads();
    const float seen = shared[0];
    if (threadIdx.x < 32) {
        __syncwarp();
        if (threadIdx.x == 0) shared[0] = 2.0f;
    }
    out[threadIdx.x] = seen;
}

__global__ void neighbours(Global<float> out, int distance) {
    out[threadIdx.x] = __shfl_sync(ALL, float(threadIdx.x), int(threadIdx.x) + distance);
}

__global__ void count(Global<float> out) { out[0] += 1; }

int main(int, char** given) {
    const int what = atoi(given[1]), x = atoi(given[2]), y = atoi(given[3]);
    float memory[64] = {};
    Global<float> out(memory, 64, "out");
    try {
        if (what == 0) {
            cpu::seed(x);
            LAUNCH(read_by_two_warps, 1, 64, 64, 0, out);
        } else if (what == 1) {
            LAUNCH(neighbours, 1, 32, 0, 0, out, x);
        } else {
            LAUNCH(count, dim3(x, y), 1, 0, 0, out);
        }
        for (int i = 0; i < 32; i++) printf("%g ", memory[i]);
    } catch (const std::exception& error) {
        printf("%s", error.what());
    }
}
"""

KEPT = """\
#include "cuda_on_cpu.h"

__global__ void keep(Global<float> out) {
    SharedMemory memory;
    Shared<float> shared = memory.array<float>(32, "shared");
    shared[threadIdx.x] = 1.0f;
    __syncthreads();
    const auto mine = shared[0];
    out[threadIdx.x] = mine;
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    source, program = folder / "kernels.cpp", folder / "kernels"
    source.write_text(KERNELS)
    quick_kernels.compile_cpp(f"-I{SOURCES}", source, "-o", program)

    def run(*arguments):
        done = subprocess.run(
            [program, *map(str, arguments)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_race_with_another_warp_is_seen_in_every_order(run):
    """What lanes of the writer's own warp read does not hide what another warp has read."""
    for seed in range(30):
        assert "data race" in run(0, seed, 0), seed


@pytest.mark.parametrize("distance", [1, -1, 40])
def test_lanes_are_counted_modulo_32(run, distance):
    got = [float(number) for number in run(1, distance, 0).split()]
    assert got == [(lane + distance) % 32 for lane in range(32)]


@pytest.mark.parametrize("grid", [(0, 1), (1, 0), (1, 70_000)])
def test_a_grid_that_no_gpu_takes(run, grid):
    assert "a grid has 1 to" in run(2, *grid)


def test_a_grid_is_run_whole(run):
    assert run(2, 70, 3).split()[0] == "210"


def test_an_element_of_shared_memory_cannot_be_kept_unread(tmp_path):
    """`auto` would be read when it is used, and on a GPU it is read at once."""
    source = tmp_path / "kept.cpp"
    source.write_text(KEPT)
    with pytest.raises(RuntimeError, match="mine"):
        quick_kernels.compile_cpp(f"-I{SOURCES}", "-c", source, "-o", tmp_path / "kept.o")
    source.write_text(KEPT.replace("const auto", "const float"))
    quick_kernels.compile_cpp(f"-I{SOURCES}", "-c", source, "-o", tmp_path / "kept.o")
