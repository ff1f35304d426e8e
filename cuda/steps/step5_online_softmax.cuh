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

    // Over the rows that the warp read side by side: they are relative to the same maximum.
    weight_sum = sum_over_lanes(weight_sum, R::LANES, WARP_SIZE);
    for (A& value : weighted_values) value = sum_over_lanes(value, R::LANES, WARP_SIZE);
    // Over the warps, each of which has a maximum of its own.
    SharedMemory shared;
    Shared<A> maxima = shared.array<A>(STEP5_WARPS, "maxima");
    Shared<A> sums = shared.array<A>(STEP5_WARPS, "sums");
    Shared<A> outputs = shared.array<A>(STEP5_WARPS * HEAD_SIZE, "outputs");
    if (lane == 0) {
        maxima[warp] = largest;
        sums[warp] = weight_sum;
    }
    if (lane < R::LANES)
        for (int j = 0; j < R::PER_LANE; j++)
            for (int i = 0; i < R::CHUNK; i++)
                if (R::element(lane, j) < HEAD_SIZE)
                    outputs[warp * HEAD_SIZE + R::element(lane, j) + i] =
                        weighted_values[j * R::CHUNK + i];
    __syncthreads();
    for (int element = threadIdx.x; element < HEAD_SIZE; element += blockDim.x) {
        A overall = minus_infinity<A>(), total = 0, output = 0;
        for (int w = 0; w < STEP5_WARPS; w++) overall = larger(overall, A(maxima[w]));
        for (int w = 0; w < STEP5_WARPS; w++) {
            const A correction = rescale(A(maxima[w]), overall);
            total += sums[w] * correction;
            output += outputs[w * HEAD_SIZE + element] * correction;
        }
        a.output[a.output_offset(a.query_starts[seq], head) + element] = T(output / total);
    }
}
