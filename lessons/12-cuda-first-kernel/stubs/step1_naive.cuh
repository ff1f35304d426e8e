// Step 1: the equation as it stands, a thread for each element of the output.
//
// Every thread walks through the whole context by itself, twice: once for the largest score,
// once for the weights.  All threads of a head compute the same scores, head_size times over.
#pragma once

#include "../attention.cuh"

template <typename T>
__device__ Accumulator<T> naive_score(const Attention<T>& a, int seq, int head, int token) {
    not_implemented("Task 12.4: naive_score is still to be written");
}

// Grid: (heads, seqs).  Threads: head_size.  No shared memory.
template <typename T>
__global__ void step1_naive(Attention<T> a) {
    using A = Accumulator<T>;
    const int head = blockIdx.x, seq = blockIdx.y, element = threadIdx.x;
    const int context = a.context_lengths[seq], first = a.first_seen(context);

    not_implemented("Task 12.4: step1_naive is still to be written");
}
