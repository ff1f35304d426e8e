// Launches the kernels: from types and sizes known at run time to the instances of the templates.
//
// Compiled by nvcc for the GPU and, unchanged, by g++ or clang++ for cuda_on_cpu.h.
#include <climits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "arguments.h"
#include "cache_operations.cuh"
#include "paged_attention_v1.cuh"
#include "paged_attention_v2.cuh"
#include "prompt_attention.cuh"
#include "prompt_tensor_cores.cuh"
#include "steps/step1_naive.cuh"
#include "steps/step2_shared_scores.cuh"
#include "steps/step3_coalesced.cuh"
#include "steps/step4_warp_per_block.cuh"
#include "steps/step5_online_softmax.cuh"

// What is compiled; a build for one model names its head size and type alone, and a test of one
// kernel that kernel.
#ifndef VERSIONS
#define VERSIONS step1, step2, step3, step4, step5, v1, v2, prompt, tensor_cores
#endif
#ifndef HEAD_SIZES
#define HEAD_SIZES 16, 32, 64, 80, 96, 128, 256
#endif
#ifndef NUMBER_TYPES
#define NUMBER_TYPES float, half_t, bfloat16_t
#endif
#ifndef FLOAT8_CACHE
#define FLOAT8_CACHE 1
#endif

#define TEXT_OF(...) #__VA_ARGS__
#define AS_TEXT(...) TEXT_OF(__VA_ARGS__)

namespace {

// Whether a version is among those that are compiled; no name of one is part of another's.
constexpr bool is_compiled(std::string_view version) {
    return std::string_view(AS_TEXT(VERSIONS)).find(version) != std::string_view::npos;
}

template <typename T>
Global<T> as(const Array& array, const char* name) {
    return global_array<T>(array.data, array.size, name);
}

// A GPU gives a thread block more than 48 KiB of shared memory only if it is told before.
template <typename Kernel>
void allow_shared_memory(Kernel* kernel, size_t bytes) {
#ifdef __CUDACC__
    if (bytes <= 48 * 1024) return;
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (bytes > size_t(most))
        throw std::runtime_error("this kernel needs " + std::to_string(bytes) +
                                 " bytes of shared memory per thread block and the GPU has " +
                                 std::to_string(most) + "; use v1, v2 or a smaller context");
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
#else
    (void)kernel, (void)bytes;
#endif
}

void check_launch() {
#ifdef __CUDACC__
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("the kernel could not be launched: ") +
                                 cudaGetErrorString(error));
#endif
}

template <typename T, typename KV>
Attention<T, KV> attention_of(const AttentionArguments& x) {
    Attention<T, KV> a;
    a.output = as<T>(x.output, "output");
    a.query = as<const T>(x.query, "query");
    a.keys = as<const KV>(x.keys, "keys");
    a.values = as<const KV>(x.values, "values");
    a.key_scales = as<const float>(x.key_scales, "key_scales");
    a.value_scales = as<const float>(x.value_scales, "value_scales");
    a.block_tables = as<const int>(x.block_tables, "block_tables");
    a.context_lengths = as<const int>(x.context_lengths, "context_lengths");
    a.query_starts = as<const int>(x.query_starts, "query_starts");
    a.query_lengths = as<const int>(x.query_lengths, "query_lengths");
    a.query_stride = x.query_stride;
    a.heads = x.heads;
    a.kv_heads = x.kv_heads;
    a.head_size = x.head_size;
    a.block_size = x.block_size;
    a.max_blocks = x.max_blocks;
    a.window = x.window > 0 ? x.window : INT_MAX;
    a.scale = Accumulator<T>(x.scale);
    return a;
}

#define LAUNCH_WITH(kernel, grid, threads, bytes)          \
    do {                                                   \
        allow_shared_memory(&kernel, bytes);               \
        LAUNCH((kernel), grid, threads, bytes, x.stream, a); \
    } while (0)

template <typename T, typename KV, int HEAD_SIZE, int GROUP>
void run_v1(const AttentionArguments& x) {
    const Attention<T, KV> a = attention_of<T, KV>(x);
    const int group = x.heads / x.kv_heads, parts = (group + GROUP - 1) / GROUP;
    auto kernel = paged_attention_v1<T, KV, HEAD_SIZE, GROUP>;
    LAUNCH_WITH(*kernel, dim3(x.kv_heads * parts, x.num_seqs), WARP_SIZE * DECODE_WARPS,
                (WarpPartials<Accumulator<T>, HEAD_SIZE, GROUP>::bytes()));
}

