// Paged attention on the CPU, read in place: the blocks of a sequence are never gathered.
//
// Gathering moves as many bytes as attention reads.  Here a thread takes some KV heads of some new
// tokens of a sequence, a tile, and walks through the blocks: the keys of a block are multiplied
// with the rows of the tile (a row being one query head of one new token), weighted by the online
// softmax, and the values added up; in float32, to which they are converted as they are loaded.
// Prompt and decoding tokens take the same way.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace {

// Rows of a KV head in a tile: enough to use a key often while it is in the first-level cache.
constexpr int64_t TILE_ROWS = 16;
// Rows that share a key once it is loaded and converted, and vectors of a value that are added up
// side by side, so that no addition waits for another: as many as the registers hold.
constexpr int64_t ROWS = 4, VECTORS = 4;
// Numbers of a block that a tile walks through at a time: keys and values in half of 32 KiB.
constexpr int64_t TILE_NUMBERS = 4096;

struct Batch {
    const int32_t* block_tables;     // [seqs, max_blocks]
    const int32_t* context_lengths;  // [seqs]
    const int32_t* query_starts;     // [seqs]
    const int32_t* query_lengths;    // [seqs]
    int64_t num_seqs, max_blocks, heads, kv_heads, head_size, block_size, query_stride, window;
    double scale;

    int64_t group() const { return heads / kv_heads; }
    int64_t tile_queries() const { return std::max<int64_t>(1, TILE_ROWS / group()); }
    int64_t tile_kv_heads() const {
        return std::clamp<int64_t>(TILE_NUMBERS / (block_size * head_size), 1, kv_heads);
    }
};

// Some KV heads of some new tokens of a sequence.
struct Tile {
    int64_t seq, first_kv_head, num_kv_heads, first_query, num_queries;
};

std::vector<Tile> tiles_of(const Batch& b) {
    std::vector<Tile> tiles;
    const int64_t queries = b.tile_queries(), kv_heads = b.tile_kv_heads();
    for (int64_t seq = 0; seq < b.num_seqs; seq++)
        for (int64_t query = 0; query < b.query_lengths[seq]; query += queries)
            for (int64_t head = 0; head < b.kv_heads; head += kv_heads)
                tiles.push_back({seq, head, std::min(kv_heads, b.kv_heads - head), query,
                                 std::min(queries, b.query_lengths[seq] - query)});
    return tiles;
}

// Rounded up to a whole number of vectors.
template <typename A>
int64_t padded(int64_t size) {
    constexpr int64_t lanes = at::vec::Vectorized<A>::size();
    return (size + lanes - 1) / lanes * lanes;
}

// What a thread works with, allocated once.  Row r of KV head h is at place h * rows + r.
template <typename A>
struct Scratch {
    int64_t width, tokens, rows;  // of a row, padded; of a block, padded; of a KV head
    std::vector<A> query, output, weights, largest;
    std::vector<A> weight_sums;  // of every row a vector, the lanes of which add up to the sum
    std::vector<A> keys, values;  // of a block, where they have to be padded

    explicit Scratch(const Batch& b)
        : width(padded<A>(b.head_size)), tokens(padded<A>(b.block_size)),
          rows(b.tile_queries() * b.group()), query(b.tile_kv_heads() * rows * width),
          output(query.size()), weights(ROWS * tokens), largest(b.tile_kv_heads() * rows),
          weight_sums(largest.size() * at::vec::Vectorized<A>::size()),
          keys(b.block_size * width), values(keys.size()) {}
};

// A vector of numbers, converted to the type that is computed in.
inline at::vec::Vectorized<double> load(const double* p) {
    return at::vec::Vectorized<double>::loadu(p);
}
inline at::vec::Vectorized<float> load(const float* p) {
    return at::vec::Vectorized<float>::loadu(p);
}
inline at::vec::Vectorized<float> load(const at::BFloat16* p) {
    at::vec::Vectorized<float> values;
    at::vec::load_fp32_from_bf16(p, values);
    return values;
}
inline at::vec::Vectorized<float> load(const at::Half* p) {
    at::vec::Vectorized<float> values;
    at::vec::load_fp32_from_fp16(p, values);
    return values;
}

