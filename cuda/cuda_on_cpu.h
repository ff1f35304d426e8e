// Runs CUDA kernels on a CPU, unchanged, as a deliberately hostile GPU.
//
// Under nvcc this file gets out of the way.  Under g++ or clang++ it makes every CUDA thread of
// a thread block a fiber (a stack of its own; one runs at a time) and hands over at every
// barrier, __syncwarp and shuffle to a fiber drawn at random from a seed, so that code which is
// right only in the order that one GPU happens to run it in is wrong here sooner or later.
//
//     LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)
//
// What it reports, with file, line, thread and block, as a std::runtime_error of the launch:
//   - threads that wait for one another for ever: barriers in divergent code, early returns;
//   - a thread that is not in its own mask, a shuffle that reads a lane outside of the mask,
//     lanes that meet at different shuffles;
//   - what checked_memory.h finds: indices out of bounds, data races in shared memory, reads of
//     shared memory that nobody wrote.
//
// It cannot see races in global memory or of single bytes, that lanes meet in one helper called from
// two places, what a __syncwarp of some lanes leaves unordered, the rounding and speed of a GPU, and
// endless loops.
// -DUNCHECKED leaves out the checks of checked_memory.h, for speed.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <cstdio>

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

template <typename T>
using Global = T*;  // an array in the memory of the GPU
template <typename T>
using Shared = T*;  // an array in the memory that the threads of a thread block share

template <typename T>
Global<T> global_array(void* data, int64_t, const char*) {
    return static_cast<T*>(data);
}

// Stands where a part of a kernel is still to be written, and stops the kernel with these words.
__device__ inline void not_implemented(const char* what) {
    if (threadIdx.x == 0) printf("%s\n", what);
    __trap();
}

// Hands out the dynamic shared memory of a thread block, from its beginning, array by array.
class SharedMemory {
public:
    template <typename T>
    __device__ Shared<T> array(int count, const char*) {
        extern __shared__ __align__(32) unsigned char bytes[];
        T* begin = reinterpret_cast<T*>(bytes + used_);
        used_ += (count * sizeof(T) + 31) / 32 * 32;
        return begin;
    }

private:
    unsigned used_ = 0;
};

#else  // ---------------------------------------------------------------- g++ or clang++