template <typename T, typename KV, int HEAD_SIZE, int GROUP>
void run_v2(const AttentionArguments& x) {
    using A = Accumulator<T>;
    const Attention<T, KV> a = attention_of<T, KV>(x);
    const int group = x.heads / x.kv_heads, parts = (group + GROUP - 1) / GROUP;
    const size_t bytes = WarpPartials<A, HEAD_SIZE, GROUP>::bytes();
    const int64_t places = int64_t(x.num_seqs) * x.heads * x.splits;
    if (x.workspace.size < places * (HEAD_SIZE + 2))
        throw std::runtime_error("the workspace is too small");
    A* const begin = static_cast<A*>(x.workspace.data);
    const Workspace<A> workspace{
        global_array<A>(begin, places * HEAD_SIZE, "workspace.weighted_values"),
        global_array<A>(begin + places * HEAD_SIZE, places, "workspace.largest"),
        global_array<A>(begin + places * (HEAD_SIZE + 1), places, "workspace.weight_sum"),
        x.splits};
    auto kernel = paged_attention_v2<T, KV, HEAD_SIZE, GROUP>;
    allow_shared_memory(kernel, bytes);
    LAUNCH(kernel, dim3(x.kv_heads * parts, x.num_seqs, x.splits), WARP_SIZE * DECODE_WARPS, bytes,
           x.stream, a, workspace);
    LAUNCH((add_up_splits<T, KV, HEAD_SIZE>), dim3(x.heads, x.num_seqs), 128, 0, x.stream, a,
           workspace);
}

template <typename T, typename KV, int HEAD_SIZE, int GROUP>
void run_decode(const AttentionArguments& x) {
    if constexpr (is_compiled("v1"))
        if (x.version == "v1") run_v1<T, KV, HEAD_SIZE, GROUP>(x);
    if constexpr (is_compiled("v2"))
        if (x.version == "v2") run_v2<T, KV, HEAD_SIZE, GROUP>(x);
}

template <typename T, int HEAD_SIZE>
void run_step(const AttentionArguments& x) {
    using A = Accumulator<T>;
    const Attention<T> a = attention_of<T, T>(x);
    const dim3 grid(x.heads, x.num_seqs);
    if constexpr (is_compiled("step1"))
        if (x.version == "step1") LAUNCH_WITH(step1_naive<T>, grid, x.head_size, 0);
    if constexpr (is_compiled("step2"))
        if (x.version == "step2")
            LAUNCH_WITH(step2_shared_scores<T>, grid, STEP2_THREADS,
                        step2_shared_bytes<A>(x.max_context));
    if constexpr (is_compiled("step3")) {
        auto step3 = step3_coalesced<T, HEAD_SIZE>;
        if (x.version == "step3")
            LAUNCH_WITH(*step3, grid, STEP3_THREADS, step3_shared_bytes<A>(x.max_context));
    }
    if constexpr (is_compiled("step4")) {
        auto step4 = step4_warp_per_block<T, HEAD_SIZE>;
        if (x.version == "step4")
            LAUNCH_WITH(*step4, grid, WARP_SIZE * STEP4_WARPS,
                        step4_shared_bytes<A>(x.max_context, x.head_size));
    }
    if constexpr (is_compiled("step5")) {
        auto step5 = step5_online_softmax<T, HEAD_SIZE>;
        if (x.version == "step5")
            LAUNCH_WITH(*step5, grid, WARP_SIZE * STEP5_WARPS, step5_shared_bytes<A>(x.head_size));
    }
}

template <typename T, typename KV, int HEAD_SIZE>
void run_prompt(const AttentionArguments& x) {
    const Attention<T, KV> a = attention_of<T, KV>(x);
    constexpr int rows = PromptTile<KV, HEAD_SIZE>::ROWS;
    const int tiles = (x.max_queries * (x.heads / x.kv_heads) + rows - 1) / rows;
    auto kernel = prompt_attention<T, KV, HEAD_SIZE>;
    LAUNCH_WITH(*kernel, dim3(tiles, x.kv_heads, x.num_seqs), PROMPT_THREADS,
                (prompt_shared_bytes<T, KV, HEAD_SIZE>()));
}

template <typename T, typename KV, int HEAD_SIZE>
void run_tensor_cores(const AttentionArguments& x) {
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, KV> && HEAD_SIZE % 16 == 0) {
        const Attention<T, T> a = attention_of<T, T>(x);
        const int rows = x.max_queries * (x.heads / x.kv_heads);
        auto kernel = prompt_tensor_cores<T, HEAD_SIZE>;
        LAUNCH_WITH(*kernel, dim3((rows + TENSOR_ROWS - 1) / TENSOR_ROWS, x.kv_heads, x.num_seqs),
                    TENSOR_THREADS, (tensor_shared_bytes<T, HEAD_SIZE>()));
    } else {
        throw std::runtime_error(
            "tensor cores need 16-bit queries and cache, and heads of a multiple of 16");
    }
}

