// What else happens to the cache: new keys and values are written, blocks are copied and swapped.
#pragma once

#include "numbers.cuh"

// Stores the keys and values of a step's tokens in their slots, for one layer (section 5.1).
// A slot is a physical block times the block size plus the offset in the block; below 0 it is that
// of a row which only fills up a batch, and has nothing to store.
//
// Grid: (tokens).  Threads: any number.
template <typename T, typename KV>
__global__ void reshape_and_cache(Global<const T> key, Global<const T> value, Global<KV> keys,
                                  Global<KV> values, Global<const int64_t> slots,
                                  Global<const float> key_scales, Global<const float> value_scales,
                                  int64_t key_stride, int64_t value_stride, int kv_heads,
                                  int head_size) {
    const int token = blockIdx.x, width = kv_heads * head_size;
    not_implemented("Task 12.1: reshape_and_cache is still to be written");
}

// How the blocks of a pool lie in memory, in chunks of 16 bytes.  A plane is the keys, or the
// values, of one layer; a block has a piece in every plane.
struct PoolLayout {
    int64_t plane_stride, block_stride;
};

// Copies blocks from one pool to another, or within one, in all layers, in one launch.
//
// Within the device's pool it does the copy-on-writes of a step; between that and the pool in the
// host's pinned memory, which the GPU reads and writes over the bus, it swaps.  The blocks that
// are written must not be among those that are read.
//
// Grid: (pairs, planes).  Threads: any number.
__global__ void copy_blocks(Global<const Chunk<float>> source, Global<Chunk<float>> target,
                            Global<const int64_t> pairs, PoolLayout from, PoolLayout to,
                            int64_t chunks) {
    not_implemented("Task 12.2: copy_blocks is still to be written");
}
