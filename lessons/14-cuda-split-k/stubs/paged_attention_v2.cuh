// paged_attention_v2: the context of a sequence split over several thread blocks.
//
// v1 gives a sequence's KV head to one thread block.  With few sequences and long contexts most
// of a GPU then has nothing to do.  Here each thread block attends to one part of the blocks and
// leaves its sums in a workspace; a second kernel adds up the parts, as v1 adds up its warps
// (split-K; flash-decoding, Dao et al. 2023).
#pragma once

#include "decode.cuh"

// What the parts leave behind, for every sequence, query head and part.
template <typename A>
struct Workspace {
    Global<A> weighted_values;  // [seqs, heads, splits, head_size], relative to
    Global<A> largest;          // [seqs, heads, splits]
    Global<A> weight_sum;       // [seqs, heads, splits]
    int splits;
};

// Grid: (KV heads x parts of their groups, seqs, splits).  Threads: 32 * DECODE_WARPS.
template <typename T, typename KV, int HEAD_SIZE, int GROUP>
__global__ void __launch_bounds__(WARP_SIZE* DECODE_WARPS)
    paged_attention_v2(Attention<T, KV> a, Workspace<Accumulator<T>> workspace) {
    using A = Accumulator<T>;
    const DecodeTask<GROUP> task(a);
    const int split = blockIdx.z, num_blocks = task.end_block - task.first_block;
    not_implemented("Task 14.2: paged_attention_v2 is still to be written");
}

// Grid: (heads, seqs).  Threads: 128.  No shared memory.
template <typename T, typename KV, int HEAD_SIZE>
__global__ void add_up_splits(Attention<T, KV> a, Workspace<Accumulator<T>> workspace) {
    using A = Accumulator<T>;
    const int head = blockIdx.x, seq = blockIdx.y;
    const int64_t first = (int64_t(seq) * a.heads + head) * workspace.splits;
    not_implemented("Task 14.3: add_up_splits is still to be written");
}