// Asks for rows that are going to be read, into the second-level cache: the first is full.
template <typename S>
void prefetch(const S* rows, int64_t stride, int64_t count, int64_t size) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < size; i += 64 / sizeof(S))
            __builtin_prefetch(rows + t * stride + i, /* to read */ 0, 2);
}

template <typename Vec>
auto sum_of_lanes(Vec values) {
    return at::vec::vec_reduce_all<typename Vec::value_type>(
        [](Vec& a, Vec& b) { return a + b; }, values);
}

// The sums over the lanes of as many vectors as a vector has lanes, in one vector: each round
// adds neighbouring lanes, so that of two vectors one is left.
template <typename Vec>
Vec sums_of_lanes(Vec (&vectors)[Vec::size()]) {
    for (int left = Vec::size() / 2; left > 0; left /= 2)
        for (int i = 0; i < left; i++) {
            const auto [even, odd] = at::vec::deinterleave2(vectors[2 * i], vectors[2 * i + 1]);
            vectors[i] = even + odd;
        }
    return vectors[0];
}

// scores[r][t] = query[r] . keys[t] for R rows and `count` tokens.
template <int R, typename S, typename A>
void multiply(const A* query, int64_t width, const S* keys, int64_t stride, int64_t count,
              A* scores, int64_t score_stride) {
    using Vec = at::vec::Vectorized<A>;
    for (int64_t first = 0; first < count; first += Vec::size()) {
        Vec products[R][Vec::size()];  // a vector for each token, its lanes still to be added up
        const int tokens = std::min<int64_t>(count - first, Vec::size());
        for (int t = 0; t < tokens; t++) {
            const S* key = keys + (first + t) * stride;
            Vec sums[R];
            for (int r = 0; r < R; r++) sums[r] = Vec(0);
            for (int64_t i = 0; i < width; i += Vec::size()) {
                const Vec k = load(key + i);
                for (int r = 0; r < R; r++)
                    sums[r] = at::vec::fmadd(Vec::loadu(query + r * width + i), k, sums[r]);
            }
            for (int r = 0; r < R; r++) products[r][t] = sums[r];
        }
        for (int r = 0; r < R; r++)  // behind the last token come numbers that nobody looks at
            sums_of_lanes(products[r]).store(scores + r * score_stride + first);
    }
}

