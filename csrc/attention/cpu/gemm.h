// Small matrix products on tiles that lie in cache: C (+)= A B with B and C in whole vectors along their rows.
#pragma once

#include "attention/cpu/simd.h"

namespace hstu::attention::cpu::HSTU_CPU_VARIANT {

// A register block is kGroup rows by kBlockVectors vectors; with the operands it just fits the register file.
constexpr int kGroup = 6;
constexpr int kBlockVectors = kVectorBytes == 64 ? 4 : 2;

template <int n>
struct Constant {
    static constexpr int value = n;
};

enum class Layout { kRowMajor, kTransposed };

// One operand of a product: element (row, k) of A, or the first element of a row of B or C, and the step between rows.
template <class C>
struct Matrix {
    C* data;
    int stride;
};

// C[r, v] (+)= sum over k of A(r, k) B[k, v] for kRows rows and kVectors vectors.
template <class C, Layout kLayout, int kRows, int kVectors>
static void multiply_block(const C* a, int a_stride, const C* b, int b_stride, C* c, int c_stride, int depth,
                           bool accumulate) {
    Vector<C> sum[kRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            sum[r][v] = accumulate ? load(c + r * c_stride + v * kLanes<C>) : Vector<C>{};
    for (int k = 0; k < depth; ++k) {
        Vector<C> row[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes<C>);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const C scale = kLayout == Layout::kRowMajor ? a[r * a_stride] : a[r];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[r][v] += row[v] * scale;
        }
        a += kLayout == Layout::kRowMajor ? 1 : a_stride;
        b += b_stride;
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes<C>, sum[r][v]);
}

template <class C, Layout kLayout, int kRows>
static void multiply_rows(Matrix<const C> a, Matrix<const C> b, Matrix<C> c, int vectors, int depth, bool accumulate) {
    const auto block = [&](auto count, int v) {
        multiply_block<C, kLayout, kRows, decltype(count)::value>(a.data, a.stride, b.data + v * kLanes<C>, b.stride,
                                                                  c.data + v * kLanes<C>, c.stride, depth, accumulate);
    };
    int v = 0;
    for (; v + kBlockVectors <= vectors; v += kBlockVectors) block(Constant<kBlockVectors>{}, v);
    const int rest = vectors - v;
    if (kBlockVectors > 2 && rest == 3) block(Constant<3>{}, v);
    if (kBlockVectors > 2 && rest == 2) block(Constant<2>{}, v);
    if (rest == 1) block(Constant<1>{}, v);
}

// C[r, 0..vectors) (+)= sum over k < depth of A(r, k) B[k, 0..vectors) for 1 <= rows <= kGroup.
// kTransposed: A is stored with its rows along the contiguous dimension.
template <Layout kLayout, class C>
static void multiply(int rows, int vectors, int depth, Matrix<const C> a, Matrix<const C> b, Matrix<C> c,
                     bool accumulate) {
    switch (rows) {
        case 6: return multiply_rows<C, kLayout, 6>(a, b, c, vectors, depth, accumulate);
        case 5: return multiply_rows<C, kLayout, 5>(a, b, c, vectors, depth, accumulate);
        case 4: return multiply_rows<C, kLayout, 4>(a, b, c, vectors, depth, accumulate);
        case 3: return multiply_rows<C, kLayout, 3>(a, b, c, vectors, depth, accumulate);
        case 2: return multiply_rows<C, kLayout, 2>(a, b, c, vectors, depth, accumulate);
        case 1: return multiply_rows<C, kLayout, 1>(a, b, c, vectors, depth, accumulate);
    }
}

}  // namespace hstu::attention::cpu::HSTU_CPU_VARIANT
