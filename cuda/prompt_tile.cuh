// What the two kernels for prompts share: a tile of rows, and a tile of keys or values.
#pragma once

#include "attention.cuh"

// The rows of a thread block: ROWS query heads of new tokens of a sequence, all of one KV head.
// Row r of them is head r % group of token r / group, both counted from the sequence's first; so
// the heads that share a key are neighbours.  Grid: (tiles of the longest sequence, KV heads, seqs).
template <typename T, typename KV, int ROWS>
struct QueryTile {
    const Attention<T, KV>& a;
    const int kv_head = blockIdx.y, seq = blockIdx.z, first_row = blockIdx.x * ROWS;
    const int num_rows;  // of the sequence
    const int computed;  // tokens of the sequence before the new ones

    __device__ explicit QueryTile(const Attention<T, KV>& a)
        : a(a),
          num_rows(a.query_lengths[blockIdx.z] * a.group()),
          computed(a.context_lengths[blockIdx.z] - a.query_lengths[blockIdx.z]) {}

    // Below, a row is counted from the first of the tile.
    __device__ int size() const {
        return num_rows - first_row < ROWS ? num_rows - first_row : ROWS;
    }
    __device__ int position(int row) const { return computed + (first_row + row) / a.group(); }
    __device__ int head(int row) const {
        return kv_head * a.group() + (first_row + row) % a.group();
    }
    __device__ int token(int row) const {
        return a.query_starts[seq] + (first_row + row) / a.group();
    }

    // The tokens that some row of the tile sees: from begin up to before end.
    __device__ int begin() const { return a.first_seen(position(0) + 1); }
    __device__ int end() const { return position(size() - 1) + 1; }
};

// Copies the keys (or values) of the tokens begin .. begin + KEYS - 1 to rows of shared memory
// that are STRIDE apart; those from `end` on are never read, and are 0.
template <int KEYS, int STRIDE, int HEAD_SIZE, typename T, typename KV>
__device__ void load_tile(const Attention<T, KV>& a, Global<const KV> array, int seq, int kv_head,
                          int begin, int end, Shared<KV> tile) {
    constexpr int CHUNK = Chunk<KV>::SIZE, CHUNKS = HEAD_SIZE / CHUNK;
    for (int i = threadIdx.x; i < KEYS * CHUNKS; i += blockDim.x) {
        const int key = i / CHUNKS, token = begin + key, element = i % CHUNKS * CHUNK;
        Chunk<KV> chunk = zero_chunk<KV>();
        if (token < end)
            chunk = load_chunk(array, a.token_offset(seq, token, kv_head) + element);
        for (int j = 0; j < CHUNK; j++) tile[key * STRIDE + element + j] = chunk.values[j];
    }
}