#define _XOPEN_SOURCE 700  // macOS declares the ucontext functions only then
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
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cpu {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 64 * 1024;

// ---- Fibers -------------------------------------------------------------------------------

enum class State { runnable, at_barrier, at_warp, returned };

struct Fiber {
    State state = State::returned;
    const char* what = "";  // the function it waits in, and where that is called
    const char* file = "";
    int line = 0;
    unsigned mask = 0;   // lanes it waits for
    uint64_t value = 0;  // what it gives to a shuffle, then what it got
    int source = 0;      // the lane it reads
    bool started = false;
    std::unique_ptr<char[]> stack;
    ucontext_t beginning;
    jmp_buf position;
};

struct Gpu {
    std::vector<Fiber> fibers;           // one per thread of a thread block, used for all of them
    std::vector<int> runnable;           // threads that could go on
    std::vector<unsigned> arrived;       // lanes of each warp that wait at a warp's function
    std::function<void()> kernel;        // the launched kernel with its arguments
    int num_threads = 0, thread = 0;     // of a block; the one that runs now
    int at_barrier = 0;
    jmp_buf scheduler;
    std::string error;                   // why the launch failed
    uint64_t random = 1;
    std::vector<uint64_t> shared;        // dynamic shared memory of the running block
    size_t shared_bytes = 0, shared_used = 0;
    uint32_t barriers = 0;               // block-wide barriers passed so far, in all blocks
    uint32_t first_barrier = 0;          // their number when the running block began
    std::vector<uint32_t> warp_barriers; // and __syncwarps of each warp
};
inline Gpu gpu;

inline int draw(int n) {  // xorshift: fast, and the same everywhere
    gpu.random ^= gpu.random << 13;
    gpu.random ^= gpu.random >> 7;
    gpu.random ^= gpu.random << 17;
    return static_cast<int>((gpu.random >> 33) % n);
}

// The order of everything that follows; every order must give the same result.
inline void seed(uint64_t seed) { gpu.random = seed * 0x9E3779B97F4A7C15u | 1; }

inline std::string name(dim3 at) {
    const std::string z = std::to_string(at.z);
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + z + ")";
}

inline std::string place(const char* file, int line) {
    const char* slash = strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

// Ends the launch from inside of a fiber: an exception could not leave its stack.
[[noreturn]] inline void fail(const std::string& what) {
    gpu.error = "block " + name(blockIdx) + ", thread " + std::to_string(gpu.thread) + ": " + what;
    _longjmp(gpu.scheduler, 1);
}

// Lets another fiber run until somebody has made this one runnable again.
inline void suspend() {
    if (_setjmp(gpu.fibers[gpu.thread].position) == 0) _longjmp(gpu.scheduler, 1);
}

inline void make_runnable(int thread) {
    gpu.fibers[thread].state = State::runnable;
    gpu.runnable.push_back(thread);
}

inline void fiber_main() {
    for (;;) {  // once for every thread block
        gpu.kernel();
        gpu.fibers[gpu.thread].state = State::returned;
        suspend();
    }
}

inline void resume(int thread) {
    Fiber& fiber = gpu.fibers[thread];
    gpu.thread = thread;
    threadIdx.x = thread % blockDim.x;
    threadIdx.y = thread / blockDim.x % blockDim.y;
    threadIdx.z = thread / blockDim.x / blockDim.y;
    if (_setjmp(gpu.scheduler) != 0) return;  // it has suspended itself, or failed
    if (fiber.started) _longjmp(fiber.position, 1);
    fiber.started = true;
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(STACK_BYTES);
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = fiber.stack.get();
    fiber.beginning.uc_stack.ss_size = STACK_BYTES;
    fiber.beginning.uc_link = nullptr;
    makecontext(&fiber.beginning, fiber_main, 0);
    setcontext(&fiber.beginning);
}

// ---- Barriers and shuffles ----------------------------------------------------------------

inline Fiber& wait_at(State state, const char* what, const char* file, int line) {
    Fiber& me = gpu.fibers[gpu.thread];
    me.state = state;
    me.what = what;
    me.file = file;
    me.line = line;
    return me;
}

inline std::string describe(const Fiber& fiber) {
    char mask[24] = "";
    if (fiber.mask) snprintf(mask, sizeof mask, " with mask 0x%08x", fiber.mask);
    return std::string(fiber.what) + ", " + place(fiber.file, fiber.line) + mask;
}

inline bool same_place(const Fiber& a, const Fiber& b) {
    return a.line == b.line && a.mask == b.mask && strcmp(a.file, b.file) == 0;
}

inline void sync_threads(const char* file, int line) {
    Fiber& me = wait_at(State::at_barrier, "__syncthreads", file, line);
    me.mask = 0;
    if (++gpu.at_barrier == gpu.num_threads) {
        for (const Fiber& other : gpu.fibers)
            if (other.state == State::at_barrier && !same_place(me, other))
                fail("the threads of the block meet at different barriers: " + describe(me) +
                     " and " + describe(other));
        gpu.at_barrier = 0;
        gpu.barriers++;
        for (int thread = 0; thread < gpu.num_threads; thread++) make_runnable(thread);
    }
    suspend();
}

// Waits for the lanes of `mask`; the last of them gives each the value of the lane it reads.
inline uint64_t meet(const char* what, const char* file, int line, unsigned mask, uint64_t value,
                     int source) {
    const int warp = gpu.thread / WARP, lane = gpu.thread % WARP, first = warp * WARP;
    Fiber& me = wait_at(State::at_warp, what, file, line);
    me.mask = mask;
    me.value = value;
    me.source = source;
    if (!(mask >> lane & 1))
        fail(describe(me) + ": lane " + std::to_string(lane) + " is not in its own mask");
    if (!(mask >> source & 1))
        fail(describe(me) + ": reads lane " + std::to_string(source) + ", not in the mask");
    gpu.arrived[warp] |= 1u << lane;
    if ((gpu.arrived[warp] & mask) != mask) {
        suspend();
        return me.value;
    }
    uint64_t values[WARP];
    for (int i = 0; i < WARP; i++) {
        if (!(mask >> i & 1)) continue;
        const Fiber& other = gpu.fibers[first + i];
        if (!same_place(me, other))
            fail("lanes of one warp meet at different places: " + describe(me) + " and " +
                 describe(other));
        values[i] = other.value;
    }
    gpu.arrived[warp] &= ~mask;
    for (int i = 0; i < WARP; i++) {
        if (!(mask >> i & 1)) continue;
        Fiber& other = gpu.fibers[first + i];
        other.value = values[other.source];
        if (i != lane) make_runnable(first + i);
    }
    me.state = State::runnable;  // and runs on: which lane comes last is drawn already
    return me.value;
}

inline void sync_warp(const char* file, int line, unsigned mask = 0xFFFFFFFF) {
    const int warp = gpu.thread / WARP;
    const bool last = ((gpu.arrived[warp] | 1u << gpu.thread % WARP) & mask) == mask;
    if (last) gpu.warp_barriers[warp]++;  // before any lane runs on
    meet("__syncwarp", file, line, mask, 0, gpu.thread % WARP);
}

template <typename T>
T shuffle(const char* what, const char* file, int line, unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    const int lane = gpu.thread % WARP;
    bits = meet(what, file, line, mask, bits, source < WARP ? source : lane);
    memcpy(&value, &bits, sizeof value);
    return value;
}

// ---- Launches -----------------------------------------------------------------------------

// Who waits where, when nobody can go on.
inline std::string deadlock() {
    std::map<std::string, int> groups;
    for (int thread = 0; thread < gpu.num_threads; thread++) {
        const Fiber& fiber = gpu.fibers[thread];
        groups[fiber.state == State::returned ? "returned" : "wait at " + describe(fiber)]++;
    }
    std::string text = "block " + name(blockIdx) + " is stuck:";
    for (const auto& [what, count] : groups)
        text += (text.back() == ':' ? " " : ", ") + std::to_string(count) + " threads " +
                (what == "returned" ? "have " : "") + what;
    return text;
}

inline void run_block() {
    gpu.shared_used = 0;
    memset(gpu.shared.data(), 0xFF, gpu.shared.size() * 8);  // NaN, -1: loud
    gpu.at_barrier = 0;
    gpu.first_barrier = ++gpu.barriers;
    gpu.arrived.assign((gpu.num_threads + WARP - 1) / WARP, 0);
    gpu.warp_barriers.assign(gpu.arrived.size(), 0);
    gpu.runnable.clear();
    for (int thread = 0; thread < gpu.num_threads; thread++) make_runnable(thread);
    while (!gpu.runnable.empty() && gpu.error.empty()) {
        std::swap(gpu.runnable[draw(gpu.runnable.size())], gpu.runnable.back());
        const int thread = gpu.runnable.back();
        gpu.runnable.pop_back();
        resume(thread);
    }
    for (int thread = 0; thread < gpu.num_threads && gpu.error.empty(); thread++)
        if (gpu.fibers[thread].state != State::returned) gpu.error = deadlock();
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
    gridDim = grid;
    blockDim = block;
    gpu.kernel = std::move(kernel);
    gpu.num_threads = block.x * block.y * block.z;
    if (gpu.num_threads < 1 || gpu.num_threads > 1024)
        throw std::runtime_error("a thread block has 1 to 1024 threads, not " +
                                 std::to_string(gpu.num_threads));
    if (grid.x < 1 || grid.x > INT_MAX || grid.y < 1 || grid.y > 65535 || grid.z < 1 ||
        grid.z > 65535)
        throw std::runtime_error("a grid has 1 to 2^31 - 1 thread blocks in x, and 1 to 65,535 in "
                                 "y and in z, not " + name(grid));
    gpu.error.clear();
    if (gpu.fibers.size() < size_t(gpu.num_threads)) gpu.fibers.resize(gpu.num_threads);
    gpu.shared_bytes = shared_bytes;
    gpu.shared.assign(shared_bytes / 8 + 2, 0);
    const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < count && gpu.error.empty(); i++) {
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        run_block();
    }
    gpu.kernel = nullptr;
    if (!gpu.error.empty()) {
        for (Fiber& fiber : gpu.fibers) fiber.started = false;  // abandoned where they were
        throw std::runtime_error(gpu.error);
    }
}

}  // namespace cpu

// Stands where a part of a kernel is still to be written, and ends the launch with these words.
[[noreturn]] inline void not_implemented(const char* what) { cpu::fail(what); }

#define __syncthreads() cpu::sync_threads(__FILE__, __LINE__)
#define __syncwarp(...) cpu::sync_warp(__FILE__, __LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(mask, value, source) \
    cpu::shuffle("__shfl_sync", __FILE__, __LINE__, mask, value, (source) & (cpu::WARP - 1))
#define __shfl_xor_sync(mask, value, distance) \
    cpu::shuffle("__shfl_xor_sync", __FILE__, __LINE__, mask, value, \
                 cpu::gpu.thread % cpu::WARP ^ (distance))
#define __shfl_down_sync(mask, value, distance) \
    cpu::shuffle("__shfl_down_sync", __FILE__, __LINE__, mask, value, \
                 cpu::gpu.thread % cpu::WARP + (distance))
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    cpu::launch(grid, block, shared_bytes, [&] { kernel(__VA_ARGS__); })

#include "checked_memory.h"

#endif
