// paged_attention_v1: a thread block for each sequence and GROUP query heads of a KV head.
//
// With GROUP = 1 it is a thread block for each sequence and query head, as in the paper.
#pragma once

#include "decode.cuh"

// Grid: (KV heads x parts of their groups, seqs).  Threads: 32 * DECODE_WARPS.
template <typename T, typename KV, int HEAD_SIZE, int GROUP>
__global__ void __launch_bounds__(WARP_SIZE* DECODE_WARPS) paged_attention_v1(Attention<T, KV> a) {
    using A = Accumulator<T>;
    const DecodeTask<GROUP> task(a);
    PartialAttention<A, Row<KV, HEAD_SIZE>, GROUP> partial;
    partial.clear();
    attend_to_blocks<T, KV, HEAD_SIZE, GROUP>(a, task, task.first_block, task.end_block, partial);
    SharedMemory shared;
    WarpPartials<A, HEAD_SIZE, GROUP> warps(shared);
    warps.store(partial);
    for (int i = threadIdx.x; i < GROUP * HEAD_SIZE; i += blockDim.x) {
        const int g = i / HEAD_SIZE, element = i % HEAD_SIZE, head = task.first_head + g;
        if (head >= task.end_head) break;
        A overall, total;
        warps.totals(g, overall, total);
        a.output[a.output_offset(a.query_starts[task.seq], head) + element] =
            T(warps.element(g, element, overall) / total * a.output_scale(task.kv_head));
    }
}
