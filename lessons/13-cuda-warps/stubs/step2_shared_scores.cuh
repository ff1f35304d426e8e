// Step 2: each score once.
//
// The threads of a block share the work: each computes the scores of some tokens and leaves them
// in shared memory, where all of them find them when they add up the values.  The maximum and
// the sum over the block are folded in halves, with a barrier after each.
//
// The scores limit the context: 48 KiB of shared memory hold 12,288 of them.
#pragma once

#include "../attention.cuh"

// Folds one value of every thread into one: their sum or their maximum.  Threads: a power of two.
template <typename A, typename Fold>
__device__ A fold_over_block(Shared<A> scratch, A value, Fold fold) {
    scratch[threadIdx.x] = value;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half)
            scratch[threadIdx.x] = fold(A(scratch[threadIdx.x]), A(scratch[threadIdx.x + half]));
        __syncthreads();
    }
    const A result = scratch[0];
    return result;
}

constexpr int STEP2_THREADS = 128;

template <typename A>
size_t step2_shared_bytes(int longest_context) {
    return longest_context * sizeof(A) + 64;
}

// Grid: (heads, seqs).
template <typename T>
__global__ void step2_shared_scores(Attention<T> a) {
    using A = Accumulator<T>;
    const int head = blockIdx.x, seq = blockIdx.y, thread = threadIdx.x;
    const int kv_head = head / a.group();
    const int context = a.context_lengths[seq], first = a.first_seen(context);
    const int64_t query = a.query_offset(a.query_starts[seq], head);
    SharedMemory shared;
    Shared<A> scratch = shared.array<A>(STEP2_THREADS, "scratch");
    Shared<A> weights = shared.array<A>(context - first, "weights");

    A largest = minus_infinity<A>();
    for (int token = first + thread; token < context; token += blockDim.x) {
        const int64_t key = a.token_offset(seq, token, kv_head);
        A score = 0;
        for (int i = 0; i < a.head_size; i++) score += A(a.query[query + i]) * A(a.keys[key + i]);
        score *= a.scale;
        weights[token - first] = score;
        largest = larger(largest, score);
    }
    largest = fold_over_block(scratch, largest, [](A x, A y) { return larger(x, y); });

    A weight_sum = 0;
    for (int token = first + thread; token < context; token += blockDim.x) {
        const A weight = exponential(A(weights[token - first]) - largest);
        weights[token - first] = weight;
        weight_sum += weight;
    }
    if (first + thread >= context) return;
    weight_sum = fold_over_block(scratch, weight_sum, [](A x, A y) { return x + y; });

    for (int element = thread; element < a.head_size; element += blockDim.x) {
        A weighted_values = 0;
        for (int token = first; token < context; token++) {
            const int64_t value = a.token_offset(seq, token, kv_head);
            weighted_values += A(weights[token - first]) * A(a.values[value + element]);
        }
        a.output[a.output_offset(a.query_starts[seq], head) + element] =
            T(weighted_values / weight_sum);
    }
}