// Scores to weights relative to the largest score so far: the online softmax.  Only the tokens
// from..to - 1 count; the others get no weight.  What was summed before is scaled down.
template <typename A>
void weigh(A* scores, int64_t from, int64_t to, int64_t padded_tokens, A& largest, A* weight_sums,
           A* output, int64_t width) {
    using Vec = at::vec::Vectorized<A>;
    const A before = largest, infinity = std::numeric_limits<A>::infinity();
    std::fill(scores, scores + from, -infinity);
    std::fill(scores + to, scores + padded_tokens, -infinity);
    Vec maxima(before);
    for (int64_t t = 0; t < padded_tokens; t += Vec::size())
        maxima = at::vec::maximum(maxima, Vec::loadu(scores + t));
    largest = at::vec::vec_reduce_all<A>(
        [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, maxima);
    Vec sums = Vec::loadu(weight_sums);
    if (before < largest) {
        const Vec correction(std::exp(before - largest));
        sums = sums * correction;
        for (int64_t i = 0; i < width; i += Vec::size())
            (Vec::loadu(output + i) * correction).store(output + i);
    }
    for (int64_t t = 0; t < padded_tokens; t += Vec::size()) {
        const Vec weights = (Vec::loadu(scores + t) - Vec(largest)).exp_u20();
        weights.store(scores + t);
        sums = sums + weights;
    }
    sums.store(weight_sums);
}

// output[r] += sum over t of weights[r][t] * values[t], for R rows and V vectors of each.
template <int R, int V, typename S, typename A>
void add_values(const A* weights, int64_t weight_stride, const S* values, int64_t stride,
                int64_t count, A* output, int64_t width) {
    using Vec = at::vec::Vectorized<A>;
    Vec sums[R][V];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) sums[r][i] = Vec::loadu(output + r * width + i * Vec::size());
    for (int64_t t = 0; t < count; t++) {
        Vec value[V];
        for (int i = 0; i < V; i++) value[i] = load(values + t * stride + i * Vec::size());
        for (int r = 0; r < R; r++) {
            const Vec weight(weights[r * weight_stride + t]);
            for (int i = 0; i < V; i++) sums[r][i] = at::vec::fmadd(weight, value[i], sums[r][i]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < V; i++) sums[r][i].store(output + r * width + i * Vec::size());
}

// Where the tokens of a block are, seen from the first query of a tile.
struct Span {
    int64_t count;     // tokens of the block that some query of the tile sees
    int64_t distance;  // positions from the first of these to the first query
};

// R rows of one KV head, from row `first` of the tile on, over the tokens of one block.
template <int R, typename S, typename A>
void attend_rows(const Batch& b, Scratch<A>& s, int64_t h, int64_t first, const Span& span,
                 const S* keys, const S* values, int64_t stride) {
    constexpr int64_t LANES = at::vec::Vectorized<A>::size();
    const int64_t place = h * s.rows + first;
    A* output = &s.output[place * s.width];
    A* weights = s.weights.data();
    multiply<R>(&s.query[place * s.width], s.width, keys, stride, span.count, weights, s.tokens);
    int64_t seen_by_any = 0;
    for (int64_t r = 0; r < R; r++) {
        const int64_t end = span.distance + (first + r) / b.group() + 1;  // of what the row sees
        const int64_t to = std::min(end, span.count), from = std::max<int64_t>(end - b.window, 0);
        A* row = weights + r * s.tokens;
        if (from < to) {
            weigh(row, from, to, s.tokens, s.largest[place + r],
                  &s.weight_sums[(place + r) * LANES], output + r * s.width, s.width);
            seen_by_any = std::max(seen_by_any, to);
        } else {
            std::fill(row, row + s.tokens, A(0));
        }
    }
    int64_t i = 0;
    for (; i + VECTORS * LANES <= s.width; i += VECTORS * LANES)
        add_values<R, VECTORS>(weights, s.tokens, values + i, stride, seen_by_any, output + i,
                               s.width);
    for (; i < s.width; i += LANES)
        add_values<R, 1>(weights, s.tokens, values + i, stride, seen_by_any, output + i, s.width);
}

// All rows of one KV head.
template <typename S, typename A>
void attend_head(const Batch& b, Scratch<A>& s, int64_t h, int64_t rows, const Span& span,
                 const S* keys, const S* values, int64_t stride) {
    for (int64_t r = 0; r < rows; r += ROWS) {
        switch (std::min(ROWS, rows - r)) {
            case 1: attend_rows<1>(b, s, h, r, span, keys, values, stride); break;
            case 2: attend_rows<2>(b, s, h, r, span, keys, values, stride); break;
            case 3: attend_rows<3>(b, s, h, r, span, keys, values, stride); break;
            default: attend_rows<ROWS>(b, s, h, r, span, keys, values, stride);
        }
    }
}

template <typename T, typename A>
void attend(const Batch& b, const Tile& tile, const T* query, const T* keys, const T* values,
            T* output, Scratch<A>& s) {
    using Vec = at::vec::Vectorized<A>;
    const int64_t size = b.head_size, rows = tile.num_queries * b.group();
    const int64_t first_row = b.query_starts[tile.seq] + tile.first_query;
    const int64_t first_position =
        b.context_lengths[tile.seq] - b.query_lengths[tile.seq] + tile.first_query;

    // Where row r of KV head h, counted from those of the tile, is in a tensor of queries.
    auto place = [&](int64_t h, int64_t r, int64_t stride) {
        const int64_t head = (tile.first_kv_head + h) * b.group() + r % b.group();
        return (first_row + r / b.group()) * stride + head * size;
    };
    std::fill(s.query.begin(), s.query.end(), A(0));
    std::fill(s.output.begin(), s.output.end(), A(0));
    std::fill(s.largest.begin(), s.largest.end(), -std::numeric_limits<A>::infinity());
    std::fill(s.weight_sums.begin(), s.weight_sums.end(), A(0));
    for (int64_t h = 0; h < tile.num_kv_heads; h++)
        for (int64_t r = 0; r < rows; r++) {
            const T* source = query + place(h, r, b.query_stride);
            for (int64_t i = 0; i < size; i++)
                s.query[(h * s.rows + r) * s.width + i] = A(source[i]) * A(b.scale);
        }

    const int64_t stride = b.kv_heads * size;               // from one token to the next
    const int64_t end = first_position + tile.num_queries;  // of what the last query sees
    const int64_t begin = std::max<int64_t>(0, first_position + 1 - b.window);
    const int64_t last = (end - 1) / b.block_size;
    for (int64_t logical = begin / b.block_size; logical <= last; logical++) {
        const int64_t start = std::max(begin, logical * b.block_size);  // position of its tokens
        const int64_t stop = std::min(end, (logical + 1) * b.block_size);
        const Span span{stop - start, first_position - start};
        const int32_t* table = b.block_tables + tile.seq * b.max_blocks;
        const int64_t slot = table[logical] * b.block_size + start % b.block_size;
        const int64_t next = table[std::min(logical + 1, last)] * b.block_size;
        for (int64_t h = 0; h < tile.num_kv_heads; h++) {
            const int64_t head = (tile.first_kv_head + h) * size;
            const T *k = keys + slot * stride + head, *v = values + slot * stride + head;
            // A share of the next block, in the order in which it lies in memory.
            const int64_t from = h * b.block_size / tile.num_kv_heads;
            const int64_t to = (h + 1) * b.block_size / tile.num_kv_heads;
            const int64_t there = (next + from) * stride + tile.first_kv_head * size;
            prefetch(keys + there, stride, to - from, tile.num_kv_heads * size);
            prefetch(values + there, stride, to - from, tile.num_kv_heads * size);
            if (size == s.width) {
                attend_head(b, s, h, rows, span, k, v, stride);
            } else {
                // Rows that are no whole number of vectors: padded with zeros, keys and values.
                for (int64_t t = 0; t < span.count; t++)
                    for (int64_t i = 0; i < size; i++) {
                        s.keys[t * s.width + i] = A(k[t * stride + i]);
                        s.values[t * s.width + i] = A(v[t * stride + i]);
                    }
                attend_head(b, s, h, rows, span, s.keys.data(), s.values.data(), s.width);
            }
        }
    }
    for (int64_t h = 0; h < tile.num_kv_heads; h++)
        for (int64_t r = 0; r < rows; r++) {
            const int64_t row = h * s.rows + r;
            T* target = output + place(h, r, b.heads * size);
            const A factor = A(1) / sum_of_lanes(Vec::loadu(&s.weight_sums[row * Vec::size()]));
            for (int64_t i = 0; i < size; i++) target[i] = T(s.output[row * s.width + i] * factor);
        }
}

}  // namespace

// Shapes and types as in attention.cuh: query and output [tokens, heads, head_size], the rows of
// the query strided; keys and values [num_blocks, block_size, kv_heads, head_size]; int32 tables.
void native_attention(at::Tensor output, at::Tensor query, at::Tensor keys, at::Tensor values,
                      at::Tensor block_tables, at::Tensor context_lengths, at::Tensor query_starts,
                      at::Tensor query_lengths, int64_t window, double scale) {
    Batch b;
    b.block_tables = block_tables.const_data_ptr<int32_t>();
    b.context_lengths = context_lengths.const_data_ptr<int32_t>();
    b.query_starts = query_starts.const_data_ptr<int32_t>();
    b.query_lengths = query_lengths.const_data_ptr<int32_t>();
    b.num_seqs = context_lengths.size(0);
    b.max_blocks = block_tables.size(1);
    b.heads = query.size(1);
    b.kv_heads = keys.size(2);
    b.head_size = query.size(2);
    b.block_size = keys.size(1);
    b.query_stride = query.stride(0);
    b.window = window > 0 ? window : std::numeric_limits<int32_t>::max();
    b.scale = scale;

    const std::vector<Tile> tiles = tiles_of(b);
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kBFloat16, at::kHalf, query.scalar_type(), "native_attention", [&] {
            using A = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
            const scalar_t* q = query.const_data_ptr<scalar_t>();
            const scalar_t* k = keys.const_data_ptr<scalar_t>();
            const scalar_t* v = values.const_data_ptr<scalar_t>();
            scalar_t* out = output.data_ptr<scalar_t>();
            at::parallel_for(0, tiles.size(), 1, [&](int64_t begin, int64_t end) {
                Scratch<A> scratch(b);
                for (int64_t i = begin; i < end; i++) attend(b, tiles[i], q, k, v, out, scratch);
            });
        });
}
