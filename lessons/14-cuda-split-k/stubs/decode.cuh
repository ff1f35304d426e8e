// Attention of one new token of a sequence over a span of its blocks: the heart of v1 and v2.
//
// Steps 1 to 5 add one idea each; this adds the last two.  GROUP query heads of one KV head are
// computed together, so that its keys and values are read once for all of them: with 32 query
// heads to 8 KV heads, a quarter of the traffic.  And a warp asks for all the keys of a tile of
// tokens before it uses the first of them, so that many loads are under way at a time.
#pragma once

#include "attention.cuh"

constexpr int DECODE_WARPS = 4;

// What a thread block of v1 or v2 works on, by its place in the grid: GROUP query heads, from
// first_head on, of a KV head of a sequence, and the blocks first_block .. end_block - 1.
template <int GROUP>
struct DecodeTask {
    int seq = blockIdx.y, kv_head, first_head, end_head, first_block, end_block;

    template <typename T, typename KV>
    __device__ explicit DecodeTask(const Attention<T, KV>& a) {
        not_implemented("Task 14.1: DecodeTask is still to be written");
    }
};

// What a warp has summed up of GROUP query heads, relative to the largest score of each; a lane
// has its elements of the weighted values (see Row).
template <typename A, typename R, int GROUP>
struct PartialAttention {
    A largest[GROUP], weight_sum[GROUP], weighted_values[GROUP][R::VALUES];

    __device__ void clear() {
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            largest[g] = minus_infinity<A>();
            weight_sum[g] = 0;
#pragma unroll
            for (int i = 0; i < R::VALUES; i++) weighted_values[g][i] = 0;
        }
    }
};

// One lane's part of the rows of a tile: all loads are asked for before the first is used.
template <typename KV, typename R, int TILE_ROWS>
struct RowTile {
    Chunk<KV> chunks[TILE_ROWS][R::PER_LANE];

    // Row r of this lane is at `array[offset + r * stride]`; only those are read that are `seen`.
    template <int HEAD_SIZE>
    __device__ __forceinline__ void load(Global<const KV> array, int64_t offset, int64_t stride,
                                         const bool (&seen)[TILE_ROWS], int lane) {
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r++)
#pragma unroll
            for (int j = 0; j < R::PER_LANE; j++)
                chunks[r][j] = seen[r] && R::element(lane, j) < HEAD_SIZE
                                   ? load_chunk(array, offset + r * stride + R::element(lane, j))
                                   : zero_chunk<KV>();
    }
};

