// Tensor cores on a CPU: the part of nvcuda::wmma that the kernels use, for 16 x 16 x 16 tiles.
//
// A warp holds a 16 x 16 matrix in a fragment, 8 elements in every lane.  Which lane has which
// element is not specified, and here it is a permutation that no GPU has: a kernel that relies on
// the order of fragment.x is wrong.  Products are summed up in float32, as a tensor core does.
#pragma once

#include "cuda_on_cpu.h"

#ifdef __CUDACC__
#include <mma.h>
#else

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = row_major>
struct fragment {
    static_assert(M == 16 && N == 16 && K == 16, "only 16 x 16 x 16 tiles");
    static constexpr int num_elements = 8;
    T x[num_elements];
};

// The matrix element, row * 16 + column, that is in x[i] of this lane.
inline int element(int i) { return ((cpu::gpu.thread % cpu::WARP) * 8 + i) * 37 % 256; }

// The matrices that the lanes of each warp put together for one product.
struct Operands {
    float a[256], b[256];
};
inline std::vector<Operands> operands;

template <typename Fragment, typename T>
void fill_fragment(Fragment& fragment, T value) {
    for (auto& x : fragment.x) x = value;
}

template <typename Array>
void check_tile(const Array& array, int64_t stride, size_t element_bytes) {
#ifndef UNCHECKED
    if (array.byte(0) % 32 || stride * element_bytes % 16)
        cpu::fail("a tile for the tensor cores must begin at a multiple of 32 bytes, and its rows "
                  "must be a multiple of 16 bytes apart");
#else
    (void)array, (void)stride, (void)element_bytes;
#endif
}

// From rows (or columns, for a col_major fragment) that are `stride` elements apart.
template <typename Use, typename T, typename Layout, typename Array>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& fragment, Array array, int stride) {
    check_tile(array, stride, sizeof(T));
    for (int i = 0; i < 8; i++) {
        const int row = element(i) / 16, column = element(i) % 16;
        const bool by_column = std::is_same_v<Layout, col_major>;
        fragment.x[i] = array[by_column ? column * stride + row : row * stride + column];
    }
}
template <typename T, typename Array>
void load_matrix_sync(fragment<accumulator, 16, 16, 16, T>& fragment, Array array, int stride,
                      layout_t) {
    load_matrix_sync<accumulator, T, row_major, Array>(fragment, array, stride);
}

template <typename T, typename Array>
void store_matrix_sync(Array array, const fragment<accumulator, 16, 16, 16, T>& fragment,
                       int stride, layout_t) {
    check_tile(array, stride, sizeof(T));
    for (int i = 0; i < 8; i++) array[element(i) / 16 * stride + element(i) % 16] = fragment.x[i];
}

// d = a * b + c, by all lanes of the warp together.
template <typename T, typename LayoutA, typename LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d,
              const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b,
              const fragment<accumulator, 16, 16, 16, float>& c) {
    const size_t warp = cpu::gpu.thread / cpu::WARP, lane = cpu::gpu.thread % cpu::WARP;
    if (operands.size() <= warp) operands.resize(warp + 1);
    for (int i = 0; i < 8; i++) {
        operands[warp].a[element(i)] = float(a.x[i]);
        operands[warp].b[element(i)] = float(b.x[i]);
    }
    cpu::meet("mma_sync", __FILE__, __LINE__, 0xFFFFFFFF, 0, lane);
    for (int i = 0; i < 8; i++) {
        const int row = element(i) / 16, column = element(i) % 16;
        float sum = c.x[i];
        for (int k = 0; k < 16; k++)
            sum += operands[warp].a[row * 16 + k] * operands[warp].b[k * 16 + column];
        d.x[i] = sum;
    }
    cpu::meet("mma_sync", __FILE__, __LINE__, 0xFFFFFFFF, 0, lane);
}

}  // namespace nvcuda::wmma

#endif