template <typename T, typename KV, int HEAD_SIZE>
void run_version(const AttentionArguments& x) {
    const std::string& version = x.version;
    if (!is_compiled(version)) throw std::runtime_error("the kernel " + version + " was not compiled");
    if (version == "prompt") {
        if constexpr (is_compiled("prompt")) run_prompt<T, KV, HEAD_SIZE>(x);
    } else if (version == "tensor_cores") {
        if constexpr (is_compiled("tensor_cores")) run_tensor_cores<T, KV, HEAD_SIZE>(x);
    } else if (version == "v1" || version == "v2") {
        if (x.group >= 8)
            run_decode<T, KV, HEAD_SIZE, 8>(x);
        else if (x.group >= 4)
            run_decode<T, KV, HEAD_SIZE, 4>(x);
        else
            run_decode<T, KV, HEAD_SIZE, 1>(x);
    } else if constexpr (sizeof(T) == sizeof(KV)) {
        run_step<T, HEAD_SIZE>(x);
    } else {
        throw std::runtime_error("an 8-bit cache is read by v1, v2 and prompt, not by " + version);
    }
}

template <typename T>
constexpr Type type_of() {
    if (std::is_same_v<T, half_t>) return Type::float16;
    if (std::is_same_v<T, bfloat16_t>) return Type::bfloat16;
    if (std::is_same_v<T, float8_t>) return Type::float8;
    return std::is_same_v<T, double> ? Type::float64 : Type::float32;
}

// Runs the instance for this head size, if it was compiled.
template <typename T, typename KV, int... SIZES>
bool with_head_size(const AttentionArguments& x, std::integer_sequence<int, SIZES...>) {
    return ((x.head_size == SIZES && (run_version<T, KV, SIZES>(x), true)) || ...);
}

template <typename T>
bool attend(const AttentionArguments& x) {
    using Sizes = std::integer_sequence<int, HEAD_SIZES>;
    if (x.type != type_of<T>()) return false;
    if (x.cache_type == x.type) return with_head_size<T, T>(x, Sizes());
    if constexpr (sizeof(T) == 2 && FLOAT8_CACHE)
        if (x.cache_type == Type::float8) return with_head_size<T, float8_t>(x, Sizes());
    return false;
}

template <typename... TYPES>
bool attend_with_any(const AttentionArguments& x) {
    return (attend<TYPES>(x) || ...);
}

template <typename T, typename KV>
void launch_write(const WriteArguments& x) {
    LAUNCH((reshape_and_cache<T, KV>), x.num_tokens, 128, 0, x.stream, as<const T>(x.key, "key"),
           as<const T>(x.value, "value"), as<KV>(x.keys, "keys"), as<KV>(x.values, "values"),
           as<const int64_t>(x.slots, "slots"), as<const float>(x.key_scales, "key_scales"),
           as<const float>(x.value_scales, "value_scales"), x.key_stride, x.value_stride,
           x.kv_heads, x.head_size);
}

template <typename T>
bool write(const WriteArguments& x) {
    if (x.type != type_of<T>()) return false;
    if (x.cache_type == x.type) return launch_write<T, T>(x), true;
    if constexpr (sizeof(T) == 2)
        if (x.cache_type == Type::float8) return launch_write<T, float8_t>(x), true;
    return false;
}

template <typename... TYPES>
bool write_any(const WriteArguments& x) {
    return (write<TYPES>(x) || ...);
}

}  // namespace

void run_attention(const AttentionArguments& x) {
    if (!attend_with_any<NUMBER_TYPES>(x))
        throw std::runtime_error("no kernel was compiled for heads of " +
                                 std::to_string(x.head_size) + " elements of this type");
    check_launch();
}

void run_write(const WriteArguments& x) {
    if (!write_any<NUMBER_TYPES>(x))
        throw std::runtime_error("no kernel was compiled to write this type to this cache");
    check_launch();
}

void run_copy(const CopyArguments& x) {
    LAUNCH(copy_blocks, dim3(x.num_pairs, x.num_planes), 128, 0, x.stream,
           as<const Chunk<float>>(x.source, "source"), as<Chunk<float>>(x.target, "target"),
           as<const int64_t>(x.pairs, "pairs"), PoolLayout{x.source_plane, x.source_block},
           PoolLayout{x.target_plane, x.target_block}, x.chunks);
    check_launch();
}

void seed_emulator(uint64_t seed) {
#ifdef __CUDACC__
    (void)seed;
#else
    cpu::seed(seed);
#endif
}
