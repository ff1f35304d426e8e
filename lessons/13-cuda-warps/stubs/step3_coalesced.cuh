// Step 3: neighbouring threads read neighbouring bytes, 16 at a time.
//
// In step 2 a thread read a whole key by itself, 2 bytes at a time, so that the 32 threads of a
// warp asked for 32 pieces of memory far from each other.  Now the lanes of a warp share a key
// (see Row), and add up what each found with shuffles, which need neither shared memory nor
// barriers.  The folds over the block do the same: a warp by shuffles, the warps through memory.
#pragma once

#include "../attention.cuh"

// Sum, or largest, of one value of every thread.  The warps must be full.
template <typename A>
__device__ A sum_over_block(Shared<A> scratch, A value) {
    not_implemented("Task 13.3: sum_over_block is still to be written");
}

template <typename A>
__device__ A largest_of_block(Shared<A> scratch, A value) {
    not_implemented("Task 13.3: largest_of_block is still to be written");
}

// The elements of a query that a lane multiplies with its part of every key.
template <typename T, int HEAD_SIZE>
__device__ void load_query(const Attention<T>& a, int seq, int head, int lane,
                           Accumulator<T> (&query)[Row<T, HEAD_SIZE>::VALUES]) {
    using R = Row<T, HEAD_SIZE>;
    const int64_t offset = a.query_offset(a.query_starts[seq], head);
    for (int j = 0; j < R::PER_LANE; j++)
        for (int i = 0; i < R::CHUNK; i++) {
            const int element = R::element(lane, j) + i;
            query[j * R::CHUNK + i] =
                element < HEAD_SIZE ? Accumulator<T>(a.query[offset + element]) : Accumulator<T>(0);
        }
}

// The score of the key at `offset`, for all lanes that share it; the whole warp calls it.
template <typename T, int HEAD_SIZE>
__device__ Accumulator<T> shared_score(const Attention<T>& a, int64_t offset, bool exists, int lane,
                                       Accumulator<T> (&query)[Row<T, HEAD_SIZE>::VALUES]) {
    not_implemented("Task 13.3: shared_score is still to be written");
}

constexpr int STEP3_THREADS = 128;

template <typename A>
size_t step3_shared_bytes(int longest_context) {
    return (STEP3_THREADS / WARP_SIZE + longest_context) * sizeof(A) + 64;
}

// Grid: (heads, seqs).
template <typename T, int HEAD_SIZE>
__global__ void step3_coalesced(Attention<T> a) {
    using A = Accumulator<T>;
    using R = Row<T, HEAD_SIZE>;
    const int head = blockIdx.x, seq = blockIdx.y, thread = threadIdx.x;
    const int lane = thread % WARP_SIZE, warp = thread / WARP_SIZE;
    const int kv_head = head / a.group();
    const int context = a.context_lengths[seq], first = a.first_seen(context);
    SharedMemory shared;
    Shared<A> scratch = shared.array<A>(STEP3_THREADS / WARP_SIZE, "scratch");
    Shared<A> weights = shared.array<A>(context - first, "weights");

    A query[R::VALUES];
    load_query<T, HEAD_SIZE>(a, seq, head, lane, query);
    A largest = minus_infinity<A>();
    // The loop runs equally often for all lanes of a warp: shuffles need every one of them.
    for (int base = first + warp * R::ROWS; base < context; base += STEP3_THREADS / R::LANES) {
        const int token = base + lane / R::LANES;
        const bool exists = token < context;
        const int64_t key = exists ? a.token_offset(seq, token, kv_head) : 0;
        const A score = shared_score<T, HEAD_SIZE>(a, key, exists, lane, query);
        if (exists && lane % R::LANES == 0) weights[token - first] = score;
        if (exists) largest = larger(largest, score);
    }
    largest = largest_of_block(scratch, largest);

    A weight_sum = 0;
    for (int token = first + thread; token < context; token += STEP3_THREADS) {
        const A weight = exponential(A(weights[token - first]) - largest);
        weights[token - first] = weight;
        weight_sum += weight;
    }
    weight_sum = sum_over_block(scratch, weight_sum);

    for (int element = thread; element < HEAD_SIZE; element += STEP3_THREADS) {
        A weighted_values = 0;
        for (int token = first; token < context; token++) {
            const int64_t value = a.token_offset(seq, token, kv_head);
            weighted_values += A(weights[token - first]) * A(a.values[value + element]);
        }
        a.output[a.output_offset(a.query_starts[seq], head) + element] =
            T(weighted_values / weight_sum);
    }
}
