// prompt_attention: causal attention of several new tokens of a sequence at a time.
//
// For whole prompts, chunks of them, and prompts of which a prefix was in the cache: the new
// tokens are the last ones of their context.  A thread block takes a tile of ROWS rows, a row
// being one query head of one new token; the heads that share a KV head are neighbours, so that
// a tile of keys and values, read through the block table into shared memory, serves them all.
// The softmax is the online one (FlashAttention, Dao et al. 2022).
#pragma once

#include "prompt_tile.cuh"

constexpr int PROMPT_WARPS = 4;
constexpr int PROMPT_THREADS = WARP_SIZE * PROMPT_WARPS;

// Rows of queries and of keys in a tile; fewer where they are long, for want of shared memory.
template <typename KV, int HEAD_SIZE>
struct PromptTile {
    static constexpr int ROWS = HEAD_SIZE * sizeof(KV) > 512 ? 16 : 32;
    static constexpr int KEYS = ROWS;
};

template <typename T, typename KV, int HEAD_SIZE>
size_t prompt_shared_bytes() {
    using A = Accumulator<T>;
    constexpr int ROWS = PromptTile<KV, HEAD_SIZE>::ROWS, KEYS = PromptTile<KV, HEAD_SIZE>::KEYS;
    return ROWS * HEAD_SIZE * sizeof(T) + KEYS * HEAD_SIZE * sizeof(KV) +
           (ROWS * KEYS + 3 * ROWS) * sizeof(A) + 192;
}

// Grid: (tiles of the longest sequence, KV heads, seqs).  Threads: PROMPT_THREADS.
template <typename T, typename KV, int HEAD_SIZE>
__global__ void __launch_bounds__(PROMPT_THREADS) prompt_attention(Attention<T, KV> a) {
    using A = Accumulator<T>;
    constexpr int ROWS = PromptTile<KV, HEAD_SIZE>::ROWS, KEYS = PromptTile<KV, HEAD_SIZE>::KEYS;
    constexpr int OUTPUTS = (ROWS * HEAD_SIZE + PROMPT_THREADS - 1) / PROMPT_THREADS;
    static_assert(ROWS <= WARP_SIZE && KEYS <= WARP_SIZE, "a lane for each key of a row");
    const int thread = threadIdx.x, lane = thread % WARP_SIZE, warp = thread / WARP_SIZE;
    const QueryTile<T, KV, ROWS> rows(a);
    if (rows.size() <= 0) return;  // the whole thread block, before its first barrier
    const int kv_head = rows.kv_head, seq = rows.seq, begin = rows.begin(), end = rows.end();

    SharedMemory shared;
    Shared<T> query = shared.array<T>(ROWS * HEAD_SIZE, "query");
    Shared<KV> tile = shared.array<KV>(KEYS * HEAD_SIZE, "tile");  // keys, then values
    Shared<A> weights = shared.array<A>(ROWS * KEYS, "weights");   // scores, then weights
    Shared<A> largest = shared.array<A>(ROWS, "largest");
    Shared<A> weight_sum = shared.array<A>(ROWS, "weight_sum");
    Shared<A> correction = shared.array<A>(ROWS, "correction");

    for (int i = thread; i < ROWS * HEAD_SIZE; i += PROMPT_THREADS) {
        const int row = i / HEAD_SIZE;
        T value = T(0.0f);
        if (row < rows.size())
            value = a.query[a.query_offset(rows.token(row), rows.head(row)) + i % HEAD_SIZE];
        query[i] = value;
    }
    if (thread < ROWS) {
        largest[thread] = minus_infinity<A>();
        weight_sum[thread] = A(0);
    }
    // A thread has elements thread, thread + PROMPT_THREADS, ... of the output of the tile.
    A output[OUTPUTS] = {};
    auto row_of = [=](int o) {  // the last row again where there is nothing left
        const int row = (thread + o * PROMPT_THREADS) / HEAD_SIZE;
        return row < ROWS ? row : ROWS - 1;
    };
    auto element_of = [=](int o) { return (thread + o * PROMPT_THREADS) % HEAD_SIZE; };

    for (int first_key = begin; first_key < end; first_key += KEYS) {
        load_tile<KEYS, HEAD_SIZE, HEAD_SIZE>(a, a.keys, seq, kv_head, first_key, end, tile);
        __syncthreads();

        for (int i = thread; i < ROWS * KEYS; i += PROMPT_THREADS) {
            const int row = i / KEYS, key = i % KEYS, distance = rows.position(row) - first_key - key;
            A score = minus_infinity<A>();
            if (distance >= 0 && distance < a.window) {
                score = 0;
#pragma unroll 8
                for (int j = 0; j < HEAD_SIZE; j++)
                    score += A(T(query[row * HEAD_SIZE + j])) * A(KV(tile[key * HEAD_SIZE + j]));
                score *= a.score_scale(kv_head);
            }
            weights[i] = score;
        }
        __syncthreads();

        // A warp for each row, a lane for each key; meanwhile the values take the keys' place.
        load_tile<KEYS, HEAD_SIZE, HEAD_SIZE>(a, a.values, seq, kv_head, first_key, end, tile);
        for (int row = warp; row < ROWS; row += PROMPT_WARPS) {
            const A score = lane < KEYS ? A(weights[row * KEYS + lane]) : minus_infinity<A>();
            const A before = largest[row];
            const A now = larger(before, largest_of_lanes(score, 1, WARP_SIZE));
            const A weight = rescale(score, now);
            const A sum = sum_over_lanes(weight, 1, WARP_SIZE);
            if (lane < KEYS) weights[row * KEYS + lane] = weight;
            __syncwarp();  // all lanes have read the row's maximum before it is overwritten
            if (lane == 0) {
                correction[row] = rescale(before, now);
                weight_sum[row] = weight_sum[row] * rescale(before, now) + sum;
                largest[row] = now;
            }
        }
        __syncthreads();

#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) output[o] *= correction[row_of(o)];
#pragma unroll 1
        for (int key = 0; key < KEYS; key++)
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++)
                output[o] += weights[row_of(o) * KEYS + key] *
                             A(KV(tile[key * HEAD_SIZE + element_of(o)]));
        __syncthreads();  // all are done with the values before the next keys come
    }

#pragma unroll
    for (int o = 0; o < OUTPUTS; o++) {
        const int row = row_of(o);
        if (row >= rows.size() || thread + o * PROMPT_THREADS >= ROWS * HEAD_SIZE) break;
        a.output[a.output_offset(rows.token(row), rows.head(row)) + element_of(o)] =
            T(output[o] / weight_sum[row] * a.output_scale(kv_head));
    }
}
