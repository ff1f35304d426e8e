// The number types of the kernels: names, conversions, and loads of 16 bytes at a time.
//
// Values are stored as T (float, half, bfloat16; double on the CPU only) and computed with as
// Accumulator<T>: float, or double for double, so that the oracle can be compared exactly.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda_on_cpu.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
using half_t = __half;
using bfloat16_t = __nv_bfloat16;
using float8_t = __nv_fp8_e4m3;
#else
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>
using half_t = c10::Half;
using bfloat16_t = c10::BFloat16;
using float8_t = c10::Float8_e4m3fn;
#endif

template <typename T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ float exponential(float x) {
#ifdef __CUDACC__
    return __expf(x);  // two instructions; its error is far below that of the inputs
#else
    return std::exp(x);
#endif
}
__device__ __forceinline__ double exponential(double x) { return exp(x); }

template <typename A>
__device__ __forceinline__ A larger(A a, A b) {
    return a > b ? a : b;
}

// Smaller than every score: the maximum of no scores.
template <typename A>
__device__ __forceinline__ A minus_infinity() {
    return -static_cast<A>(INFINITY);
}

// How much what was summed relative to the maximum `before` counts relative to `now`.
template <typename A>
__device__ __forceinline__ A rescale(A before, A now) {
    return before == minus_infinity<A>() ? A(0) : exponential(before - now);
}

constexpr unsigned ALL_LANES = 0xFFFFFFFF;
constexpr int WARP_SIZE = 32;

// Sum, and largest, of the values of lanes that differ only in the bits from `low` up to below
// `high` (powers of two) of their number; all of these lanes get it.  For the whole warp: 1, 32.
template <typename A>
__device__ __forceinline__ A sum_over_lanes(A value, int low, int high) {
    not_implemented("Task 13.2: sum_over_lanes is still to be written");
}

template <typename A>
__device__ __forceinline__ A largest_of_lanes(A value, int low, int high) {
    not_implemented("Task 13.2: largest_of_lanes is still to be written");
}

// 16 bytes, the most that a thread moves with one instruction; but at most 8 numbers, for each
// of them needs registers once it is converted: so 8 bytes of an 8-bit cache.
template <typename T>
struct alignas(sizeof(T) == 1 ? 8 : 16) Chunk {
    static constexpr int SIZE = sizeof(T) == 1 ? 8 : 16 / sizeof(T);
    T values[SIZE];
};

template <typename T>
__device__ __forceinline__ Chunk<T> zero_chunk() {
    Chunk<T> chunk;
#pragma unroll
    for (int i = 0; i < Chunk<T>::SIZE; i++) chunk.values[i] = T(0.0f);
    return chunk;
}

// The chunk from element `index` on; its address must be a multiple of its size.
template <typename T>
__device__ __forceinline__ Chunk<T> load_chunk(Global<const T> array, int64_t index) {
#ifdef __CUDACC__
    // Through the read-only path: nobody writes these arrays while the kernel runs.
    using Bits = std::conditional_t<sizeof(Chunk<T>) == 16, uint4, uint2>;
    const Bits bits = __ldg(reinterpret_cast<const Bits*>(array + index));
    return *reinterpret_cast<const Chunk<T>*>(&bits);
#else
    return *cpu::aligned<const Chunk<T>>(array, index, Chunk<T>::SIZE);
#endif
}

template <typename T>
__device__ __forceinline__ void store_chunk(Global<T> array, int64_t index, const Chunk<T>& chunk) {
#ifdef __CUDACC__
    *reinterpret_cast<Chunk<T>*>(array + index) = chunk;
#else
    *cpu::aligned<Chunk<T>>(array, index, Chunk<T>::SIZE) = chunk;
#endif
}
