// paged_attention_v1: a thread block for each sequence and GROUP query heads of a KV head.
//
// With GROUP = 1 it is a thread block for each sequence and query head, as in the paper.
#pragma once

#include "decode.cuh"

// Grid: (KV heads x parts of their groups, seqs).  Threads: 32 * DECODE_WARPS.
template <typename T, typename KV, int HEAD_SIZE, int GROUP>
__global__ void __launch_bounds__(WARP_SIZE* DECODE_WARPS) paged_attention_v1(Attention<T, KV> a) {
    using A = Accumulator<T>;
    const int parts = (a.group() + GROUP - 1) / GROUP;
    const int kv_head = blockIdx.x / parts, seq = blockIdx.y;
    const int first_head = kv_head * a.group() + blockIdx.x % parts * GROUP;
    const int context = a.context_lengths[seq];
    const int first_block = a.first_seen(context) / a.block_size;
    const int end_block = (context + a.block_size - 1) / a.block_size;

    PartialAttention<A, Row<KV, HEAD_SIZE>, GROUP> partial;
    partial.clear();
    attend_to_blocks<T, KV, HEAD_SIZE, GROUP>(a, seq, kv_head, first_head, first_block, end_block,
                                              partial);
    SharedMemory shared;
    WarpPartials<A, HEAD_SIZE, GROUP> warps(shared);
    warps.store(partial);
    for (int i = threadIdx.x; i < GROUP * HEAD_SIZE; i += blockDim.x) {
        const int g = i / HEAD_SIZE, element = i % HEAD_SIZE, head = first_head + g;
        if (head >= (kv_head + 1) * a.group()) break;
        A overall, total;
        warps.totals(g, overall, total);
        a.output[a.output_offset(a.query_starts[seq], head) + element] =
            T(warps.element(g, element, overall) / total * a.output_scale(kv_head));
    }
}
