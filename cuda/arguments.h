// What the launchers in paged_attention.cu are called with: plain numbers and addresses, so that
// they can be compiled without torch, and whoever calls them without CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// Elements in the memory of the device; the size is for checks on the CPU.
struct Array {
    void* data = nullptr;
    int64_t size = 0;
};

enum class Type { float32, float16, bfloat16, float8, float64 };

// See Attention in attention.cuh for the shapes.
struct AttentionArguments {
    std::string version;  // "step1" .. "step5", "v1", "v2", "prompt", "tensor_cores"
    Type type, cache_type;
    Array output, query, keys, values, key_scales, value_scales;
    Array block_tables, context_lengths, query_starts, query_lengths;
    Array workspace;  // for v2: [seqs * heads * splits * (head_size + 2)] float32 (or float64)
    int64_t query_stride;
    int num_seqs, max_queries, max_context, heads, kv_heads, head_size, block_size, max_blocks;
    int window, splits, group;  // group: query heads computed together, by v1 and v2
    double scale;
    uintptr_t stream;  // of CUDA; 0 is the default one
};

struct WriteArguments {
    Type type, cache_type;
    Array key, value, keys, values, slots, key_scales, value_scales;
    int64_t key_stride, value_stride;
    int num_tokens, kv_heads, head_size;
    uintptr_t stream;  // of CUDA; 0 is the default one
};

// Sizes and strides in chunks of 16 bytes.
struct CopyArguments {
    Array source, target, pairs;
    int64_t source_plane, source_block, target_plane, target_block, chunks;
    int num_pairs, num_planes;
    uintptr_t stream;  // of CUDA; 0 is the default one
};

// Each returns without waiting for the GPU; throws std::runtime_error with what to do otherwise.
void run_attention(const AttentionArguments& arguments);
void run_write(const WriteArguments& arguments);
void run_copy(const CopyArguments& arguments);
void seed_emulator(uint64_t seed);  // does nothing on a GPU
