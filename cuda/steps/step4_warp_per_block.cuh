// Step 4: a warp takes a whole KV block.
//
// The table is looked up once per block instead of once per token, all addresses within the
// block follow by addition, and the values are read like the keys, 16 bytes a lane.  Each lane
// adds up its elements of the values that its warp has seen, and at the end the warps add up
// what they have in shared memory, one after the other.
#pragma once

#include "step3_coalesced.cuh"

constexpr int STEP4_WARPS = 4;

template <typename A>
size_t step4_shared_bytes(int longest_context, int head_size) {
    return (STEP4_WARPS + longest_context + head_size) * sizeof(A) + 96;
}

// Grid: (heads, seqs).  Threads: 32 * STEP4_WARPS.
template <typename T, int HEAD_SIZE>
__global__ void step4_warp_per_block(Attention<T> a) {
    using A = Accumulator<T>;
    using R = Row<T, HEAD_SIZE>;
    const int head = blockIdx.x, seq = blockIdx.y;
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int kv_head = head / a.group();
    const int context = a.context_lengths[seq], first = a.first_seen(context);
    const int first_block = first / a.block_size;
    const int end_block = (context + a.block_size - 1) / a.block_size;
    SharedMemory shared;
    Shared<A> scratch = shared.array<A>(STEP4_WARPS, "scratch");
    Shared<A> weights = shared.array<A>(context - first, "weights");
    Shared<A> output = shared.array<A>(HEAD_SIZE, "output");

    A query[R::VALUES];
    load_query<T, HEAD_SIZE>(a, seq, head, lane, query);
    A largest = minus_infinity<A>();
    for (int logical = first_block + warp; logical < end_block; logical += STEP4_WARPS) {
        const int64_t block = a.block_offset(seq, logical, kv_head);
        for (int base = 0; base < a.block_size; base += R::ROWS) {
            const int offset = base + lane / R::LANES, token = logical * a.block_size + offset;
            const bool seen = offset < a.block_size && token >= first && token < context;
            const int64_t key = block + offset * a.token_stride();
            const A score = shared_score<T, HEAD_SIZE>(a, key, seen, lane, query);
            if (seen && lane % R::LANES == 0) weights[token - first] = score;
            if (seen) largest = larger(largest, score);
        }
    }
    largest = largest_of_block(scratch, largest);

    A weight_sum = 0;
    for (int token = first + threadIdx.x; token < context; token += blockDim.x) {
        const A weight = exponential(A(weights[token - first]) - largest);
        weights[token - first] = weight;
        weight_sum += weight;
    }
    weight_sum = sum_over_block(scratch, weight_sum);

    A weighted_values[R::VALUES] = {};
    for (int logical = first_block + warp; logical < end_block; logical += STEP4_WARPS) {
        const int64_t block = a.block_offset(seq, logical, kv_head);
        for (int offset = lane / R::LANES; offset < a.block_size; offset += R::ROWS) {
            const int token = logical * a.block_size + offset;
            if (token < first || token >= context) continue;
            const A weight = weights[token - first];
            for (int j = 0; j < R::PER_LANE; j++) {
                if (R::element(lane, j) >= HEAD_SIZE) continue;
                const int64_t value = block + offset * a.token_stride() + R::element(lane, j);
                const Chunk<T> chunk = load_chunk(a.values, value);
                for (int i = 0; i < R::CHUNK; i++)
                    weighted_values[j * R::CHUNK + i] += weight * A(chunk.values[i]);
            }
        }
    }
    // Over the rows that the warp read side by side, then over the warps.
    for (A& value : weighted_values) value = sum_over_lanes(value, R::LANES, WARP_SIZE);
    for (int turn = 0; turn < STEP4_WARPS; turn++) {
        if (warp == turn && lane < R::LANES)
            for (int j = 0; j < R::PER_LANE; j++)
                for (int i = 0; i < R::CHUNK; i++) {
                    const int element = R::element(lane, j) + i;
                    const A value = weighted_values[j * R::CHUNK + i];
                    if (element >= HEAD_SIZE) continue;
                    output[element] = turn == 0 ? value : A(output[element]) + value;
                }
        __syncthreads();
    }
    for (int element = threadIdx.x; element < HEAD_SIZE; element += blockDim.x)
        a.output[a.output_offset(a.query_starts[seq], head) + element] =
            T(A(output[element]) / weight_sum);
}
