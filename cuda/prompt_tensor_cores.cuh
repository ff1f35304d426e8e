// prompt_tensor_cores: prompt attention with its two matrix products on tensor cores.
//
// In prompt_attention a thread multiplies two numbers at a time; a tensor core multiplies two
// 16 x 16 matrices of 16-bit numbers, and adds up in float32.  A warp has 16 rows of the tile for
// itself, scores, weights and output; the thread block shares the keys and values.  The output
// stays in shared memory, since a row of it has to be scaled when a larger score comes, and which
// lane of a fragment has which row is not for us to know.  The weights are rounded to 16 bits
// before they are multiplied, and summed up as rounded.
#pragma once

#include "prompt_tile.cuh"
#include "wmma_on_cpu.h"

constexpr int TENSOR_WARPS = 4;
constexpr int TENSOR_THREADS = WARP_SIZE * TENSOR_WARPS;
constexpr int TENSOR_ROWS = 16 * TENSOR_WARPS;
constexpr int TENSOR_KEYS = WARP_SIZE;  // a lane for each key of a row
constexpr int SKEW = 8;  // elements between rows, so that they begin in different banks

template <typename T, int HEAD_SIZE>
size_t tensor_shared_bytes() {
    return (TENSOR_ROWS + TENSOR_KEYS) * (HEAD_SIZE + SKEW) * sizeof(T) +
           TENSOR_ROWS * (TENSOR_KEYS + SKEW) * (sizeof(float) + sizeof(T)) +
           TENSOR_ROWS * (HEAD_SIZE + SKEW) * sizeof(float) + 2 * TENSOR_ROWS * sizeof(float) + 256;
}

// Grid: (tiles of the longest sequence, KV heads, seqs).  Threads: TENSOR_THREADS.
template <typename T, int HEAD_SIZE>
__global__ void __launch_bounds__(TENSOR_THREADS) prompt_tensor_cores(Attention<T, T> a) {
    using namespace nvcuda;
    using Left = wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major>;
    using Right = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major>;
    using RightTransposed = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major>;
    using Sum = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;
    constexpr int STRIDE = HEAD_SIZE + SKEW, SCORE_STRIDE = TENSOR_KEYS + SKEW;
    const int thread = threadIdx.x, lane = thread % WARP_SIZE, warp = thread / WARP_SIZE;
    const QueryTile<T, T, TENSOR_ROWS> rows(a);
    if (rows.size() <= 0) return;  // the whole thread block, before its first barrier
    const int kv_head = rows.kv_head, seq = rows.seq, begin = rows.begin(), end = rows.end();

    SharedMemory shared;
    Shared<T> query = shared.array<T>(TENSOR_ROWS * STRIDE, "query");
    Shared<T> tile = shared.array<T>(TENSOR_KEYS * STRIDE, "tile");  // keys, then values
    Shared<float> scores = shared.array<float>(TENSOR_ROWS * SCORE_STRIDE, "scores");
    Shared<T> weights = shared.array<T>(TENSOR_ROWS * SCORE_STRIDE, "weights");
    Shared<float> output = shared.array<float>(TENSOR_ROWS * STRIDE, "output");
    Shared<float> largest = shared.array<float>(TENSOR_ROWS, "largest");
    Shared<float> weight_sum = shared.array<float>(TENSOR_ROWS, "weight_sum");

    for (int i = thread; i < TENSOR_ROWS * HEAD_SIZE; i += TENSOR_THREADS) {
        const int row = i / HEAD_SIZE, element = i % HEAD_SIZE;
        T value = T(0.0f);
        if (row < rows.size())
            value = a.query[a.query_offset(rows.token(row), rows.head(row)) + element];
        query[row * STRIDE + element] = value;
        output[row * STRIDE + element] = 0.0f;
    }
    if (thread < TENSOR_ROWS) {
        largest[thread] = minus_infinity<float>();
        weight_sum[thread] = 0.0f;
    }

    const int my_rows = warp * 16;  // the first of the warp's 16
    for (int first_key = begin; first_key < end; first_key += TENSOR_KEYS) {
        load_tile<TENSOR_KEYS, STRIDE, HEAD_SIZE>(a, a.keys, seq, kv_head, first_key, end, tile);
        __syncthreads();

        // scores = query x keys transposed
        for (int key = 0; key < TENSOR_KEYS; key += 16) {
            Sum sum;
            wmma::fill_fragment(sum, 0.0f);
            for (int i = 0; i < HEAD_SIZE; i += 16) {
                Left q;
                RightTransposed k;
                wmma::load_matrix_sync(q, query + my_rows * STRIDE + i, STRIDE);
                wmma::load_matrix_sync(k, tile + key * STRIDE + i, STRIDE);
                wmma::mma_sync(sum, q, k, sum);
            }
            wmma::store_matrix_sync(scores + my_rows * SCORE_STRIDE + key, sum, SCORE_STRIDE,
                                    wmma::mem_row_major);
        }
        __syncthreads();

        load_tile<TENSOR_KEYS, STRIDE, HEAD_SIZE>(a, a.values, seq, kv_head, first_key, end, tile);
        for (int row = my_rows; row < my_rows + 16; row++) {
            const int distance = rows.position(row) - first_key - lane;
            float score = minus_infinity<float>();
            if (distance >= 0 && distance < a.window)
                score = scores[row * SCORE_STRIDE + lane] * a.scale;
            const float before = largest[row];
            const float now = larger(before, largest_of_lanes(score, 1, WARP_SIZE));
            const T weight = T(rescale(score, now));
            const float sum = sum_over_lanes(float(weight), 1, WARP_SIZE);
            const float correction = rescale(before, now);
            weights[row * SCORE_STRIDE + lane] = weight;
            for (int i = lane; i < HEAD_SIZE; i += WARP_SIZE)
                output[row * STRIDE + i] = output[row * STRIDE + i] * correction;
            __syncwarp();  // all lanes have read the row's maximum before it is overwritten
            if (lane == 0) {
                weight_sum[row] = weight_sum[row] * correction + sum;
                largest[row] = now;
            }
        }
        __syncthreads();

        // output += weights x values
        for (int i = 0; i < HEAD_SIZE; i += 16) {
            Sum sum;
            wmma::load_matrix_sync(sum, output + my_rows * STRIDE + i, STRIDE,
                                   wmma::mem_row_major);
            for (int key = 0; key < TENSOR_KEYS; key += 16) {
                Left w;
                Right v;
                wmma::load_matrix_sync(w, weights + my_rows * SCORE_STRIDE + key, SCORE_STRIDE);
                wmma::load_matrix_sync(v, tile + key * STRIDE + i, STRIDE);
                wmma::mma_sync(sum, w, v, sum);
            }
            wmma::store_matrix_sync(output + my_rows * STRIDE + i, sum, STRIDE,
                                    wmma::mem_row_major);
        }
        __syncthreads();  // all are done with the values before the next keys come
    }

    for (int i = thread; i < rows.size() * HEAD_SIZE; i += TENSOR_THREADS) {
        const int row = i / HEAD_SIZE, element = i % HEAD_SIZE;
        a.output[a.output_offset(rows.token(row), rows.head(row)) + element] =
            T(output[row * STRIDE + element] / weight_sum[row]);
    }
}
