// Step 5: one pass, and no limit to the context.
//
// The softmax is computed as the keys come (Milakov and Gimelshein 2018): each warp keeps the
// largest score so far, and what it has summed relative to it.  When a larger one comes, the
// sums are scaled down.  No score is ever stored, so shared memory no longer limits the context,
// and a block's keys and values are read one right after the other.
#pragma once

#include "step3_coalesced.cuh"

constexpr int STEP5_WARPS = 4;

template <typename A>
size_t step5_shared_bytes(int head_size) {
    return STEP5_WARPS * (head_size + 2) * sizeof(A) + 96;
}

// Grid: (heads, seqs).  Threads: 32 * STEP5_WARPS.
template <typename T, int HEAD_SIZE>
__global__ void step5_online_softmax(Attention<T> a) {
    using A = Accumulator<T>;
    using R = Row<T, HEAD_SIZE>;
    const int head = blockIdx.x, seq = blockIdx.y;
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int kv_head = head / a.group();
    const int context = a.context_lengths[seq], first = a.first_seen(context);
    const int end_block = (context + a.block_size - 1) / a.block_size;

    A query[R::VALUES];
    load_query<T, HEAD_SIZE>(a, seq, head, lane, query);
    A largest = minus_infinity<A>(), weight_sum = 0, weighted_values[R::VALUES] = {};
    for (int logical = first / a.block_size + warp; logical < end_block; logical += STEP5_WARPS) {
        const int64_t block = a.block_offset(seq, logical, kv_head);
        for (int base = 0; base < a.block_size; base += R::ROWS) {
            const int offset = base + lane / R::LANES, token = logical * a.block_size + offset;
            const bool seen = offset < a.block_size && token >= first && token < context;
            const int64_t row = block + offset * a.token_stride();
            const A score = shared_score<T, HEAD_SIZE>(a, row, seen, lane, query);

            const A best = seen ? score : minus_infinity<A>();
            const A now = larger(largest, largest_of_lanes(best, R::LANES, WARP_SIZE));
            const A correction = rescale(largest, now);
            const A weight = seen ? exponential(score - now) : A(0);
            largest = now;
            weight_sum = weight_sum * correction + weight;
            for (int j = 0; j < R::PER_LANE; j++) {
                Chunk<T> value = zero_chunk<T>();
                if (seen && R::element(lane, j) < HEAD_SIZE)
                    value = load_chunk(a.values, row + R::element(lane, j));
                for (int i = 0; i < R::CHUNK; i++) {
                    A& sum = weighted_values[j * R::CHUNK + i];
                    sum = sum * correction + weight * A(value.values[i]);
                }
            }
        }
    }

    not_implemented("Task 13.4: step5_online_softmax is still to be written");
}
