// Step 1: the equation as it stands, a thread for each element of the output.
//
// Every thread walks through the whole context by itself, twice: once for the largest score,
// once for the weights.  All threads of a head compute the same scores, head_size times over.
#pragma once

#include "../attention.cuh"

template <typename T>
__device__ Accumulator<T> naive_score(const Attention<T>& a, int seq, int head, int token) {
    using A = Accumulator<T>;
    const int64_t key = a.token_offset(seq, token, head / a.group());
    const int64_t query = a.query_offset(a.query_starts[seq], head);
    A score = 0;
    for (int i = 0; i < a.head_size; i++) score += A(a.query[query + i]) * A(a.keys[key + i]);
    return score * a.scale;
}

// Grid: (heads, seqs).  Threads: head_size.  No shared memory.
template <typename T>
__global__ void step1_naive(Attention<T> a) {
    using A = Accumulator<T>;
    const int head = blockIdx.x, seq = blockIdx.y, element = threadIdx.x;
    const int context = a.context_lengths[seq], first = a.first_seen(context);

    A largest = minus_infinity<A>();
    for (int token = first; token < context; token++)
        largest = larger(largest, naive_score(a, seq, head, token));

    A weight_sum = 0, weighted_values = 0;
    for (int token = first; token < context; token++) {
        const A weight = exponential(naive_score(a, seq, head, token) - largest);
        const int64_t value = a.token_offset(seq, token, head / a.group());
        weight_sum += weight;
        weighted_values += weight * A(a.values[value + element]);
    }
    a.output[a.output_offset(a.query_starts[seq], head) + element] =
        T(weighted_values / weight_sum);
}
