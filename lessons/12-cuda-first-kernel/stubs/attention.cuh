// What every attention kernel is given, and how it finds a token's key: through the block table.
#pragma once

#include "numbers.cuh"

// T: type of queries and outputs; KV: type of the cache, T or float8_t.
template <typename T, typename KV = T>
struct Attention {
    using A = Accumulator<T>;

    Global<T> output;                   // [tokens, heads, head_size]
    Global<const T> query;              // [tokens, heads, head_size], rows query_stride apart
    Global<const KV> keys, values;      // [num_blocks, block_size, kv_heads, head_size]
    Global<const float> key_scales;     // [kv_heads], only for an 8-bit cache: its numbers are
    Global<const float> value_scales;   // to be multiplied with these
    Global<const int> block_tables;     // [seqs, max_blocks]: logical to physical blocks
    Global<const int> context_lengths;  // [seqs]: tokens in the cache, the new ones included
    Global<const int> query_starts;     // [seqs]: first row of each sequence in query
    Global<const int> query_lengths;    // [seqs]: new tokens of each, the last of its context
    int64_t query_stride;               // elements from one token's queries to the next
    int heads, kv_heads, head_size, block_size, max_blocks;
    int window;                         // tokens that a query sees, itself included
    A scale;                            // of the scores: 1 / sqrt(head_size)

    // Query heads that share a KV head.
    __device__ int group() const { return heads / kv_heads; }

    // First token that the last token of a sequence sees.
    __device__ int first_seen(int context) const { return context > window ? context - window : 0; }

    // Where the query of a token and the output for it begin.
    __device__ int64_t query_offset(int64_t row, int head) const {
        return row * query_stride + int64_t(head) * head_size;
    }
    __device__ int64_t output_offset(int64_t row, int head) const {
        return (row * heads + head) * head_size;
    }

    // Where the keys, and values, of a KV head begin in the physical block behind a logical one.
    // In 64 bits: a cache of 2^31 elements is no large one.
    __device__ int64_t block_offset(int seq, int logical, int kv_head) const {
        not_implemented("Task 12.3: block_offset is still to be written");
    }

    // The distance of two tokens of a block.
    __device__ int64_t token_stride() const { return int64_t(kv_heads) * head_size; }

    // The same for one token of a sequence.
    __device__ int64_t token_offset(int seq, int token, int kv_head) const {
        not_implemented("Task 12.3: token_offset is still to be written");
    }

    // By what the scores and the output are multiplied, of an 8-bit cache also the heads' scales.
    __device__ A score_scale(int kv_head) const {
        if constexpr (sizeof(KV) == 1) return scale * A(key_scales[kv_head]);
        return scale;
    }
    __device__ A output_scale(int kv_head) const {
        if constexpr (sizeof(KV) == 1) return A(value_scales[kv_head]);
        return A(1);
    }
};

// How the lanes of a warp share the rows of a cache, a row being a token's key of one KV head:
// each lane reads 16 bytes, neighbouring lanes neighbouring bytes, so that a row takes LANES
// lanes (a power of two, of which the last may have nothing to do) and a warp reads ROWS rows.
template <typename KV, int HEAD_SIZE>
struct Row {
    static constexpr int CHUNK = Chunk<KV>::SIZE;
    static constexpr int CHUNKS = HEAD_SIZE / CHUNK;
    static constexpr int LANES =
        CHUNKS > 16 ? 32 : CHUNKS > 8 ? 16 : CHUNKS > 4 ? 8 : CHUNKS > 2 ? 4 : CHUNKS;
    static constexpr int ROWS = WARP_SIZE / LANES;
    static constexpr int PER_LANE = (CHUNKS + LANES - 1) / LANES;  // chunks of a lane
    static constexpr int VALUES = PER_LANE * CHUNK;                // and their elements
    static_assert(HEAD_SIZE % CHUNK == 0, "a row is a whole number of chunks");

    // First element of a lane's j-th chunk within the row; past the row for an idle lane.
    static __device__ __forceinline__ int element(int lane, int j) {
        return (lane % LANES + j * LANES) * CHUNK;
    }
};
