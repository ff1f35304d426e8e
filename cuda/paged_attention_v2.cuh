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
    const int share = (num_blocks + workspace.splits - 1) / workspace.splits;
    const int begin = task.first_block + split * share;
    const int end = begin + share < task.end_block ? begin + share : task.end_block;

    PartialAttention<A, Row<KV, HEAD_SIZE>, GROUP> partial;
    partial.clear();  // and so it stays in a part of no blocks: its sum is 0
    attend_to_blocks<T, KV, HEAD_SIZE, GROUP>(a, task, begin, end, partial);
    SharedMemory shared;
    WarpPartials<A, HEAD_SIZE, GROUP> warps(shared);
    warps.store(partial);
    for (int i = threadIdx.x; i < GROUP * HEAD_SIZE; i += blockDim.x) {
        const int g = i / HEAD_SIZE, element = i % HEAD_SIZE, head = task.first_head + g;
        if (head >= task.end_head) break;
        const int64_t place = (int64_t(task.seq) * a.heads + head) * workspace.splits + split;
        A overall, total;
        warps.totals(g, overall, total);
        workspace.weighted_values[place * HEAD_SIZE + element] = warps.element(g, element, overall);
        if (element == 0) {
            workspace.largest[place] = overall;
            workspace.weight_sum[place] = total;
        }
    }
}

// Grid: (heads, seqs).  Threads: 128.  No shared memory.
template <typename T, typename KV, int HEAD_SIZE>
__global__ void add_up_splits(Attention<T, KV> a, Workspace<Accumulator<T>> workspace) {
    using A = Accumulator<T>;
    const int head = blockIdx.x, seq = blockIdx.y;
    const int64_t first = (int64_t(seq) * a.heads + head) * workspace.splits;
    A overall = minus_infinity<A>(), total = 0;
    for (int split = 0; split < workspace.splits; split++)
        overall = larger(overall, workspace.largest[first + split]);
    for (int split = 0; split < workspace.splits; split++)
        total += workspace.weight_sum[first + split] *
                 rescale(workspace.largest[first + split], overall);
    for (int element = threadIdx.x; element < HEAD_SIZE; element += blockDim.x) {
        A sum = 0;
        for (int split = 0; split < workspace.splits; split++)
            sum += workspace.weighted_values[(first + split) * HEAD_SIZE + element] *
                   rescale(workspace.largest[first + split], overall);
        a.output[a.output_offset(a.query_starts[seq], head) + element] =
            T(sum / total * a.output_scale(head / a.group()));
    }
}