// Attends to the tokens of the logical blocks begin + warp, + DECODE_WARPS, ... < end that the
// sequence's new token sees.
template <typename T, typename KV, int HEAD_SIZE, int GROUP>
__device__ __forceinline__ void attend_to_blocks(
    const Attention<T, KV>& a, const DecodeTask<GROUP>& task, int begin, int end,
    PartialAttention<Accumulator<T>, Row<KV, HEAD_SIZE>, GROUP>& partial) {
    using A = Accumulator<T>;
    using R = Row<KV, HEAD_SIZE>;
    // Rows of a lane per tile: 16 tokens of a block, if that leaves registers enough.
    constexpr int TILE_ROWS = R::ROWS >= 16 ? 1 : R::ROWS >= 4 || R::PER_LANE * GROUP > 1 ? 4 : 8;
    constexpr int TILE = TILE_ROWS * R::ROWS;
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int seq = task.seq, kv_head = task.kv_head;
    const int context = a.context_lengths[seq], first = a.first_seen(context);
    const A scale = a.score_scale(kv_head);

    A query[GROUP][R::VALUES];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        const int head = task.first_head + g;
        const bool exists = head < task.end_head;
        const int64_t offset = exists ? a.query_offset(a.query_starts[seq], head) : 0;
#pragma unroll
        for (int i = 0; i < R::VALUES; i++) {
            const int element = R::element(lane, i / R::CHUNK) + i % R::CHUNK;
            query[g][i] =
                exists && element < HEAD_SIZE ? A(a.query[offset + element]) * scale : A(0);
        }
    }

    for (int logical = begin + warp; logical < end; logical += DECODE_WARPS) {
        const int64_t block = a.block_offset(seq, logical, kv_head);
        for (int base = 0; base < a.block_size; base += TILE) {
            const int tile = logical * a.block_size + base;  // its first token
            if (tile >= context || tile + TILE <= first) continue;
            const int row = lane / R::LANES;
            bool seen[TILE_ROWS];
#pragma unroll
            for (int r = 0; r < TILE_ROWS; r++) {
                const int offset = base + r * R::ROWS + row;
                const int token = logical * a.block_size + offset;
                seen[r] = offset < a.block_size && token >= first && token < context;
            }
            const int64_t offset = block + (base + row) * a.token_stride();
            const int64_t stride = R::ROWS * a.token_stride();
            RowTile<KV, R, TILE_ROWS> rows;
            rows.template load<HEAD_SIZE>(a.keys, offset, stride, seen, lane);

            A weights[TILE_ROWS][GROUP];
#pragma unroll
            for (int r = 0; r < TILE_ROWS; r++)
#pragma unroll
                for (int g = 0; g < GROUP; g++) {
                    A score = 0;
#pragma unroll
                    for (int i = 0; i < R::VALUES; i++)
                        score += query[g][i] * A(rows.chunks[r][i / R::CHUNK].values[i % R::CHUNK]);
                    score = sum_over_lanes(score, 1, R::LANES);
                    weights[r][g] = seen[r] ? score : minus_infinity<A>();
                }
            rows.template load<HEAD_SIZE>(a.values, offset, stride, seen, lane);
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                A now = partial.largest[g];
#pragma unroll
                for (int r = 0; r < TILE_ROWS; r++) now = larger(now, weights[r][g]);
                now = largest_of_lanes(now, R::LANES, WARP_SIZE);
                const A correction = rescale(partial.largest[g], now);
                partial.largest[g] = now;
                partial.weight_sum[g] *= correction;
#pragma unroll
                for (int i = 0; i < R::VALUES; i++) partial.weighted_values[g][i] *= correction;
#pragma unroll
                for (int r = 0; r < TILE_ROWS; r++) {
                    const A weight = rescale(weights[r][g], now);
                    partial.weight_sum[g] += weight;
#pragma unroll
                    for (int i = 0; i < R::VALUES; i++)
                        partial.weighted_values[g][i] +=
                            weight * A(rows.chunks[r][i / R::CHUNK].values[i % R::CHUNK]);
                }
            }
        }
    }
}

// What the warps of a thread block have, in shared memory.
template <typename A, int HEAD_SIZE, int GROUP>
struct WarpPartials {
    Shared<A> largest, weight_sum, weighted_values;

    static size_t bytes() { return DECODE_WARPS * GROUP * (HEAD_SIZE + 2) * sizeof(A) + 96; }

    __device__ WarpPartials(SharedMemory& shared)
        : largest(shared.array<A>(DECODE_WARPS * GROUP, "largest")),
          weight_sum(shared.array<A>(DECODE_WARPS * GROUP, "weight_sum")),
          weighted_values(
              shared.array<A>(DECODE_WARPS * GROUP * HEAD_SIZE, "weighted_values")) {}

    // Adds up the rows that this warp read side by side and stores the sums; all threads call it.
    template <typename R>
    __device__ void store(PartialAttention<A, R, GROUP>& partial) {
        const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            const A sum = sum_over_lanes(partial.weight_sum[g], R::LANES, WARP_SIZE);
            const int place = warp * GROUP + g;
            if (lane == 0) {
                largest[place] = partial.largest[g];
                weight_sum[place] = sum;
            }
#pragma unroll
            for (int i = 0; i < R::VALUES; i++) {
                const A value =
                    sum_over_lanes(partial.weighted_values[g][i], R::LANES, WARP_SIZE);
                const int element = R::element(lane, i / R::CHUNK) + i % R::CHUNK;
                if (lane < R::LANES && element < HEAD_SIZE)
                    weighted_values[place * HEAD_SIZE + element] = value;
            }
        }
        __syncthreads();
    }

    // The largest score of a head, and the sum of its weights relative to it.
    __device__ void totals(int g, A& overall, A& total) const {
        overall = minus_infinity<A>();
        for (int warp = 0; warp < DECODE_WARPS; warp++)
            overall = larger(overall, A(largest[warp * GROUP + g]));
        total = 0;
        for (int warp = 0; warp < DECODE_WARPS; warp++)
            total += weight_sum[warp * GROUP + g] * rescale(A(largest[warp * GROUP + g]), overall);
    }

    // An element of the weighted values of a head, relative to `overall`.
    __device__ A element(int g, int element, A overall) const {
        A sum = 0;
        for (int warp = 0; warp < DECODE_WARPS; warp++)
            sum += weighted_values[(warp * GROUP + g) * HEAD_SIZE + element] *
                   rescale(A(largest[warp * GROUP + g]), overall);
        return sum;
    }
};
